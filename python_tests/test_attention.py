# SPDX-License-Identifier: Apache-2.0
"""Softmax attention over states (DIEN eq. 8): the kernel against reference.py, its module."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import dien_ops
from dien_ops import functional, reference
from helpers import (
    assert_at_most_twice_torchs_error,
    assert_close,
    gradients,
    leaf,
    spread_lengths,
    with_threads,
)

# B, C (None: one target without an axis of its own), T, H, A
SIZES = [
    (8, None, 50, 36, 18), (3, 1, 1, 1, 1), (4, 3, 11, 7, 5), (2, 4, 9, 17, 3), (5, 9, 33, 40, 19),
    (0, None, 4, 3, 2), (0, 2, 4, 3, 2), (3, None, 0, 5, 4), (3, 5, 0, 5, 4), (2, 0, 3, 5, 4), (40, None, 3, 100, 8),
]  # fmt: skip
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
@pytest.mark.parametrize("sizes", SIZES)
def test_scores_and_gradients_are_those_of_the_equation(sizes, with_lengths):
    given = arguments(sizes)
    lengths = spread_lengths(sizes[0], sizes[2]) if with_lengths else None
    assert_close(results(functional, given, lengths), results(reference, given, lengths))


@pytest.mark.parametrize("sizes", [(30, None, 50, 36, 18), (4, 20, 50, 64, 64)])
def test_float32_errs_no_more_than_twice_as_torch_does(sizes):
    lengths = spread_lengths(sizes[0], sizes[2])

    def draw() -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        single = arguments(sizes, torch.float32)
        exact = [x.detach().double().requires_grad_() for x in single]
        return tuple(results(m, x, lengths) for m, x in ((functional, single), (reference, single), (reference, exact)))

    assert_at_most_twice_torchs_error(draw() for _ in range(3))


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


@pytest.mark.parametrize("targets", [1, 6])
def test_padding_is_never_read(targets):
    lengths = torch.tensor([0, 3, 7])
    clean = arguments((3, targets, 7, 6, 3))
    states = clean[0].detach().clone()
    for b, length in enumerate(lengths):
        states[b, length:] = torch.nan
    poisoned = [states.requires_grad_(), *clean[1:]]
    assert_close(results(functional, poisoned, lengths), results(functional, clean, lengths))


def test_large_logits_do_not_overflow():
    states = torch.tensor([[[1000.0], [999.0], [-1000.0]]])
    scores = functional.bilinear_attention(states, torch.ones(1, 1), torch.ones(1, 1))
    assert_close([scores], [torch.softmax(states[:, :, 0], -1)], 1e-6)


def test_several_targets_score_as_one_at_a_time():
    states, target, weight = arguments((3, 7, 20, 13, 5))
    together = functional.bilinear_attention(states, target, weight)
    alone = [functional.bilinear_attention(states, target[:, c], weight) for c in range(7)]
    assert_close([together], [torch.stack(alone, dim=1)])


def test_any_strides_are_accepted():
    given = arguments((4, 3, 9, 6, 5))
    strided = [torch.stack([x, x], dim=-1)[..., 0] for x in given]
    scores = functional.bilinear_attention(*given)
    assert_close([functional.bilinear_attention(*strided)], [scores])
    (expanded,) = torch.autograd.grad(scores[..., 0].sum(), given[0], retain_graph=True)
    dense = torch.zeros_like(scores)
    dense[..., 0] = 1
    assert_close([expanded], list(torch.autograd.grad(scores, given[0], dense)))


@pytest.mark.parametrize("sizes", [(3, None, 3, 2, 2), (2, 4, 2, 2, 1)])
def test_first_and_second_derivatives_agree_with_finite_differences(sizes):
    lengths = spread_lengths(sizes[0], sizes[2])

    def f(*tensors: Tensor) -> Tensor:
        return functional.bilinear_attention(*tensors, lengths=lengths)

    torch.autograd.gradcheck(f, arguments(sizes))
    torch.autograd.gradgradcheck(f, arguments(sizes))


def test_the_operators_pass_opcheck():
    states, target, weight = arguments((3, 2, 5, 4, 3), torch.float32)
    lengths = torch.tensor([5, 0, 2])
    for given in (None, lengths, lengths.int()):
        torch.library.opcheck(torch.ops.dien_ops.bilinear_attention.default, (states, target, weight, given, False))
    scores, projected = torch.ops.dien_ops.bilinear_attention(states, target, weight, lengths, False)
    backward = (
        leaf(3, 2, 5, dtype=torch.float32),
        states,
        target,
        weight,
        projected,
        scores.detach(),
        lengths,
        False,
    )
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
        (ValueError, "weight must have the dtype of states: expected torch.float32", {"weight": DOUBLES}),
        (ValueError, r"target must be 2-D or 3-D, got 1-D of shape \[5\]", {"target": torch.zeros(5)}),
        (ValueError, r"weight must be 2-D, got 1-D of shape \[3\]", {"weight": torch.zeros(3)}),
        (RuntimeError, r"weight must have shape \[3, 5\] \[H, A\], got \[5, 3\]", {"weight": torch.zeros(5, 3)}),
        (RuntimeError, "target must have the batch size of states, 2, got 3", {"target": torch.zeros(3, 5)}),
        (RuntimeError, r"lengths must have shape \[2\] \[B\], got \[3\]", {"lengths": INTEGERS[0, :3, 0]}),
        (RuntimeError, r"lengths must be in 0..4 \(T\), got 5 at row 1", {"lengths": torch.tensor([0, 5])}),
    ],
)  # fmt: skip
def test_a_wrong_argument_is_named(error, message, change):
    given = {"states": torch.zeros(2, 4, 3), "target": torch.zeros(2, 5), "weight": torch.zeros(3, 5)}
    with pytest.raises(error, match=message):
        functional.bilinear_attention(**(given | change))


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
