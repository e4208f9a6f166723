# SPDX-License-Identifier: Apache-2.0
"""Softmax attention over states (DIEN eq. 8): the kernels against reference.py, its module, the scores' way to the GRU."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import dien_ops
from dien_ops import _precision, functional, reference
from helpers import (
    assert_at_most_twice_torchs_error,
    assert_close,
    begins_anywhere,
    gradients,
    leaf,
    rounded_to_tf32,
    run_python,
    second_derivatives,
    spread_lengths,
    with_threads,
)

# B, C (None: one target without an axis of its own), T, H, A
SIZES = [
    (8, None, 50, 36, 18), (3, 1, 1, 1, 1), (4, 3, 11, 7, 5), (2, 4, 9, 17, 3), (5, 9, 33, 40, 19),
    (0, None, 4, 3, 2), (0, 2, 4, 3, 2), (3, None, 0, 5, 4), (3, 5, 0, 5, 4), (2, 0, 3, 5, 4), (40, None, 3, 100, 8),
    (3, 2, 4, 0, 3), (3, 6, 4, 0, 3), (3, 2, 4, 5, 0), (3, 6, 4, 5, 0),
]  # fmt: skip
# What the CUDA kernels take apart: steps, targets, columns and rows of several blocks, and rows of several passes.
LARGE_SIZES = [(2, 6, 70, 36, 70), (2, 37, 5, 70, 4), (3, 2, 40, 140, 5), (300, None, 2, 3, 5), (33, 5, 3, 6, 4)]
LOW = [torch.float32, torch.bfloat16, torch.float16]
F64 = torch.float64


def arguments(sizes: tuple[int, int | None, int, int, int], dtype: torch.dtype = F64) -> list[Tensor]:
    B, C, T, H, A = sizes
    return [
        leaf(B, T, H, dtype=dtype),
        leaf(B, *([] if C is None else [C]), A, dtype=dtype),
        leaf(H, A, dtype=dtype),
    ]


def results(module, arguments: list[Tensor], lengths: Tensor | None) -> list[Tensor]:
    scores = module.bilinear_attention(*arguments, lengths=lengths)
    return [scores.detach(), *gradients([scores], arguments)]


@pytest.mark.parametrize("with_lengths", [False, True])
@pytest.mark.parametrize("sizes", SIZES + LARGE_SIZES)
def test_scores_and_gradients_are_those_of_the_equation(sizes, with_lengths):
    given = arguments(sizes)
    lengths = spread_lengths(sizes[0], sizes[2]) if with_lengths else None
    assert_close(results(functional, given, lengths), results(reference, given, lengths))


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("sizes", [(12, None, 30, 36, 18), (4, 3, 17, 18, 7), (4, 20, 30, 64, 24), (5, 7, 19, 13, 9)])
def test_low_precision_errs_no_more_than_twice_as_torch_does(sizes, dtype):
    lengths = spread_lengths(sizes[0], sizes[2])

    def draw() -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        low = arguments(sizes, dtype)
        exact = [x.detach().double().requires_grad_() for x in low]
        return tuple(results(m, x, lengths) for m, x in ((functional, low), (reference, low), (reference, exact)))

    assert_at_most_twice_torchs_error(draw() for _ in range(3))


@pytest.mark.parametrize("targets", [None, 3, 6])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_float32_weight_goes_with_16_bit_states(dtype, targets):
    states, target, weight = arguments((5, targets, 9, 8, 6), dtype)
    wide = weight.detach().float().requires_grad_()
    scores = functional.bilinear_attention(states, target, wide)
    assert scores.dtype == dtype
    assert torch.equal(scores, functional.bilinear_attention(states, target, weight))
    grads = gradients([scores], [states, target, wide])
    assert [g.dtype for g in grads] == [dtype, dtype, torch.float32]
    assert grads[2].abs().max() > 0


# ------------------------------------------------------------------------------------------------------------ autocast


@pytest.mark.parametrize("targets", [None, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_what_it_casts_of_nn_linear_but_for_the_weight(dtype, targets):
    given = arguments((5, targets, 9, 8, 6), torch.float32)
    device = given[0].device.type
    with torch.autocast(device, dtype=dtype):
        assert torch.nn.functional.linear(given[1], given[2]).dtype == dtype
        scores = functional.bilinear_attention(*given)
    assert scores.dtype == dtype
    low = [x.detach().to(dtype).requires_grad_() for x in given[:2]]
    expected = functional.bilinear_attention(*low, given[2])
    assert torch.equal(scores, expected)
    grads = gradients([scores], given)
    assert all(g.dtype == torch.float32 for g in grads)
    for grad, other in zip(grads, gradients([expected], [*low, given[2]]), strict=True):
        assert torch.equal(grad, other.float())


def test_autocast_takes_a_weight_of_any_16_bits_and_leaves_float64_alone():
    given = arguments((3, None, 4, 5, 2), torch.float32)
    wide = [x.double() for x in given]
    with torch.autocast(given[0].device.type, dtype=torch.bfloat16):
        mixed = functional.bilinear_attention(given[0], given[1].bfloat16(), given[2].half())
        exact = functional.bilinear_attention(*wide)
    assert mixed.dtype == torch.bfloat16
    assert exact.dtype == F64
    assert torch.equal(exact, functional.bilinear_attention(*wide))


# ---------------------------------------------------------------------------------------------------------- properties


def test_hand_worked_scores():
    # h = (1, 0), (0, 1), (1, 1); W e = (ln 2, ln 3): the exponentials are 2, 3, 6
    states = torch.tensor([[[1.0, 0], [0, 1], [1, 1]]], dtype=F64)
    weight = torch.tensor([[2.0], [3.0]], dtype=F64).log()
    scores = functional.bilinear_attention(states, torch.ones(1, 1, dtype=F64), weight)
    assert_close([scores], [torch.tensor([[2.0, 3, 6]], dtype=F64) / 11])


@pytest.mark.parametrize("targets", [1, 6])
def test_scores_of_a_sequence_sum_to_one_and_its_padding_scores_zero(targets):
    lengths = torch.tensor([0, 1, 5, 7])
    states, target, weight = arguments((4, targets, 7, 6, 3))
    scores = functional.bilinear_attention(states, target, weight, lengths=lengths)
    assert_close([scores.sum(-1)], [(lengths > 0).double().unsqueeze(1).expand(4, targets)])
    for b, length in enumerate(lengths):
        assert (scores[b, :, length:] == 0).all()


@pytest.mark.parametrize("filler", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", [F64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("targets", [1, 3, 6, 40])
def test_padding_is_never_read(targets, dtype, filler):
    lengths = torch.tensor([0, 3, 7, 8])
    states, target, weight = arguments((4, targets, 8, 6, 3), dtype)
    dirty = states.detach().clone()
    grad = torch.randn(4, targets, 8).to(dtype)
    dirty_grad = grad.clone()
    for b, length in enumerate(lengths):
        dirty[b, length:] = filler
        dirty_grad[b, :, length:] = filler

    def run(states: Tensor, grad: Tensor) -> list[Tensor]:
        inputs = [states.requires_grad_(), target, weight]
        scores = functional.bilinear_attention(*inputs, lengths=lengths)
        return [scores, *torch.autograd.grad(scores, inputs, grad)]

    for clean_result, dirty_result in zip(run(states, grad), run(dirty, dirty_grad), strict=True):
        assert torch.equal(clean_result, dirty_result)


@pytest.mark.parametrize("targets", [1, 3, 6])
def test_a_bad_number_spoils_its_own_sequence_alone(targets):
    states, target, weight = arguments((3, targets, 70, 6, 3))
    lengths = torch.tensor([70, 68, 2])
    clean = results(functional, [states, target, weight], lengths)
    with torch.no_grad():
        target[1, 0, 1] = torch.nan
    scores, grad_states, grad_target, grad_weight = results(functional, [states, target, weight], lengths)
    assert scores[1, 0, :68].isnan().all() and (scores[1, 0, 68:] == 0).all()
    assert grad_states[1, :68].isnan().all() and (grad_states[1, 68:] == 0).all()
    assert grad_target[1, 0].isnan().all() and grad_weight.isnan().any()
    for b in (0, 2):
        assert_close([x[b] for x in (scores, grad_states, grad_target)], [x[b] for x in clean[:3]])


@pytest.mark.parametrize("targets", [1, 6])
@pytest.mark.parametrize("sign", [1, -1])
def test_large_logits_do_not_overflow(sign, targets):
    states = sign * torch.tensor([[[1000.0], [999.0], [-1000.0]]])
    scores = functional.bilinear_attention(states, torch.ones(1, targets, 1), torch.ones(1, 1))
    assert_close([scores], [torch.softmax(states[:, :, 0], -1).expand(1, targets, 3)], 1e-6)


def test_several_targets_score_as_one_at_a_time():
    states, target, weight = arguments((3, 7, 20, 13, 5))
    together = functional.bilinear_attention(states, target, weight)
    alone = [functional.bilinear_attention(states, target[:, c], weight) for c in range(7)]
    assert_close([together], [torch.stack(alone, dim=1)])
    some = functional.bilinear_attention(states, target[:, :3], weight)
    assert_close([some], [together[:, :3]])


@pytest.mark.parametrize("targets", [None, 3, 6])
def test_any_strides_are_accepted(targets):
    given = arguments((4, targets, 9, 6, 5))
    strided = [torch.stack([x, x], dim=-1)[..., 0] for x in given]
    scores = functional.bilinear_attention(*given)
    assert_close([functional.bilinear_attention(*strided)], [scores])
    permuted = [given[0].transpose(0, 2).contiguous().transpose(0, 2), given[1], given[2].T.contiguous().T]
    assert_close([functional.bilinear_attention(*permuted)], [scores])
    one_for_all = given[0][:1].expand(4, 9, 6), given[1][:1].expand_as(given[1]), given[2]
    assert_close([functional.bilinear_attention(*one_for_all)], [scores[:1].expand_as(scores)])
    (expanded,) = torch.autograd.grad(scores[..., 0].sum(), given[0], retain_graph=True)
    dense = torch.zeros_like(scores)
    dense[..., 0] = 1
    assert_close([expanded], list(torch.autograd.grad(scores, given[0], dense)))


@pytest.mark.parametrize("dtype", [F64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("targets", [None, 3, 6])
def test_states_that_lie_time_first_are_read_and_differentiated_where_they_are(targets, dtype):
    given = arguments((4, targets, 9, 6, 5), dtype)
    lengths = spread_lengths(4, 9)
    time_first = given[0].detach().transpose(0, 1).contiguous().requires_grad_()
    scores = functional.bilinear_attention(time_first.transpose(0, 1), *given[1:], lengths=lengths)
    grads = gradients([scores], [time_first, *given[1:]])
    expected, *others = results(functional, given, lengths)
    assert torch.equal(scores, expected)
    assert grads[0].is_contiguous()
    for grad, other in zip([grads[0].transpose(0, 1), *grads[1:]], others, strict=True):
        assert torch.equal(grad, other)


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("targets", [None, 4, 6])
def test_contiguous_tensors_may_begin_anywhere(targets, dtype):
    given = arguments((3, targets, 10, 8, 6), dtype)
    moved = [begins_anywhere(x) for x in given]
    for result, expected in zip(results(functional, moved, None), results(functional, given, None), strict=True):
        assert torch.equal(result, expected)


@pytest.mark.parametrize("sizes", [(3, None, 3, 2, 2), (2, 4, 2, 2, 1), (2, 6, 3, 2, 1)])
def test_first_and_second_derivatives_agree_with_finite_differences(sizes):
    lengths = spread_lengths(sizes[0], sizes[2])

    def f(*tensors: Tensor) -> Tensor:
        return functional.bilinear_attention(*tensors, lengths=lengths)

    torch.autograd.gradcheck(f, arguments(sizes))
    torch.autograd.gradgradcheck(f, arguments(sizes))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_second_derivatives_of_16_bit_states_are_computed_in_float32(dtype):
    states, target, weight = arguments((3, 4, 5, 6, 2), dtype)
    low = [states, target, weight.detach().float().requires_grad_()]
    wide = [x.detach().float().requires_grad_() for x in low]
    found, expected = (second_derivatives([functional.bilinear_attention(*x)], x) for x in (low, wide))
    assert [x.dtype for x in found] == [dtype, dtype, torch.float32]
    assert_close(found[:2], [x.to(dtype) for x in expected[:2]], torch.finfo(dtype).eps)
    assert_close(found[2:], expected[2:], 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("time_first", [False, True])
def test_the_operators_pass_opcheck(time_first, dtype):
    states, target, weight = arguments((3, 2, 5, 4, 3), dtype)
    weight = weight.detach().float().requires_grad_()
    if time_first:
        states = states.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    lengths = torch.tensor([5, 0, 2])
    for given in (None, lengths, lengths.int()):
        torch.library.opcheck(torch.ops.dien_ops.bilinear_attention.default, (states, target, weight, given, False))
    scores, projected = torch.ops.dien_ops.bilinear_attention(states, target, weight, lengths, False)
    backward = (leaf(3, 2, 5, dtype=dtype), states, target, weight, projected, scores.detach(), lengths, False)
    torch.library.opcheck(torch.ops.dien_ops.bilinear_attention_backward.default, backward)


def test_it_compiles_as_a_whole_with_dynamic_shapes():
    module = dien_ops.BilinearAttention(6, 3)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, steps in ((3, 4), (5, 7)):
        states, target = leaf(batch, steps, 6, dtype=torch.float32), leaf(batch, 3, dtype=torch.float32)
        lengths = spread_lengths(batch, steps)
        scores, expected = compiled(states, target, lengths=lengths), module(states, target, lengths=lengths)
        inputs = [states, target, module.weight]
        assert_close([scores, *gradients([scores], inputs)], [expected, *gradients([expected], inputs)], 1e-6)


def test_it_exports():
    module = dien_ops.BilinearAttention(6, 3)
    batch, steps = torch.export.Dim("batch", min=1), torch.export.Dim("steps", min=1)
    shapes = {"states": {0: batch, 1: steps}, "target": {0: batch}}
    program = torch.export.export(module, (torch.randn(4, 5, 6), torch.randn(4, 3)), dynamic_shapes=shapes)
    states, target = torch.randn(2, 9, 6), torch.randn(2, 3)
    assert_close([program.module()(states, target)], [module(states, target)])


@pytest.mark.cpu_kernels
@pytest.mark.parametrize("sizes", [(200, None, 20, 36, 18), (7, 30, 20, 36, 18)])
def test_the_number_of_threads_changes_no_bit(sizes):
    given, lengths = arguments(sizes, torch.float32), spread_lengths(sizes[0], sizes[2])

    def run() -> list[Tensor]:
        return results(functional, given, lengths)

    for one, two in zip(with_threads(1, run), with_threads(2, run), strict=True):
        assert torch.equal(one, two)


def test_logits_of_a_new_module_have_unit_variance():
    module = dien_ops.BilinearAttention(64, 32)
    logits = torch.randn(4000, 64) @ module.weight.detach() @ torch.randn(32, 400)
    assert logits.var().item() == pytest.approx(1, rel=0.15)


INTEGERS, DOUBLES = torch.zeros(2, 4, 3, dtype=torch.long), torch.zeros(3, 5, dtype=F64)


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (TypeError, "target must be a Tensor, got NoneType", {"target": None}),
        (ValueError, r"states must be 3-D, got 2-D of shape \[4, 3\]", {"states": torch.zeros(4, 3)}),
        (ValueError, "states must be float32, float64, bfloat16 or float16, got int64", {"states": INTEGERS}),
        (ValueError, "weight must have the dtype of states: expected torch.float32, got", {"weight": DOUBLES}),
        (ValueError, "target must have the dtype of states: expected torch.float32, got", {"target": DOUBLES[:2]}),
        (TypeError, "states must be a Tensor, got NoneType", {"states": None}),
        (TypeError, "weight must be a Tensor, got NoneType", {"weight": None}),
        (ValueError, r"target must be 2-D or 3-D, got 1-D of shape \[5\]", {"target": torch.zeros(5)}),
        (ValueError, r"weight must be 2-D, got 1-D of shape \[3\]", {"weight": torch.zeros(3)}),
        (RuntimeError, r"weight must have shape \[3, 5\] \[H, A\], got \[5, 3\]", {"weight": torch.zeros(5, 3)}),
        (RuntimeError, "target must have the batch size of states, 2, got 3", {"target": torch.zeros(3, 5)}),
        (RuntimeError, r"lengths must have shape \[2\] \[B\], got \[3\]", {"lengths": INTEGERS[0, :3, 0]}),
    ],
)  # fmt: skip
def test_a_wrong_argument_is_named(error, message, change):
    given = {"states": torch.zeros(2, 4, 3), "target": torch.zeros(2, 5), "weight": torch.zeros(3, 5)}
    given |= {name: x.to(given["states"].device) if isinstance(x, Tensor) else x for name, x in change.items()}
    with pytest.raises(error, match=message):
        functional.bilinear_attention(**given)


@pytest.mark.not_on_cuda(reason="a kernel finds it there, and the process loses the GPU: see the end of this file")
@pytest.mark.parametrize("wrong", [-1, 5])
def test_a_length_outside_of_the_steps_is_named(wrong):
    with pytest.raises(RuntimeError, match=rf"lengths must be in 0..4 \(T\), got {wrong} at row 1"):
        functional.bilinear_attention(
            torch.zeros(2, 4, 3), torch.zeros(2, 5), torch.zeros(3, 5), lengths=torch.tensor([0, wrong])
        )


def test_what_autocast_makes_of_a_wrong_argument_is_named_too():
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        with pytest.raises(TypeError, match="target must be a Tensor, got NoneType"):
            functional.bilinear_attention(torch.zeros(2, 4, 3), None, torch.zeros(3, 5))
        with pytest.raises(
            ValueError, match=r"weight must have the dtype of states: expected torch\.bfloat16 or torch\.float32"
        ):
            functional.bilinear_attention(torch.zeros(2, 4, 3), torch.zeros(2, 5), torch.zeros(3, 5, dtype=F64))


@pytest.mark.parametrize(
    ("error", "message", "sizes"),
    [
        (ValueError, "hidden_size must be greater than zero, got 0", (0, 3)),
        (ValueError, "target_size must be greater than zero, got -1", (3, -1)),
        (TypeError, "hidden_size must be an int, got float", (3.0, 3)),
        (TypeError, "target_size must be an int, got NoneType", (3, None)),
    ],
)
def test_the_module_refuses_a_wrong_size(error, message, sizes):
    with pytest.raises(error, match=message):
        dien_ops.BilinearAttention(*sizes)


# --------------------------------------------------------------------------------- the scores' way to the attentional GRU


class Created(TorchDispatchMode):
    """Notes what torch's own operators give that is no view: name and number of elements."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.namespace != "dien_ops" and not any(r.alias_info for r in func._schema.returns):
            results = result if isinstance(result, (tuple, list)) else [result]
            self.found += [(str(func), x.numel()) for x in results if isinstance(x, Tensor)]
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("targets", [None, 4, 6])
@pytest.mark.parametrize("batch_first", [True, False])
def test_between_attention_and_attentional_gru_nothing_of_the_scores_size_is_made(batch_first, targets, dtype):
    batch, steps, hidden = 3, 7, 5
    attention = dien_ops.BilinearAttention(hidden, 2, dtype=dtype)
    gru = dien_ops.AUGRU(hidden, 8, batch_first=batch_first, dtype=dtype)
    x = leaf(*([batch, steps] if batch_first else [steps, batch]), hidden, dtype=dtype)
    target = leaf(batch, *([] if targets is None else [targets]), 2, dtype=dtype)
    lengths = torch.tensor([7, 0, 4])

    def step() -> list[Tensor]:
        scores = attention(x if batch_first else x.transpose(0, 1), target, lengths=lengths)
        output, h_n = gru(x, scores if batch_first else scores.movedim(-1, 0), lengths=lengths)
        inputs = [x, target, *attention.parameters(), *gru.parameters()]
        return [output, *torch.autograd.grad([output, h_n], inputs, [torch.ones_like(y) for y in (output, h_n)])]

    scores_size = batch * (targets or 1) * steps
    with Created() as created:
        results = step()
    assert not [found for found in created.found if found[1] in (batch * steps, scores_size)], created.found

    # and no operator makes one inside
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, record_shapes=True) as profile:
        step()
    sizes = {batch * steps, scores_size, batch * steps * hidden}
    copies = [
        (event.name, event.input_shapes)
        for event in profile.events()
        if event.name in ("aten::copy_", "aten::clone", "aten::contiguous")
        and any(torch.Size(shape).numel() in sizes for shape in event.input_shapes[:1])
    ]
    converts = dtype == torch.bfloat16 and x.device.type == "cpu"  # the CPU kernels compute in float32
    assert converts or not copies

    # the same numbers as from scores of a contiguous copy
    scores = attention(x if batch_first else x.transpose(0, 1), target, lengths=lengths).detach()
    copied = (scores if batch_first else scores.movedim(-1, 0)).contiguous()
    assert torch.equal(gru(x, copied, lengths=lengths)[0], results[0])


@pytest.mark.parametrize("targets", [None, 4])
@pytest.mark.parametrize("batch_first", [True, False])
def test_attention_in_the_other_layout_has_its_gradient_in_that_layout(batch_first, targets):
    batch, steps = 3, 7
    gru = dien_ops.AUGRU(5, 8, batch_first=batch_first, dtype=F64)
    x = leaf(*([batch, steps] if batch_first else [steps, batch]), 5)
    rows = [batch] if targets is None else [batch, targets]
    ours, other = ([*rows, steps], [steps, *rows])[:: 1 if batch_first else -1]
    scores = leaf(*other, low=0)
    moved = scores.movedim(0, -1) if batch_first else scores.movedim(-1, 0)
    assert list(moved.shape) == ours
    lengths = torch.tensor([7, 0, 4])
    output, h_n = gru(x, moved, lengths=lengths)
    expected = gru(x, moved.contiguous(), lengths=lengths)
    assert_close([output, h_n], expected)
    found, wanted = (gradients(y, [scores, x, *gru.parameters()]) for y in ((output, h_n), expected))
    assert_close(found, wanted)
    assert found[0].is_contiguous()
    torch.library.opcheck(
        torch.ops.dien_ops.gru_backward.default,
        (
            torch.randn_like(output), torch.randn_like(h_n)[0], x, moved.detach(), None,
            *(p.detach() for p in gru.parameters()), lengths,
            *torch.ops.dien_ops.gru(
                x, moved, None, *gru.parameters(), lengths, "paper", True, batch_first, False, False, True
            )[::2], "paper", True, batch_first, False, False,
        ),
        test_utils=["test_schema", "test_faketensor"],
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------- the CUDA kernels alone

ON_CUDA = pytest.mark.usefixtures("cuda_kernels")


class Tf32Product(torch.autograd.Function):
    """x y of float64 as a matrix unit makes it, and its gradients: operands of 11 bits, sums as good as float64's."""

    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(x, y)
        return rounded_to_tf32(x) @ rounded_to_tf32(y)

    @staticmethod
    def backward(ctx, grad):
        x, y = map(rounded_to_tf32, ctx.saved_tensors)
        grad = rounded_to_tf32(grad)
        return grad @ y.transpose(-1, -2), x.transpose(-1, -2) @ grad


@ON_CUDA
@pytest.mark.parametrize("sizes", [(5, None, 20, 36, 18), (4, 9, 30, 20, 12), (3, 40, 9, 33, 7)])
def test_tf32_errs_at_most_twice_as_much_as_its_rounding(sizes, monkeypatch):
    monkeypatch.setattr(_precision, "allow_tf32", lambda input, backend: input.dtype == torch.float32)
    batch, size = sizes[0], sizes[4]

    class Rounded:
        @staticmethod
        def bilinear_attention(states, target, weight, lengths):
            several = target.view(batch, -1, size)
            projected = Tf32Product.apply(several.flatten(0, 1), weight.T).view(batch, -1, weight.size(0))
            scores = torch.softmax(Tf32Product.apply(projected, states.transpose(1, 2)), -1)
            return scores if target.dim() == 3 else scores.squeeze(1)

    def draw():
        low = arguments(sizes, torch.float32)
        exact = [x.detach().double().requires_grad_() for x in low]
        rounded = [x.float() for x in results(Rounded, exact, None)]
        return results(functional, low, None), rounded, results(reference, exact, None)

    assert_at_most_twice_torchs_error(draw() for _ in range(5))


@ON_CUDA
@pytest.mark.parametrize("sizes", [(5, None, 20, 36, 18), (4, 9, 30, 20, 12)])
def test_float32_is_rounded_to_tf32_only_where_that_is_allowed(sizes, monkeypatch):
    given = arguments(sizes, torch.float32)
    exact = results(reference, [x.detach().double().requires_grad_() for x in given], None)
    errors = []
    for allowed in (False, True):
        monkeypatch.setattr(_precision, "allow_tf32", lambda input, backend, allowed=allowed: allowed)
        pairs = zip(results(functional, given, None), exact, strict=True)
        errors.append(max(float((a - e).abs().max() / e.abs().max()) for a, e in pairs))
    assert errors[0] < 5e-6 and 20 * errors[0] < errors[1]


@pytest.mark.parametrize(
    "sizes, shared_bytes",
    [
        ((2, 3, 1600, 4, 3), 24 << 10),  # too many steps
        ((2, 40, 120, 6, 3), 24 << 10),
        ((2, 9, 400, 6, 3), 24 << 10),
        ((2, 3, 5, 3000, 3), 32 << 10),  # too large a state
    ],
)
def test_what_does_not_fit_on_the_chip_is_in_global_memory(sizes, shared_bytes, set_executor):
    given, lengths = arguments(sizes, torch.float32), spread_lengths(sizes[0], sizes[2])
    set_executor(check=False)
    expected = results(functional, given, lengths)
    set_executor(shared_bytes=shared_bytes)  # finds blocks that share their part of it, too
    found = results(functional, given, lengths)
    if sizes[3] < 3000:
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    else:  # as products of tiles
        assert not all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert_close(found, expected, 1e-5)


@pytest.mark.parametrize("targets", [1, 6])
def test_blocks_that_run_together_do_not_share_their_part_of_global_memory(targets, on_device):
    # 240 KB of logits for each target, which no GPU of today has on the chip; the executor runs one block after the other
    given, lengths = arguments((150, targets, 30_000, 4, 3)), torch.arange(150) * 200
    assert_close(results(functional, given, lengths), results(reference, given, lengths))


ORDERED_SIZES = [(3, None, 9, 10, 6), (3, 4, 9, 140, 5), (2, 7, 70, 9, 5), (2, 34, 9, 9, 5), (130, 1, 2, 3, 2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_do_not_depend_on_the_order_of_threads(dtype, set_executor, monkeypatch):
    monkeypatch.setattr(_precision, "allow_tf32", lambda input, backend: input.dtype == torch.float32)
    every = [(arguments(sizes, dtype), spread_lengths(sizes[0], sizes[2])) for sizes in ORDERED_SIZES]
    expected = [results(functional, *one) for one in every]
    for order, seed in [("in_order", 0), ("reverse", 0), *itertools.product(["shuffled", "skewed"], range(2))]:
        set_executor(order=order, seed=seed)
        for one, same in zip(every, expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(results(functional, *one), same, strict=True))


@ON_CUDA
@pytest.mark.parametrize("sizes", [(3, None, 9, 10, 6), (7, 40, 9, 10, 5), (7, 40, 10, 9, 5), (7, 5, 70, 8, 4)])
def test_memory_that_nobody_wrote_is_never_read(sizes):
    given, lengths = arguments(sizes), spread_lengths(sizes[0], sizes[2])
    torch.use_deterministic_algorithms(True)  # fills such memory with NaN
    try:
        found = results(functional, given, lengths)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_close(found, results(reference, given, lengths))


def step(given: list[Tensor], lengths: Tensor) -> list[Tensor]:
    """As results gives it, but without anything from the CPU."""
    scores = functional.bilinear_attention(*given, lengths=lengths)
    return [scores, *torch.autograd.grad(scores, given, torch.ones_like(scores))]


@pytest.mark.parametrize("targets", [1, 40])
def test_a_training_step_replays_from_a_cuda_graph(on_device, targets):
    sizes = (40, targets, 9, 36, 18)
    given, lengths = arguments(sizes, torch.float32), spread_lengths(40, 9)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(given, lengths)  # allocations and modules before the capture
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(given, lengths)
    other, other_lengths = arguments(sizes, torch.float32), spread_lengths(40, 9)
    with torch.no_grad():
        for to, x in zip([*given, lengths], [*other, other_lengths], strict=True):
            to.copy_(x)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, step(other, other_lengths), strict=True))


def test_nothing_waits_for_the_device(on_device):
    given, lengths = arguments((9, 6, 9, 36, 18), torch.float32), spread_lengths(9, 9)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(given, lengths)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_length_beyond_the_steps_is_named_before_the_context_is_lost(on_device):
    code = """
import torch, dien_ops
attention = dien_ops.BilinearAttention(3, 5).cuda()
attention(torch.zeros(2, 4, 3, device="cuda"), torch.zeros(2, 5, device="cuda"), lengths=torch.tensor([4, 7]).cuda())
torch.cuda.synchronize()
"""
    done = run_python(code)
    assert "lengths must be in 0..4 (T), got 7 at row 1" in done.stdout and "device-side assert" in done.stderr
