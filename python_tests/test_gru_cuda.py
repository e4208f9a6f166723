# SPDX-License-Identifier: Apache-2.0
"""What only the CUDA kernels of the recurrent column have: tf32, layouts of the chip's memory, streams and graphs.

Everything else of them is tested by the recurrent column's other tests, which run with `--host-executor` or `--device cuda`.
"""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

import dien_ops
import dien_ops.info
from dien_ops import _precision, functional, reference
from gru_cases import (
    CELLS,
    RESETS,
    Case,
    cells,
    check_all_16_bit_numbers,
    check_all_partial_vectors,
    check_saturation_and_nan,
)
from helpers import (
    assert_at_most_twice_torchs_error,
    assert_close,
    assert_same_bits,
    begins_anywhere,
    captured,
    rounded_to_tf32,
    run_python,
    waiting_is_an_error,
)

pytestmark = pytest.mark.usefixtures("cuda_kernels")

LOW = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def tf32(monkeypatch):
    """float32 means tf32."""
    monkeypatch.setattr(_precision, "allow_tf32", lambda input, backend: input.dtype == torch.float32)


# --------------------------------------------------------------------------------------------------------------- tf32


class Tf32Linear(torch.autograd.Function):
    """What a matrix unit makes of x W^T and its gradients: operands of 11 bits, sums as good as float64's."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return rounded_to_tf32(x) @ rounded_to_tf32(weight).T

    @staticmethod
    def backward(ctx, grad):
        x, weight = map(rounded_to_tf32, ctx.saved_tensors)
        grad = rounded_to_tf32(grad)
        return grad @ weight, grad.flatten(0, -2).T @ x.flatten(0, -2)


@RESETS
@CELLS
def test_tf32_errs_at_most_twice_as_much_as_its_rounding(cell, reset_after, tf32, monkeypatch):
    def draw():
        case = Case(**cell, reset_after=reset_after, batch=9, steps=12, features=7, hidden=18, dtype=torch.float32)
        double = case.to(torch.float64)
        exact = double.results(reference)
        with monkeypatch.context() as patch:
            patch.setattr(F, "linear", lambda x, w: Tf32Linear.apply(x, w))
            rounded = [x.float() for x in double.results(reference)]
        return case.results(functional), rounded, exact

    assert_at_most_twice_torchs_error(draw() for _ in range(5))


def test_float32_is_rounded_to_tf32_only_where_that_is_allowed(monkeypatch):
    case = Case("paper", batch=9, steps=12, features=7, hidden=18, dtype=torch.float32)
    exact = case.to(torch.float64).results(reference)
    errors = []
    for allowed in (False, True):
        monkeypatch.setattr(_precision, "allow_tf32", lambda input, backend, allowed=allowed: allowed)
        results = [x.detach() for x in case.results(functional)]
        errors.append(max(float((a - e.detach()).abs().max()) for a, e in zip(results, exact, strict=True)))
    assert errors[0] < 1e-5 and 20 * errors[0] < errors[1]


@pytest.mark.parametrize("precision, allowed", [("tf32", True), ("ieee", False)])
def test_tf32_is_allowed_where_it_is_for_nn_gru(precision, allowed):
    rnn = torch.backends.cudnn.rnn
    before = rnn.fp32_precision
    try:
        rnn.fp32_precision = precision
        assert _precision._tf32_is_allowed("rnn") is allowed
    finally:
        rnn.fp32_precision = before


# ------------------------------------------------------------------------------------------------ the chip's memory


@RESETS
@pytest.mark.parametrize("dtype", [*LOW, torch.float64], ids=str)
@pytest.mark.parametrize("gate", ["none", "authors", "input"])
def test_bits_do_not_depend_on_what_fits_on_the_chip(gate, dtype, reset_after, set_executor, tf32):
    # hidden 150: units shared among warps. 48 KiB: part of the weights, and the state in global memory for float64
    case = Case(gate, batch=37, steps=3, features=5, hidden=150, reset_after=reset_after, dtype=dtype)
    expected, residence = case.results(functional), []
    for multiprocessors, shared_bytes in [(1, 232448), (4, 101376), (4, 49152), (1, 49152)]:
        set_executor(multiprocessors=multiprocessors, shared_bytes=shared_bytes)
        assert_same_bits(case.results(functional), expected)
        residence.append(torch.ops.dien_ops.gru_residence(case.input, 150, reset_after, True))
    assert len(set(residence)) == 3
    if dtype == torch.float64:
        assert [state for _, state, *_ in residence] == [True, True, False, False]


@RESETS
def test_large_hidden_sizes_in_16_bits(reset_after):
    def draw():
        case = Case("paper", batch=3, steps=2, features=3, hidden=140, reset_after=reset_after, dtype=torch.bfloat16)
        return case.results(functional), case.results(reference), case.to(torch.float64).results(reference)

    assert_at_most_twice_torchs_error(draw() for _ in range(3))


def test_residence_shrinks_as_the_hidden_size_grows():
    like = torch.empty(0, dtype=torch.bfloat16)
    found = [torch.ops.dien_ops.gru_residence(like, h, True, False) for h in (0, 1, 36, 128, 256, 512, 20_000)]
    for shares in zip(*found, strict=True):
        assert list(shares) == sorted(shares, reverse=True)
    assert found[3] == (1.0, True, 1.0, True) and found[-1] == (0.0, False, 0.0, False)


@pytest.mark.parametrize("dtype", [*LOW, torch.float64], ids=str)
def test_info_knows_the_largest_size_that_stays_on_the_chip(dtype, tf32):
    like = torch.empty(0, dtype=dtype)
    largest = dien_ops.info._largest_resident_size(like)
    assert set(dien_ops.info._residence(like, largest)) == {1.0}
    assert set(dien_ops.info._residence(like, largest + 1)) != {1.0}


@pytest.mark.parametrize(
    "dtype, largest", [(torch.float32, 128), (torch.bfloat16, 176), (torch.float16, 176), (torch.float64, 86)], ids=str
)
def test_with_227_kib_the_largest_sizes_on_the_chip_are_those_that_the_readme_names(dtype, largest, set_executor, tf32):
    set_executor(shared_bytes=227 * 1024)
    assert dien_ops.info._largest_resident_size(torch.empty(0, dtype=dtype)) == largest


def test_residence_is_that_of_a_gpu():
    with pytest.raises(RuntimeError, match="device must be a CUDA device, got cpu"):
        dien_ops.info.gru_residence(36, device="cpu")


# ------------------------------------------------------------------------------------------ in whatever order threads run


ORDERS = [("in_order", 0), ("reverse", 0), *itertools.product(["shuffled", "skewed"], range(3))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@RESETS
def test_bits_do_not_depend_on_the_order_of_threads(reset_after, dtype, set_executor, tf32):
    every = [Case(**cell, batch=18, steps=4, hidden=21, reset_after=reset_after, dtype=dtype) for cell in cells()]
    expected = [case.results(functional) for case in every]
    for order, seed in ORDERS:
        set_executor(order=order, seed=seed, multiprocessors=1)
        for case, results in zip(every, expected, strict=True):
            assert_same_bits(case.results(functional), results)


# ------------------------------------------------------------------------------------------------------------- layout


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_contiguous_tensors_may_begin_anywhere(dtype):
    case = Case("paper", batch=5, hidden=6, dtype=dtype)
    expected = case.results(functional)

    moved = case.with_tensors([begins_anywhere(x) for x in case.tensors])
    outputs = moved.call(functional)
    projections = [begins_anywhere(torch.ones_like(y)) for y in outputs]
    assert_same_bits(outputs, expected[:2])
    aligned = torch.autograd.grad(case.call(functional), case.tensors, [torch.ones_like(p) for p in projections])
    assert_same_bits(torch.autograd.grad(outputs, moved.tensors, projections), aligned)


@pytest.mark.parametrize("size", [{"batch": 300}, {"steps": 300}], ids=str)
def test_lengths_of_large_batches_and_long_sequences(size):
    case = Case("input", **{"batch": 5, "steps": 4} | size, hidden=3, targets=2)
    assert_close(case.results(functional), case.results(reference))


@pytest.mark.parametrize("lengths", [True, False])
def test_products_over_more_steps_than_a_block_takes(lengths):
    # 91 steps of 91, or of about half as many; 64 in a block
    case = Case("input", batch=13, steps=7, targets=2, lengths=lengths)
    assert_close(case.results(functional), case.results(reference))


# ----------------------------------------------------------------------------------------------------- all numbers


def test_all_16_bit_numbers_are_read_and_rounded_right():
    check_all_16_bit_numbers(sizes=(17, 18))


def test_every_size_between_two_whole_tiles_works_in_float32():
    check_all_partial_vectors()


def test_gates_saturate_and_hand_nan_on():
    check_saturation_and_nan()


def test_fast_gates_saturate_and_hand_nan_on(tf32):
    check_saturation_and_nan([(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)])


@RESETS
def test_an_infinite_input_saturates_the_gates_of_its_row(reset_after):
    # hidden 5: columns of zeros fill the last tile, and 0 times infinity must not come into the state
    case = Case("none", lengths=False, reset_after=reset_after)
    with torch.no_grad():
        case.input[1, 2, 0] = torch.inf
    expected = case.call(reference)
    assert all(x.isfinite().all() for x in expected)
    assert_close(case.call(functional), expected)


@RESETS
@CELLS
def test_memory_that_nobody_wrote_is_never_read(cell, reset_after, set_executor):
    set_executor(shared_bytes=49152)  # the state lies in global memory
    case = Case(**cell, batch=5, steps=3, hidden=150, reset_after=reset_after)
    torch.use_deterministic_algorithms(True)  # fills such memory with NaN
    try:
        results = case.results(functional)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_close(results, case.results(reference))


# ---------------------------------------------------------------------------------------------------- on a device only


def step(case):
    """Outputs and gradients, as results gives them but without anything from the CPU."""
    outputs = case.call(functional)
    return [*outputs, *torch.autograd.grad(outputs, case.tensors, [torch.ones_like(y) for y in outputs])]


def test_nothing_waits_for_the_device(on_device):
    case = Case("paper", batch=9)
    with waiting_is_an_error():
        step(case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_training_step_replays_from_a_cuda_graph(on_device, dtype):
    case = Case("paper", batch=40, steps=9, hidden=36, dtype=dtype)
    graph, replayed = captured(lambda: step(case))
    other = Case("paper", batch=40, steps=9, hidden=36, dtype=dtype)
    with torch.no_grad():
        for to, x in zip(case.tensors, other.tensors, strict=True):
            to.copy_(x)
        case.options["lengths"].copy_(other.options["lengths"])
    graph.replay()
    assert_same_bits(replayed, step(other))


def test_work_goes_to_the_callers_stream(on_device):
    case = Case("paper", batch=40, hidden=36)
    expected = case.results(functional)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)  # what follows on another stream would not see the end of it
        with torch.no_grad():
            case.input.mul_(0)
        results = case.call(functional)
        side.synchronize()
    assert not torch.equal(results[0], expected[0])
    assert_same_bits(results, case.call(functional))


def test_the_same_inputs_give_the_same_bits(on_device):
    case = Case("paper", batch=700, steps=20, features=36, hidden=36, dtype=torch.float32)
    expected = case.results(functional)
    for _ in range(5):
        assert_same_bits(case.results(functional), expected)


def test_a_length_beyond_the_steps_is_named_before_the_context_is_lost(on_device):
    code = """
import torch, dien_ops
gru = dien_ops.GRU(3, 5).cuda()
gru(torch.zeros(4, 2, 3, device="cuda"), lengths=torch.tensor([4, 7], device="cuda"))
torch.cuda.synchronize()
"""
    done = run_python(code)
    assert "lengths must be in 0..4 (T), got 7 at row 1" in done.stdout and "device-side assert" in done.stderr
