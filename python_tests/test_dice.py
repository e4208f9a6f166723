# SPDX-License-Identifier: Apache-2.0
"""Dice (DIN eq. 9): the kernels against reference.py, its statistics, its module. On the CPU kernels, and with
`--host-executor` or `--device cuda` on the CUDA kernels."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

import dien_ops
from dien_ops import functional, reference
from helpers import (
    assert_at_most_twice_torchs_error,
    assert_close,
    assert_same_bits,
    begins_anywhere,
    gradients,
    here,
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
F64 = torch.float64
LOW = [torch.float32, torch.bfloat16, torch.float16]


def arguments(shape: tuple[int, ...], affine: bool = True, dtype: torch.dtype = F64) -> dict[str, Tensor]:
    result = {"input": leaf(*shape, dtype=dtype), "alpha": leaf(shape[-1], dtype=dtype)}
    if affine:
        result |= {"weight": leaf(shape[-1], dtype=dtype), "bias": leaf(shape[-1], dtype=dtype)}
    return result


def running(channels: int, dtype: torch.dtype = F64) -> dict[str, Tensor]:
    mean, var = torch.linspace(-1, 1, channels, dtype=dtype), torch.linspace(0.5, 2, channels, dtype=dtype)
    return {"running_mean": mean, "running_var": var}


def results(module, arguments: dict[str, Tensor], **options) -> list[Tensor]:
    output = module.dice(**arguments, **options)
    return [output.detach(), *gradients([output], [x for x in arguments.values() if x.requires_grad])]


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, F64], ids=str)
def test_the_order_of_threads_changes_no_bit(dtype, set_executor):
    cases = [(arguments(shape, dtype=dtype), shape) for shape in ((70, 16), (130, 5), (9, 7, 24), (3, 4, 1))]

    def run() -> list[Tensor]:
        found = []
        for given, shape in cases:
            lengths = spread_lengths(*shape[:2]).sort().values if len(shape) == 3 else None
            for training in (True, False):
                averages = {} if training else running(shape[-1])
                found += results(functional, given | averages, training=training, lengths=lengths)
        return found

    expected = run()
    for order, seed in [("reverse", 0), *itertools.product(["shuffled", "skewed"], range(2))]:
        set_executor(order=order, seed=seed, multiprocessors=1)
        assert_same_bits(run(), expected)


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


# ------------------------------------------------------------------------------------------------- on a device only


def step(given: dict[str, Tensor], averages: dict[str, Tensor], lengths: Tensor | None) -> list[Tensor]:
    output = functional.dice(**given, **averages, lengths=lengths)
    return [output, *torch.autograd.grad(output, list(given.values()), torch.ones_like(output))]


def test_nothing_waits_for_the_device(on_device):
    given, averages, lengths = (
        arguments((9, 7, 24), dtype=torch.float32),
        running(24, torch.float32),
        spread_lengths(9, 7),
    )
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(given, averages, lengths), step(given, averages, None)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_training_step_replays_from_a_cuda_graph(on_device, dtype):
    given, averages, lengths = arguments((90, 7, 24), dtype=dtype), running(24, torch.float32), spread_lengths(90, 7)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(given, averages, lengths)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(given, averages, lengths)
    other, other_lengths = arguments((90, 7, 24), dtype=dtype), spread_lengths(90, 7)
    with torch.no_grad():
        for name, x in given.items():
            x.copy_(other[name])
        lengths.copy_(other_lengths)
    graph.replay()
    assert_same_bits(captured, step(other, averages, other_lengths))


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_the_same_inputs_give_the_same_bits(on_device, dtype):
    given = arguments((70_000, 80), dtype=dtype)
    expected = results(functional, given)
    for _ in range(5):
        assert_same_bits(results(functional, given), expected)


def test_a_wrong_length_is_named_before_the_context_is_lost(on_device):
    code = """
import torch, dien_ops
dien_ops.Dice(3).cuda()(torch.zeros(2, 4, 3, device="cuda"), lengths=torch.tensor([4, 7], device="cuda"))
torch.cuda.synchronize()
"""
    done = run_python(code)
    assert "lengths must be in 0..4 (T), got 7 at row 1" in done.stdout and "device-side assert" in done.stderr


# ------------------------------------------------------------------------------------------------------------- module


class OverBatchNorm(nn.Module):
    """Dice as public libraries build it, of torch's own modules: DeepCTR-Torch (affine, eps 1e-8) and FuxiCTR (not
    affine, eps 1e-9, momentum 0.01)."""

    def __init__(self, channels: int, **options):
        super().__init__()
        self.bn = nn.BatchNorm1d(channels, **options)
        self.alpha = nn.Parameter(torch.zeros(channels))

    def forward(self, s: Tensor) -> Tensor:
        p = torch.sigmoid(self.bn(s))
        return p * s + self.alpha * (1 - p) * s


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"eps": 1e-8}, {"eps": 0, "variance_eps": 1e-8, "affine": True}),
        ({"eps": 1e-9, "momentum": 0.01, "affine": False}, {"eps": 0, "variance_eps": 1e-9, "momentum": 0.01}),
    ],
    ids=["deepctr_torch", "fuxictr"],
)
def test_the_state_of_a_public_dice_loads_and_computes_the_same(theirs, ours):
    public, module = OverBatchNorm(7, **theirs), dien_ops.Dice(7, **ours)
    for parameter in public.parameters():
        nn.init.uniform_(parameter)
    public(torch.randn(50, 7) + 1)
    module.load_state_dict({name.removeprefix("bn."): value for name, value in public.state_dict().items()})
    for training in (True, False, True):
        public.train(training), module.train(training)
        s = leaf(40, 7, dtype=torch.float32)
        outputs = [module(s), public(s)]
        found, expected = ([y, *torch.autograd.grad(y.square().sum(), s)] for y in outputs)
        assert_close(found, expected, 1e-5)
    assert_close([module.running_mean, module.running_var], [public.bn.running_mean, public.bn.running_var], 1e-6)
    assert module.num_batches_tracked == public.bn.num_batches_tracked == 3


def test_without_moving_averages_the_statistics_are_the_batchs_in_evaluation_too():
    module = dien_ops.Dice(5, eps=1e-9, variance_eps=1e-9, track_running_stats=False)
    assert list(module.state_dict()) == ["alpha"]
    assert module.running_mean is module.running_var is module.num_batches_tracked is None
    s = torch.randn(20, 5) + 1
    # as DIEN's authors compute it
    mean = s.mean(0)
    normed = (s - mean) / (((s - mean).square().mean(0) + 1e-9).sqrt() + 1e-9)
    p = torch.sigmoid(normed)
    for training in (True, False):
        assert_close([module.train(training)(s)], [p * s], 1e-6)
    assert "track_running_stats=False" in repr(module) and "track_running_stats" not in repr(dien_ops.Dice(5))
    module.reset_parameters()


def test_the_form_of_dins_authors_never_leaves_mean_zero_and_variance_one():
    module = dien_ops.Dice(5, eps=0, variance_eps=1e-3, affine=True).eval()
    nn.init.uniform_(module.weight)
    s = torch.randn(20, 5)
    p = torch.sigmoid(module.weight * s / math.sqrt(1 + 1e-3))
    assert_close([module(s)], [p * s], 1e-6)


@pytest.mark.parametrize("dtype", LOW[1:], ids=str)
def test_a_float32_module_takes_16_bit_input_and_keeps_float32_averages(dtype):
    module, wide = dien_ops.Dice(5, affine=True), dien_ops.Dice(5, affine=True)
    s = (torch.randn(3000, 5) * 0.1 + 3).to(dtype)
    output, expected = module(s), wide(s.float())
    assert output.dtype == dtype and module.running_mean.dtype == torch.float32
    assert_close([output], [expected.to(dtype)], torch.finfo(dtype).eps)
    assert_close([module.running_mean, module.running_var], [wide.running_mean, wide.running_var], 1e-6)
    output.sum().backward()
    assert module.alpha.grad.dtype == module.weight.grad.dtype == torch.float32


def test_autocast_leaves_the_input_as_it_is():
    module, s = dien_ops.Dice(5), torch.randn(8, 5)
    with torch.autocast(s.device.type, dtype=torch.bfloat16):
        assert module(s).dtype == torch.float32
        assert module(s.bfloat16()).dtype == torch.bfloat16


def test_moving_averages_follow_batch_norm():
    ours, theirs = dien_ops.Dice(5, momentum=0.3), nn.BatchNorm1d(5, momentum=0.3, affine=False)
    for _ in range(3):
        s = torch.randn(8, 5) * 2 + 1
        ours(s), theirs(s)
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value)


def test_it_is_dice_over_batch_norm():
    ours, theirs = dien_ops.Dice(5, affine=True, dtype=F64), nn.BatchNorm1d(5, eps=1e-12, dtype=F64)
    nn.init.uniform_(ours.alpha)
    for module in (ours, theirs):
        nn.init.constant_(module.weight, 0.7), nn.init.constant_(module.bias, -0.2)
    for training in (True, False):
        ours.train(training), theirs.train(training)
        s = leaf(16, 5)
        p = torch.sigmoid(theirs(s))
        expected = p * s + (1 - p) * ours.alpha * s
        output = ours(s)
        assert_close([output, *gradients([output], [s])], [expected, *gradients([expected], [s])], 1e-7)


def test_an_empty_batch_leaves_the_moving_averages_alone():
    module = dien_ops.Dice(3)
    module(torch.randn(0, 3)), module(torch.randn(2, 4, 3), lengths=torch.tensor([0, 0]))
    assert (module.running_mean == 0).all() and (module.running_var == 1).all()


def test_in_evaluation_a_row_does_not_depend_on_its_batch():
    module = dien_ops.Dice(6)
    module(torch.randn(50, 6) + 1)
    module.eval()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    s = torch.randn(7, 6)
    assert torch.equal(module(s)[3:4], module(s[3:4]))
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_parameters_and_buffers_have_batch_norms_names():
    assert list(dien_ops.Dice(4, affine=True).state_dict()) == [
        "alpha", "weight", "bias", "running_mean", "running_var", "num_batches_tracked",
    ]  # fmt: skip
    assert [name for name, _ in dien_ops.Dice(4).named_parameters()] == ["alpha"]


# ------------------------------------------------------------------------------------------------------------- errors


SEQUENCES = {"input": torch.zeros(2, 4, 3)}
HALF, DOUBLE = torch.zeros(2, 3, dtype=torch.float16), torch.zeros(3, dtype=F64)
INTEGERS = torch.ones(3).long()


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (TypeError, "input must be a Tensor, got list", {"input": [1.0]}),
        (ValueError, r"input must be 2-D or 3-D, got 1-D of shape \[3\]", {"input": torch.zeros(3)}),
        (ValueError, "input must be float32, float64, bfloat16 or float16, got int64", {"input": torch.zeros(2, 3).long()}),
        (ValueError, "alpha must have the dtype of input: expected torch.float16 or torch.float32", {"input": HALF, "alpha": DOUBLE}),
        (ValueError, "alpha must have the dtype of input: expected torch.float32", {"alpha": DOUBLE}),
        (RuntimeError, r"alpha must have shape \[3\] \[C\], got \[4\]", {"alpha": torch.zeros(4)}),
        (RuntimeError, r"weight must have shape \[3\] \[C\], got \[1\]", {"weight": torch.ones(1)}),
        (TypeError, "alpha must be a Tensor, got NoneType", {"alpha": None}),
        (ValueError, "running_mean and running_var must be given together", {"running_mean": torch.zeros(3)}),
        (TypeError, "momentum must be a number, got NoneType", {"momentum": None}),
        (ValueError, r"momentum must be in \[0, 1\], got 1.5", {"momentum": 1.5}),
        (ValueError, r"momentum must be in \[0, 1\], got nan", {"momentum": math.nan}),
        (TypeError, "eps must be a number, got str", {"eps": "1e-8"}),
        (ValueError, "eps must be finite and >= 0, got -1", {"eps": -1}),
        (ValueError, "running_mean and running_var are needed where training=False, got None", {"training": False}),
        (ValueError, r"lengths need an input of shape \[B, T, C\]", {"lengths": torch.tensor([1, 1])}),
        (ValueError, "lengths must be int32 or int64, got float32", SEQUENCES | {"lengths": torch.ones(2)}),
        (RuntimeError, r"lengths must have shape \[2\] \[B\], got \[1\]", SEQUENCES | {"lengths": torch.tensor([1])}),
        (RuntimeError, r"lengths must be in 0..4 \(T\), got 5 at row 1", SEQUENCES | {"lengths": torch.tensor([0, 5])}),
        (RuntimeError, "lengths must be in 0..4 .*, got -1 at row 0", SEQUENCES | {"lengths": torch.tensor([-1, 4])}),
    ],
)  # fmt: skip
def test_a_wrong_argument_is_named(error, message, change):
    if torch.get_default_device().type == "cuda" and "0..4" in message:
        pytest.skip("on a device nobody waits for the lengths' values")
    given = {"input": torch.zeros(2, 3), "alpha": torch.zeros(3)} | {name: here(x) for name, x in change.items()}
    with pytest.raises(error, match=message):
        functional.dice(**given)


@pytest.mark.parametrize(
    ("error", "message", "average"),
    [
        (TypeError, "{} must be a Tensor, got list", [0.0, 0.0, 0.0]),
        (ValueError, "{} must have the dtype of input, torch.float32 or torch.float64, got torch.int64", INTEGERS),
        (ValueError, "{} must have the dtype of input, .* got torch.float16", INTEGERS.half()),
        (RuntimeError, r"{} must have shape \[3\] \[C\], got \[4\]", torch.ones(4)),
        (RuntimeError, "{} must be on the device of input: expected .*, got meta", torch.ones(3, device="meta")),
        (RuntimeError, "{} must not be an expanded tensor", torch.ones(1).expand(3)),
    ],
)
@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_an_unusable_moving_average_is_named_and_the_other_left_alone(name, error, message, average):
    averages, average = running(3, torch.float32), here(average)
    before = {key: value.clone() for key, value in averages.items() if key != name}
    with pytest.raises(error, match=message.format(name)):
        functional.dice(torch.randn(5, 3), torch.zeros(3), **(averages | {name: average}))
    assert all(torch.equal(averages[key], value) for key, value in before.items())


def test_with_16_bit_input_moving_averages_may_be_float32():
    s, alpha = torch.randn(5, 3).bfloat16(), torch.zeros(3)
    for dtype in (torch.bfloat16, torch.float32, F64):
        functional.dice(s, alpha, **running(3, dtype))
    message = (
        "running_mean must have the dtype of input, torch.bfloat16 or torch.float32 or torch.float64, got torch.float16"
    )
    with pytest.raises(ValueError, match=message):
        functional.dice(s, alpha, **running(3, torch.float16))


def test_moving_averages_may_be_float64_or_strided_and_in_evaluation_expanded():
    s, alpha = torch.randn(5, 3), torch.zeros(3)
    plain, wide = running(3, torch.float32), running(3)
    strided = {name: torch.stack([value, value], -1)[:, 0] for name, value in wide.items()}
    for averages in (plain, wide, strided):
        functional.dice(s, alpha, **averages)
    assert_close(list(strided.values()), list(wide.values()))
    assert_close(list(plain.values()), [x.float() for x in wide.values()], 1e-6)
    zero, one = torch.zeros(1), torch.ones(1)
    expected = functional.dice(s, alpha, zero.repeat(3), one.repeat(3), training=False)
    assert_close([functional.dice(s, alpha, zero.expand(3), one.expand(3), training=False)], [expected])


@pytest.mark.parametrize("momentum", [0, 1])
def test_a_momentum_of_zero_or_one_is_allowed(momentum):
    module, s = dien_ops.Dice(3, momentum=momentum), torch.randn(9, 3) + 1
    module(s)
    assert_close([module.running_mean], [momentum * s.mean(0)], 1e-6)


def test_without_eps_a_constant_channel_and_no_other_is_nan():
    s = torch.randn(5, 2, dtype=F64)
    s[:, 1] = 2
    output = functional.dice(s, torch.zeros(2, dtype=F64), eps=0)
    assert output[:, 0].isfinite().all() and output[:, 1].isnan().all()


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (TypeError, "num_features must be an int, got float", {"num_features": 3.0}),
        (ValueError, "num_features must be greater than zero, got 0", {"num_features": 0}),
        (ValueError, "num_features must be greater than zero, got -2", {"num_features": -2}),
        (TypeError, "eps must be a number, got NoneType", {"eps": None}),
        (TypeError, "eps must be a number, got bool", {"eps": True}),
        (ValueError, "eps must be finite and >= 0, got -1", {"eps": -1}),
        (ValueError, "eps must be finite and >= 0, got inf", {"eps": math.inf}),
        (TypeError, "momentum must be a number, got NoneType", {"momentum": None}),
        (ValueError, r"momentum must be in \[0, 1\], got 5.0", {"momentum": 5.0}),
        (ValueError, r"momentum must be in \[0, 1\], got -0.1", {"momentum": -0.1}),
        (TypeError, "affine must be a bool, got int", {"affine": 1}),
        (TypeError, "track_running_stats must be a bool, got int", {"track_running_stats": 1}),
    ],
)
def test_the_module_refuses_a_wrong_option(error, message, options):
    with pytest.raises(error, match=message):
        dien_ops.Dice(**({"num_features": 3} | options))


@pytest.mark.not_on_cuda(reason="there a wrong length ends the process's use of the device")
def test_after_an_error_nothing_is_half_updated():
    module = dien_ops.Dice(3)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(RuntimeError, match="lengths"):
        module(torch.zeros(2, 4, 3), lengths=torch.tensor([0, 5]))
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
