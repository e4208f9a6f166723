# SPDX-License-Identifier: Apache-2.0
"""Each primitive that CUDA kernels are made of, and launch: the kernels of csrc/cuda/test, run by the host executor
(``--host-executor PATH``) and on a GPU (``--device cuda --cuda-test-library PATH``).

A primitive has two bodies, and these tests hold both to the same results. That the executor finds mistakes is tested in
test_host_executor.py.
"""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import assert_close, run_python


class Operators:
    """torch.ops.dien_ops_test with its kernels on a device; arguments come from the CPU, and results go there."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.like = torch.empty(0)  # for operators that are given no other tensor

    def __getattr__(self, name: str) -> Any:
        def run(*arguments: Any) -> Any:
            given = [x.to(self.device) if isinstance(x, Tensor) else x for x in arguments]
            result = getattr(torch.ops.dien_ops_test, name)(*given)
            if self.device == "cuda":
                torch.cuda.synchronize()  # what a kernel did wrong is this call's
            return result.cpu() if isinstance(result, Tensor) else result

        return run


@pytest.fixture
def cuda_test_library(request, on_device) -> Path:
    path = request.config.getoption("--cuda-test-library")
    if path is None:
        pytest.skip(
            "needs --cuda-test-library with the path of libdien_ops_cuda_test.so, which `make gpu-check` builds"
        )
    if not Path(path).exists():
        pytest.fail(f"--cuda-test-library: {path} does not exist", pytrace=False)
    return Path(path).resolve()


@pytest.fixture
def ops(request):
    device = request.config.getoption("--device")
    if device == "cuda":
        torch.ops.load_library(request.getfixturevalue("cuda_test_library"))
    else:
        request.getfixturevalue("host_executor")
    with torch.device("cpu"):
        yield Operators(device)


@pytest.fixture
def shared_bytes(request) -> int:
    """The most shared memory that a block can ask for."""
    if request.config.getoption("--device") == "cuda":
        return torch.cuda.get_device_properties().shared_memory_per_block_optin
    request.getfixturevalue("set_executor")(shared_bytes=101376)
    return 101376


# Launch


def test_every_thread_of_a_grid_knows_its_place(ops, order):
    x, y, z, threads = 3, 2, 2, 64
    got = ops.indices(ops.like, x, y, z, threads)
    thread = torch.arange(threads).expand(z, y, x, threads)
    at = [torch.arange(n) for n in (z, y, x)]
    block_z, block_y, block_x = (i[..., None].expand(z, y, x, threads) for i in torch.meshgrid(*at, indexing="ij"))
    everywhere = torch.full((z, y, x, threads), threads)
    expected = [thread, everywhere, thread % 32, thread // 32, everywhere // 32, block_x, block_y, block_z]
    assert torch.equal(got, torch.stack(expected, dim=-1))


@pytest.mark.parametrize("grid", [(0, 1, 1), (1, 0, 1), (1, 1, 0)])
def test_a_grid_without_blocks_runs_nothing(grid, ops):
    assert ops.indices(ops.like, *grid, 32).numel() == 0
    ops.launch_nothing(ops.like, *grid, 0, 1 << 40)  # nor does it look at the rest


@pytest.mark.parametrize(
    "grid, message",
    [
        ((2**31, 1, 1, 32, 0), "nothing: grid.x must be in 1..2147483647, got 2147483648"),
        ((-1, 1, 1, 32, 0), "nothing: grid.x must be in 1..2147483647, got -1"),
        ((1, 65536, 1, 32, 0), "nothing: grid.y must be in 1..65535, got 65536"),
        ((1, 1, 65536, 32, 0), "nothing: grid.z must be in 1..65535, got 65536"),
        ((1, 1, 1, 0, 0), "nothing: threads of a block must be in 32..1024, got 0"),
        ((1, 1, 1, 1056, 0), "nothing: threads of a block must be in 32..1024, got 1056"),
        ((1, 1, 1, 48, 0), "nothing: threads of a block must be a multiple of 32, got 48"),
    ],
)
def test_launch_refuses_what_no_device_can_run(grid, message, ops):
    with pytest.raises(RuntimeError, match=re.escape(message)):
        ops.launch_nothing(ops.like, *grid)


def test_launch_takes_the_largest_blocks_and_grids(ops):
    ops.launch_nothing(ops.like, 1, 1, 1, 1024, 0)
    for grid in ((65537, 1, 1), (1, 65535, 1), (1, 1, 65535)):
        ops.launch_nothing(ops.like, *grid, 32, 0)


def test_launch_knows_the_shared_memory_of_its_device(shared_bytes, ops):
    ops.launch_nothing(ops.like, 1, 1, 1, 32, shared_bytes)
    for wrong in (-1, shared_bytes + 1):
        message = f"nothing: bytes of shared memory must be in 0..{shared_bytes}, got {wrong}"
        with pytest.raises(RuntimeError, match=re.escape(message)):
            ops.launch_nothing(ops.like, 1, 1, 1, 32, wrong)


def test_a_block_may_use_all_the_shared_memory_there_is(shared_bytes, ops):
    x = torch.randn(shared_bytes // 4)
    assert torch.equal(ops.copy_in_groups(x), x)


def test_a_requirement_that_holds_changes_nothing(ops, order):
    ops.require_not_negative(torch.arange(1000))


def test_a_requirement_that_does_not_hold_is_said_before_the_context_is_lost(cuda_test_library):
    code = f"""
import torch
torch.ops.load_library({str(cuda_test_library)!r})
numbers = torch.arange(1000)
numbers[777] = -5
torch.ops.dien_ops_test.require_not_negative(numbers.cuda())
torch.cuda.synchronize()
"""
    done = run_python(code)
    message = "numbers must not be negative: got -5, half of it is -2.5, at row 777"
    assert message in done.stdout.splitlines(), done.stderr
    assert done.returncode and "device-side assert" in done.stderr


# Sorting


@pytest.mark.parametrize("begin, end", [(0, 64), (17, 40), (3, 4), (0, 9), (60, 64)])
@pytest.mark.parametrize("n", [0, 1, 2, 700, 200_000])
def test_words_are_sorted_by_some_of_their_bits(ops, n, begin, end):
    x = torch.randint(-(2**63), 2**63 - 1, (n,))
    digits = x >> begin  # with copies of the sign above it
    if end - begin < 64:
        digits = digits & (2 ** (end - begin) - 1)
    else:
        digits = digits ^ -(2**63)  # as if they had no sign
    assert torch.equal(ops.sort_words(x, begin, end), x[digits.argsort(stable=True)])


# Moving numbers


@pytest.mark.parametrize(
    "dtype, numbers",
    [(torch.bfloat16, n) for n in (1, 2, 4, 8)] + [(torch.float32, n) for n in (1, 2, 4)] + [(torch.float64, n) for n in (1, 2)],
)  # fmt: skip
def test_numbers_move_alone_and_in_vectors_all_or_where_a_condition_holds(dtype, numbers, ops, order):
    for count, every in itertools.product((1, 63, 64, 65, 1000), (1, 2, 3)):
        x = torch.randn(count * numbers).to(dtype)
        loaded = (torch.arange(count * numbers) // numbers) % every == 0
        assert torch.equal(ops.move(x, numbers, every), torch.where(loaded, x, 0))


@pytest.mark.parametrize("of_part", [True, False])
def test_a_part_of_a_buffer_begins_at_its_offset(of_part, ops):
    x = torch.randn(100)
    for offset, count in ((0, 100), (3, 40), (99, 1), (100, 0)):
        assert torch.equal(ops.part(ops.like, x, 100, offset, count, of_part), x[offset : offset + count])


@pytest.mark.parametrize("of_part", [True, False])
def test_a_part_of_an_absent_buffer_is_absent(of_part, ops):
    assert torch.equal(ops.part(ops.like, None, 100, 3, 40, of_part), torch.zeros(40))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [4, 128, 132, 1000])
def test_copies_are_there_when_waited_for(dtype, count, ops, order):
    x = torch.randn(count, dtype=dtype)
    assert torch.equal(ops.copy_in_groups(x), x)


@pytest.mark.parametrize("threads", [32, 96, 1024])
def test_after_a_barrier_each_thread_sees_what_the_others_of_its_block_brought(threads, ops, order):
    x = torch.randn(5, 4 * threads)
    assert torch.equal(ops.reverse(x), x.flip(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int32, torch.int64])
def test_shuffle_gives_the_value_of_the_other_lane(dtype, ops, order):
    x = torch.randint(-(2**62), 2**62, (32,)).to(dtype)
    for mask in range(32):
        assert torch.equal(ops.shuffle(x, mask), x[torch.arange(32) ^ mask])


# Formats


def all_16_bits(dtype):
    return torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)


def assert_same_numbers(actual, expected):
    """Bit for bit, but for the payload of a NaN."""
    assert torch.equal(actual.isnan(), expected.isnan())
    bits = {2: torch.int16, 4: torch.int32}[expected.element_size()]
    assert torch.equal(actual[~actual.isnan()].view(bits), expected[~expected.isnan()].view(bits))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_number_is_read_and_written_back(dtype, ops):
    numbers = all_16_bits(dtype)
    assert_same_numbers(ops.to_compute(numbers), numbers.float())
    assert_same_numbers(ops.to_storage(numbers.float(), dtype == torch.bfloat16), numbers)


def awkward_floats(dtype):
    """Each number of the dtype, what lies halfway to the next, and the floats on both sides of it; and random bits."""
    at = all_16_bits(dtype).float()
    at = at[at.isfinite()].sort().values
    halfway = ((at[1:].double() + at[:-1].double()) / 2).float()
    limits = torch.tensor(
        [math.inf, -math.inf, math.nan, -math.nan, 3.4e38, -3.4e38, 65519.99, 65520.0, 65536.0, 1e-45, -0.0]
    )
    drawn = torch.randint(-(2**31), 2**31 - 1, (100000,), dtype=torch.int32).view(torch.float32)
    beside = [halfway.nextafter(torch.tensor(to)) for to in (math.inf, -math.inf)]
    return torch.cat([at, halfway, *beside, limits, drawn])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_storage_rounds_as_torch_does(dtype, ops):
    x = awkward_floats(dtype)
    assert_same_numbers(ops.to_storage(x, dtype == torch.bfloat16), x.to(dtype))


def test_tf32_keeps_ten_bits_and_rounds_ties_away_from_zero(ops):
    bits = torch.randint(-(2**31), 2**31 - 1, (100000,), dtype=torch.int32)
    bits[:50000] = bits[:50000] // 2**12 * 2**12  # half of these are ties
    x = bits.view(torch.float32)
    x = x[x.isfinite() & (x.abs() < 3.4e38)]
    got = ops.apply("to_tf32", x, None)
    mantissa, exponent = x.double().frexp()
    scaled = mantissa * 2**11
    rounded = torch.copysign((scaled.abs() + 0.5).floor(), scaled)
    normal = x.abs() >= 2.0**-126
    assert torch.equal(got[normal].double(), torch.ldexp(rounded, exponent - 11)[normal])
    assert not (got.view(torch.int32) & 0x1FFF).any()
    steps = x[~normal].double() / 2.0**-136  # below, 2^-136 is one step
    assert torch.equal(got[~normal].double(), torch.copysign((steps.abs() + 0.5).floor(), steps) * 2.0**-136)
    limits = torch.tensor([math.inf, -math.inf, 0.0, -0.0, math.nan])
    assert_same_numbers(ops.apply("to_tf32", limits, None), limits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name, function", [("exp_exact", torch.exp), ("tanh_exact", torch.tanh)])
def test_exact_functions_are_torchs(name, function, dtype, ops):
    x = torch.cat([torch.linspace(-100, 100, 2001, dtype=dtype), torch.tensor([math.inf, -math.inf], dtype=dtype)])
    eps, smallest = torch.finfo(dtype).eps, torch.finfo(dtype).smallest_normal  # below it, steps are eps * smallest
    torch.testing.assert_close(ops.apply(name, x, None), function(x), rtol=4 * eps, atol=2 * eps * smallest)


def test_approximate_functions_are_close(ops):
    x, y = torch.linspace(-80, 80, 2001), torch.linspace(0.1, 100, 2001)
    exact = x.double().exp()
    allowed = (2 + 1.173 * x.double().abs()) * 2.0**-23  # CUDA's own bound
    assert ((ops.apply("exp_approx", x, None).double() - exact).abs() <= allowed * exact).all()
    torch.testing.assert_close(ops.apply("divide_approx", x, y), x / y, rtol=3e-7, atol=0)


# Matrix units


def operands(dtype, depth, ops):
    a, b = torch.randn(16, depth).to(dtype), torch.randn(depth, 8).to(dtype)
    if dtype == torch.float32:
        a, b = (ops.apply("to_tf32", x, None) for x in (a, b))
    return a, b, torch.randn(16, 8)


@pytest.mark.parametrize("dtype, depth", [(torch.float32, 8), (torch.bfloat16, 16), (torch.float16, 16)])
def test_mma_is_a_matrix_product(dtype, depth, ops, order):
    for _ in range(10):
        a, b, d = operands(dtype, depth, ops)
        expected = d.double() + a.double() @ b.double()
        assert_close([ops.mma(a, b, d).double()], [expected], tolerance=depth * 2.0**-22)  # a GPU cuts sums off


@pytest.mark.parametrize("dtype, depth", [(torch.float32, 8), (torch.bfloat16, 16), (torch.float16, 16)])
def test_mma_puts_each_number_of_each_fragment_where_it_belongs(dtype, depth, ops):
    """Unit matrices: each result is one number of a or b, exactly."""
    a, b, zero = (
        (torch.arange(16 * depth) % 128).reshape(16, depth).to(dtype),
        torch.eye(depth).to(dtype),
        torch.zeros(16, 8),
    )
    for k in range(0, depth, 8):
        assert torch.equal(ops.mma(a, b[:, k : k + 8].contiguous(), zero), a[:, k : k + 8].float())
    b = torch.arange(8 * depth).reshape(depth, 8).to(dtype)
    unit = torch.eye(16)[:, :depth].to(dtype)
    assert torch.equal(ops.mma(unit, b, zero)[:depth], b.float())


def test_mma_passes_nan_and_infinity_on(ops, order):
    for value in (math.nan, math.inf):
        a, b, d = torch.ones(16, 8), torch.ones(8, 8), torch.zeros(16, 8)
        a[3, 5] = value
        expected = torch.full((16, 8), 8.0)
        expected[3] = value
        assert_same_numbers(ops.mma(a, b, d), expected)
