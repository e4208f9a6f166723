# SPDX-License-Identifier: Apache-2.0
"""Softmax attention over states (DIEN eq. 8): the kernels against reference.py, its module, the scores' way to the GRU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import dien_ops
from attention_cases import F64, arguments, results
from dien_ops import functional, reference
from helpers import (
    assert_at_most_twice_torchs_error,
    assert_close,
    begins_anywhere,
    gradients,
    leaf,
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
