# SPDX-License-Identifier: Apache-2.0
"""Dice (DIN eq. 9): the kernels against reference.py, its statistics. On the CPU kernels, and with
`--host-executor` or `--device cuda` on the CUDA kernels."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import dien_ops
from dice_cases import F64, LOW, arguments, results, running
from dien_ops import functional, reference
from helpers import (
    assert_at_most_twice_torchs_error,
    assert_close,
    assert_same_bits,
    begins_anywhere,
    gradients,
    leaf,
    run_python,
    second_derivatives,
    spread_lengths,
    with_threads,
)

SHAPES = [
    (65, 36),
    (1, 3),
    (0, 5),
    (4, 0),
    (300, 81),
    (90, 81),
    (9, 7, 5),
    (4, 1, 16),
    (0, 6, 4),
    (3, 0, 4),
    (40, 50, 19),
    (7, 3, 260),
]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize(
    ("shape", "with_lengths"), [(s, False) for s in SHAPES] + [(s, True) for s in SHAPES if len(s) == 3]
)
def test_output_gradients_and_moving_averages_are_those_of_the_equations(shape, with_lengths, affine, training):
    lengths = spread_lengths(shape[0], shape[1]) if with_lengths else None
    given = arguments(shape, affine)
    found = []
    for module in (functional, reference):
        averages = running(shape[-1])
        options = {"training": training, "lengths": lengths, "eps": 1e-3}
        found.append([*results(module, given | averages, **options), *averages.values()])
    assert_close(*found)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("eps", "variance_eps"), [(0.0, 0.5), (0.25, 0.5), (0.25, 0.0)])
def test_eps_is_added_to_the_deviation_and_variance_eps_to_the_variance(eps, variance_eps, training):
    given, lengths = arguments((9, 7, 5)) | running(5), spread_lengths(9, 7)
    options = {"training": training, "eps": eps, "variance_eps": variance_eps, "lengths": lengths}
    expected = results(reference, given, **options)
    assert_close(results(functional, given, **options), expected)
    other = results(reference, given, **options | {"eps": variance_eps, "variance_eps": eps})
    assert not torch.allclose(other[0], expected[0])


@pytest.mark.parametrize("channels", [*range(1, 20), 32, 33, 64, 65, 96, 128, 129])
def test_every_number_of_channels_works(channels):
    given = arguments((13, 3, channels))
    for lengths in (None, spread_lengths(13, 3)):
        assert_close(*(results(module, given, lengths=lengths) for module in (functional, reference)))


@pytest.mark.parametrize("shape", [(8300, 61), (3, 2900, 8)])
def test_sums_over_many_rows(shape):
    given = arguments(shape, affine=False)
    assert_close(*(results(module, given, eps=1e-3) for module in (functional, reference)), 1e-11)


@pytest.mark.parametrize("parameters", [torch.float32, None], ids=["float32_parameters", "own_dtype"])
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_low_precision_errs_no_more_than_twice_as_torch_does(training, dtype, parameters):
    def draw() -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        low = arguments((500, 37), dtype=dtype) | running(37, torch.float32)
        exact = {k: v.detach().double().requires_grad_(v.requires_grad) for k, v in low.items()}
        ours = {k: v.detach().to(parameters or v.dtype).requires_grad_(v.requires_grad) for k, v in low.items()}
        ours["input"] = low["input"]
        found, plain = results(functional, ours, training=training), results(reference, low, training=training)
        found = [x.to(y.dtype) for x, y in zip(found, plain, strict=True)]
        return found, plain, results(reference, exact, training=training)

    assert_at_most_twice_torchs_error(draw() for _ in range(3))


@pytest.mark.parametrize("dtype", LOW[1:], ids=str)
@pytest.mark.parametrize("channels", [16, 17])
def test_every_16_bit_number_is_read_and_rounded_right(dtype, channels):
    every = torch.arange(-32768, 32768, dtype=torch.int64).to(torch.int16).view(dtype)
    s = torch.cat([every, every[: -len(every) % channels]]).view(-1, channels)
    averages = {"running_mean": torch.zeros(channels), "running_var": torch.ones(channels)}
    same = functional.dice(s, torch.ones(channels), **averages, training=False)  # p s + (1 - p) s
    assert torch.equal(same.isnan(), s.isnan())
    assert torch.equal(same.nan_to_num(), s.nan_to_num())
    # alpha 0.75 and a closed gate: a product that float32 holds exactly, rounded once
    low = s[(s < -100).all(-1)]
    assert len(low) > 100
    scaled = functional.dice(low, torch.full((channels,), 0.75), **averages, training=False)
    assert torch.equal(scaled, (0.75 * low.float()).to(dtype))


@pytest.mark.parametrize(("dtype", "tolerance"), [(F64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)], ids=str)
def test_the_gate_saturates_and_hands_nan_on(dtype, tolerance):
    values = [0.0, 1e-4, 0.5, 1.0, 9.0, 20.0, 87.0, 89.0, 104.0, 708.0, 710.0, 1e4, 1e30]
    s = torch.tensor([*values, *(-v for v in values), math.nan], dtype=dtype).unsqueeze(1).repeat(1, 3).requires_grad_()
    averages = {"running_mean": torch.zeros(3, dtype=F64), "running_var": torch.ones(3, dtype=F64)}
    alpha = torch.full((3,), 0.25, dtype=dtype)
    found, expected = (
        functional.dice(s, alpha, **averages, training=False), reference.dice(s.double(), alpha.double(), **averages, training=False)
    )  # fmt: skip
    grads = [torch.autograd.grad(y.sum(), s)[0] for y in (found, expected)]
    for actual, exact in ((found, expected), grads):
        assert torch.equal(actual.isnan(), exact.isnan())
        torch.testing.assert_close(actual.double(), exact.double(), rtol=tolerance, atol=1e-30, equal_nan=True)


def test_a_large_mean_with_a_small_variance_keeps_its_precision_in_float32():
    exact = {
        "input": (1e4 + 0.1 * torch.randn(5000, 11, dtype=F64)).float().double(),
        "alpha": torch.zeros(11, dtype=F64),
    }
    single = {k: v.float() for k, v in exact.items()}
    kernel, plain = functional.dice(**single), reference.dice(**single)
    assert_at_most_twice_torchs_error([([kernel], [plain], [reference.dice(**exact)])])
    mean, var = torch.zeros(11), torch.zeros(11)
    functional.dice(**single, running_mean=mean, running_var=var, momentum=1.0)
    torch.testing.assert_close(mean.double(), exact["input"].mean(0), rtol=6e-8, atol=0)
    torch.testing.assert_close(var.double(), exact["input"].var(0), rtol=2e-6, atol=0)


def test_hand_worked_values():
    # s = 1, 3: E = 2, Var = 1, so that p = sigmoid(-1), sigmoid(1); alpha = 0.5
    s = torch.tensor([[1.0], [3.0]], dtype=F64)
    low = 1 / (1 + math.e)
    expected = [[low + (1 - low) * 0.5], [3 * (1 - low) + 3 * low * 0.5]]
    found = functional.dice(s, torch.tensor([0.5], dtype=F64), eps=0.0)
    assert_close([found], [torch.tensor(expected, dtype=F64)])


def test_alpha_one_is_the_identity():
    s = torch.randn(20, 5, dtype=F64)
    assert_close([functional.dice(s, torch.ones(5, dtype=F64))], [s])


def test_a_constant_channel_is_gated_by_one_half_and_has_finite_gradients():
    s = torch.full((10, 3), 0.7, requires_grad=True)
    alpha = torch.tensor([0.0, 0.2, -1.0], requires_grad=True)
    output = functional.dice(s, alpha)
    assert_close([output], [0.35 * (1 + alpha.detach()).expand(10, 3)], 1e-6)
    assert all(g.isfinite().all() for g in torch.autograd.grad(output.sum(), (s, alpha)))


def test_a_batch_of_one_row_passes_no_gradient_through_the_gate():
    s, alpha = leaf(1, 7, dtype=torch.float32), leaf(7, dtype=torch.float32)
    (found,) = torch.autograd.grad(functional.dice(s, alpha).sum(), s)
    assert_close([found], [0.5 + 0.5 * alpha.detach().unsqueeze(0)], 1e-6)


def test_padding_counts_in_no_statistic_and_gets_zeros():
    lengths = torch.tensor([3, 0, 5])
    s, alpha = leaf(3, 5, 4), leaf(4)
    poisoned = s.detach().clone()
    for b, length in enumerate(lengths):
        poisoned[b, length:] = torch.nan
    poisoned.requires_grad_()
    output = functional.dice(poisoned, alpha, lengths=lengths)
    (grad,) = torch.autograd.grad(output.sum(), poisoned)
    valid = torch.cat([s[b, :length] for b, length in enumerate(lengths)])
    expected = functional.dice(valid, alpha)
    assert_close([torch.cat([output[b, :length] for b, length in enumerate(lengths)])], [expected])
    for b, length in enumerate(lengths):
        assert (output[b, length:] == 0).all() and (grad[b, length:] == 0).all()


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(70, 16), (5, 9, 8), (70, 5)])
def test_contiguous_tensors_may_begin_anywhere(shape, dtype):
    given = arguments(shape, dtype=dtype)
    lengths = spread_lengths(*shape[:2]) if len(shape) == 3 else None
    found = []
    for change in (lambda x: x, begins_anywhere):
        changed = {name: change(x) for name, x in given.items()}
        output = functional.dice(**changed, lengths=lengths)
        grad = change((torch.ones_like(output).cumsum(0) % 3).detach())
        found.append([output, *torch.autograd.grad(output, list(changed.values()), grad)])
    assert_same_bits(*found)


@pytest.mark.parametrize("shape", [(9, 17), (4, 6, 9)])
def test_any_strides_are_accepted(shape):
    given = arguments(shape)
    strided = {k: torch.stack([v, v], dim=-1)[..., 0] for k, v in given.items()}
    assert not strided["input"].is_contiguous()
    assert_close([functional.dice(**strided)], [functional.dice(**given)])
    output = functional.dice(**given)
    (expanded,) = torch.autograd.grad(output.sum(), given["input"], retain_graph=True)
    (dense,) = torch.autograd.grad(output, given["input"], torch.ones_like(output))
    assert_close([expanded], [dense])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_first_and_second_derivatives_agree_with_finite_differences(affine, training):
    given = arguments((3, 4, 3), affine) | running(3)
    lengths = torch.tensor([4, 0, 2])
    names = list(given)[: 4 if affine else 2]

    def f(*tensors: Tensor) -> Tensor:
        averages = {} if training else running(3)
        return functional.dice(
            **dict(zip(names, tensors, strict=True)),
            **averages,
            training=training,
            eps=1e-2,
            variance_eps=0.1,
            lengths=lengths,
        )

    inputs = [given[name] for name in names]
    torch.autograd.gradcheck(f, inputs)
    torch.autograd.gradgradcheck(f, inputs)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", LOW[1:], ids=str)
def test_second_derivatives_of_16_bit_input_are_computed_in_float32(dtype, training):
    low = arguments((9, 5), dtype=torch.float32) | {"input": leaf(9, 5, dtype=dtype)}
    wide = {k: v.detach().float().requires_grad_() for k, v in low.items()}
    averages = {} if training else running(5, torch.float32)
    found, expected = (
        second_derivatives([functional.dice(**x, **averages, training=training)], list(x.values())) for x in (low, wide)
    )
    assert [x.dtype for x in found] == [dtype, *[torch.float32] * 3]
    assert_close(found[:1], [expected[0].to(dtype)], torch.finfo(dtype).eps)
    assert_close(found[1:], expected[1:], 1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_the_operators_pass_opcheck(training):
    given = arguments((4, 5, 7), dtype=torch.float32)
    s, alpha, weight, bias = given.values()
    mean, var = running(7, torch.float32).values()
    fixed = (None, None) if training else (mean, var)
    lengths = torch.tensor([5, 0, 3, 1])
    torch.library.opcheck(torch.ops.dien_ops.dice.default, (s, alpha, *fixed, weight, bias, lengths, 1e-8, 1e-3))
    torch.library.opcheck(torch.ops.dien_ops.dice.default, (s, alpha, *fixed, None, None, None, 1e-8, 0.0))
    backward = (
        leaf(4, 5, 7, dtype=torch.float32),
        s,
        alpha,
        mean,
        var,
        weight,
        bias,
        lengths,
        training,
        1e-3,
        1e-2,
    )
    torch.library.opcheck(torch.ops.dien_ops.dice_backward.default, backward)


def test_it_compiles_as_a_whole_with_dynamic_shapes():
    module = dien_ops.Dice(6)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, steps in ((3, 4), (5, 7)):
        s, lengths = leaf(batch, steps, 6, dtype=torch.float32), spread_lengths(batch, steps)
        plain = dien_ops.Dice(6)
        plain.load_state_dict(module.state_dict())
        output, expected = compiled(s, lengths=lengths), plain(s, lengths=lengths)
        assert_close([output, *gradients([output], [s])], [expected, *gradients([expected], [s])], 1e-6)
        assert_close([module.running_mean, module.running_var], [plain.running_mean, plain.running_var], 1e-6)


def test_it_exports():
    module = dien_ops.Dice(6).eval()
    rows = torch.export.Dim("rows", min=1)
    program = torch.export.export(module, (torch.randn(5, 6),), dynamic_shapes={"input": {0: rows}})
    s = torch.randn(9, 6)
    assert_close([program.module()(s)], [module(s)])


@pytest.mark.cpu_kernels
@pytest.mark.parametrize("shape", [(5000, 37), (100, 50, 20)])
def test_the_number_of_threads_changes_no_bit(shape):
    given = arguments(shape, dtype=torch.float32)
    lengths = spread_lengths(*shape[:2]) if len(shape) == 3 else None

    def run() -> list[Tensor]:
        return results(functional, given, lengths=lengths)

    for one, two in zip(with_threads(1, run), with_threads(2, run), strict=True):
        assert torch.equal(one, two)


@pytest.mark.cpu_kernels
@pytest.mark.parametrize("capability", ["baseline", "avx2"])
def test_other_instruction_sets_compute_the_same(capability):
    code = """
import torch, dien_ops
from dien_ops import functional, reference
torch.manual_seed(0)
for shape in ((130, 36), (9, 7, 5), (40, 1), (20, 130)):
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 4e-2), (torch.float16, 5e-3)):
        s, alpha = torch.randn(*shape).to(dtype).requires_grad_(), torch.rand(shape[-1]).to(dtype).requires_grad_()
        lengths = torch.arange(shape[0]) % (shape[1] + 1) if len(shape) == 3 else None
        found = []
        for f, x, a in ((functional.dice, s, alpha), (reference.dice, s.double(), alpha.double())):
            y = f(x, a, lengths=lengths)
            found.append([y, *torch.autograd.grad(y.sum(), (s, alpha))])
        for a, e in zip(*found):
            error = float((a.double() - e.double()).abs().max() / e.double().abs().max().clamp(min=1))
            assert error < tolerance, (shape, dtype, error)
"""
    done = run_python(code, DIEN_OPS_CPU_CAPABILITY=capability)
    if "that this machine" in done.stderr or "unknown" in done.stderr:
        pytest.skip(done.stderr.splitlines()[-1])
    assert done.returncode == 0, done.stderr


def test_memory_that_nobody_wrote_is_never_read():
    given = arguments((9, 7, 5))
    lengths = spread_lengths(9, 7)
    torch.use_deterministic_algorithms(True)  # fills such memory with NaN
    try:
        found = [*results(functional, given, lengths=lengths), *results(functional, given | running(5), training=False)]
    finally:
        torch.use_deterministic_algorithms(False)
    expected = [*results(reference, given, lengths=lengths), *results(reference, given | running(5), training=False)]
    assert_close(found, expected)
