# SPDX-License-Identifier: Apache-2.0
"""The auxiliary loss: against reference.py, and every way to call it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

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

EVERY_REDUCTION = pytest.mark.parametrize("reduction", ["paper", "mean", "authors"])


class Scorer(nn.Module):
    """A small scorer whose states and items differ in width."""

    def __init__(self, width: int, items: int) -> None:
        super().__init__()
        self.bilinear = nn.Bilinear(width, items, 1, dtype=torch.float64)

    def forward(self, states: Tensor, items: Tensor) -> Tensor:
        return self.bilinear(states.contiguous(), items.contiguous()).squeeze(-1)


def sequences(batch=5, steps=6, width=7, items=None, dtype=torch.float64) -> list[Tensor]:
    items = width if items is None else items
    return [leaf(batch, steps, n, dtype=dtype) for n in (width, items, items)]


def results(module, tensors: list[Tensor], **options) -> list[Tensor]:
    loss = module.auxiliary_loss(*tensors, **options)
    return [loss, *gradients([loss], tensors)]


def test_by_hand():
    states = torch.tensor([[[1.0], [2.0], [9.0]]])
    positives = torch.tensor([[[9.0], [3.0], [0.5]]])
    negatives = torch.tensor([[[9.0], [-1.0], [0.25]]])

    def nll(p: float) -> float:
        return -math.log(p)

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    expected = nll(sigmoid(1 * 3)) + nll(1 - sigmoid(1 * -1)) + nll(sigmoid(2 * 0.5)) + nll(1 - sigmoid(2 * 0.25))
    loss = functional.auxiliary_loss(states, positives, negatives)
    torch.testing.assert_close(loss, torch.tensor(expected))


@EVERY_REDUCTION
@pytest.mark.parametrize("masked", [True, False], ids=["lengths", "full"])
@pytest.mark.parametrize(
    "batch, steps, width",
    [(5, 6, 7), (3, 2, 1), (4, 1, 3), (1, 40, 16), (2, 9, 67), (0, 4, 3), (3, 0, 3), (3, 4, 0)],
)
def test_loss_and_gradients_are_the_references(reduction, masked, batch, steps, width):
    tensors = sequences(batch, steps, width)
    options = dict(reduction=reduction, lengths=spread_lengths(batch, steps) if masked else None)
    assert_close(results(functional, tensors, **options), results(reference, tensors, **options))


@EVERY_REDUCTION
def test_float32_is_as_good_as_torchs(reduction):
    def draw():
        low = sequences(64, 30, 36, dtype=torch.float32)
        exact = [x.detach().double().requires_grad_() for x in low]
        options = dict(reduction=reduction, lengths=spread_lengths(64, 30))
        return (
            results(functional, low, **options),
            results(reference, low, **options),
            results(reference, exact, **options),
        )

    assert_at_most_twice_torchs_error(draw() for _ in range(5))


@EVERY_REDUCTION
def test_a_scorer_module_is_the_references(reduction):
    scorer, tensors = Scorer(7, 4), sequences(items=4)
    options = dict(scorer=scorer, reduction=reduction, lengths=spread_lengths(5, 6))
    inputs = [*tensors, *scorer.parameters()]
    losses = [m.auxiliary_loss(*tensors, **options) for m in (functional, reference)]
    ours, theirs = ([loss, *gradients([loss], inputs)] for loss in losses)
    assert_close(ours, theirs)


def test_a_scorer_of_inner_products_is_inner():
    tensors, lengths = sequences(), spread_lengths(5, 6)
    inner = results(functional, tensors, lengths=lengths)
    scored = results(functional, tensors, lengths=lengths, scorer=lambda h, e: (h * e).sum(-1))
    assert_close(scored, inner)


@EVERY_REDUCTION
@pytest.mark.parametrize("scorer", ["inner", "module"])
def test_rows_of_length_0_and_1_contribute_nothing(reduction, scorer):
    options = dict(reduction=reduction, scorer="inner" if scorer == "inner" else Scorer(7, 7))
    tensors = sequences(2)
    for result in results(functional, tensors, lengths=torch.tensor([0, 1]), **options):
        assert not result.any()


@pytest.mark.parametrize("scorer", ["inner", "module"])
@pytest.mark.parametrize("filler", [math.nan, math.inf])
def test_what_lies_in_the_padding_does_not_matter(scorer, filler):
    lengths = torch.tensor([3, 0, 6, 1])
    clean = sequences(4)
    dirty = [x.detach().clone() for x in clean]
    for x in dirty:
        x[torch.arange(6) >= lengths.unsqueeze(1)] = filler
        x.requires_grad_()
    module = Scorer(7, 7)
    options = dict(lengths=lengths, scorer="inner" if scorer == "inner" else module)
    parameters = [] if scorer == "inner" else list(module.parameters())
    a, b = (functional.auxiliary_loss(*x, **options) for x in (clean, dirty))
    assert_close([b, *gradients([b], [*dirty, *parameters])], [a, *gradients([a], [*clean, *parameters])])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e2, 1e4, 1e15])
def test_huge_logits_give_finite_losses_and_gradients(dtype, size):
    states = torch.ones(2, 3, 1, dtype=dtype)
    items = torch.full((2, 3, 1), size, dtype=dtype)
    wrong = results(functional, [x.requires_grad_() for x in (states, -items, items.clone())])
    right = functional.auxiliary_loss(states, items, -items)
    assert all(x.isfinite().all() for x in wrong)
    torch.testing.assert_close(wrong[0], torch.tensor(4 * size, dtype=dtype))
    assert right < 1e-30


def test_tiny_losses_keep_their_relative_precision():
    """log1p(exp(-x)) is exp(-x) far out, where 1 + exp(-x) is 1."""
    for x in range(0, 81, 3):
        items = torch.full((1, 2, 1), float(x), dtype=torch.float64)
        loss = functional.auxiliary_loss(torch.ones_like(items), items, -items)
        expected = torch.tensor(2 * math.log1p(math.exp(-x)), dtype=torch.float64)
        torch.testing.assert_close(loss, expected, rtol=1e-14, atol=0)


def test_any_strides_and_integer_types_are_accepted():
    tensors = [x.detach() for x in sequences()]
    lengths = spread_lengths(5, 6)
    strided = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in tensors]
    strided[1] = tensors[1][:1, :, :1].expand(5, 6, 7)
    tensors[1] = strided[1].contiguous()
    expected = functional.auxiliary_loss(*tensors, lengths=lengths)
    assert torch.equal(functional.auxiliary_loss(*strided, lengths=lengths.int()), expected)


@EVERY_REDUCTION
def test_derivatives_pass_gradcheck(reduction):
    lengths = torch.tensor([4, 0, 2])

    def loss(*tensors):
        return functional.auxiliary_loss(*tensors, lengths=lengths, reduction=reduction)

    tensors = sequences(3, 4, 3)
    assert gradcheck(loss, tensors)
    assert gradgradcheck(loss, tensors)


def test_derivatives_of_a_scorer_pass_gradgradcheck():
    scorer = Scorer(3, 2)

    def loss(*tensors):
        return functional.auxiliary_loss(*tensors, lengths=torch.tensor([3, 2]), scorer=scorer)

    assert gradgradcheck(loss, sequences(2, 3, 3, 2))


def test_operators_pass_opcheck():
    tensors, lengths = sequences(), spread_lengths(5, 6)
    ops = torch.ops.dien_ops
    torch.library.opcheck(ops.checked_lengths, (lengths.int(), 6))
    for reduction in ("paper", "mean", "authors"):
        torch.library.opcheck(ops.auxiliary_inner_loss, (*tensors, lengths, reduction))
        _, logits = ops.auxiliary_inner_loss(*tensors, lengths, reduction)
        torch.library.opcheck(ops.auxiliary_inner_loss_backward, (leaf(), logits, *tensors, lengths, reduction))
        torch.library.opcheck(ops.auxiliary_loss_of_logits, (leaf(5, 2, 5), lengths, 6, reduction))
        torch.library.opcheck(ops.auxiliary_loss_of_logits_backward, (leaf(), leaf(5, 2, 5), lengths, 6, reduction))


@pytest.mark.parametrize("scorer", ["inner", "module"])
def test_compiles_to_one_graph_for_all_sizes(scorer):
    torch._dynamo.reset()
    module = dien_ops.AuxiliaryLoss("inner" if scorer == "inner" else Scorer(7, 7))
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, steps in [(5, 6), (3, 9)]:
        tensors, lengths = sequences(batch, steps), spread_lengths(batch, steps)
        eager, graph = module(*tensors, lengths=lengths), compiled(*tensors, lengths=lengths)
        assert_close([graph, *gradients([graph], tensors)], [eager, *gradients([eager], tensors)])


@pytest.mark.parametrize("scorer", ["inner", "module"])
def test_exports_with_dynamic_sizes(scorer):
    module = dien_ops.AuxiliaryLoss("inner" if scorer == "inner" else Scorer(7, 7), reduction="mean")
    batch, steps = torch.export.Dim("batch", min=2), torch.export.Dim("steps", min=3)
    shapes = {name: {0: batch, 1: steps} for name in ("states", "positives", "negatives")}
    exported = torch.export.export(
        module,
        tuple(sequences()),
        {"lengths": spread_lengths(5, 6)},
        dynamic_shapes={**shapes, "lengths": {0: batch}},
    )
    tensors, lengths = sequences(3, 8), spread_lengths(3, 8)
    assert_close([exported.module()(*tensors, lengths=lengths)], [module(*tensors, lengths=lengths)])


def test_the_number_of_threads_does_not_change_a_bit():
    tensors, lengths = sequences(300, 40, 36, dtype=torch.float32), spread_lengths(300, 40)
    one, two = (with_threads(n, lambda: results(functional, tensors, lengths=lengths)) for n in (1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_the_module_owns_its_scorer_and_backward_works_in_eval_mode():
    module = dien_ops.AuxiliaryLoss(Scorer(7, 7)).eval()
    assert len(list(module.parameters())) == 2
    assert "reduction='paper'" in repr(module)
    tensors, lengths = sequences(), spread_lengths(5, 6)
    loss = module(*tensors, lengths=lengths)
    assert torch.equal(loss, functional.auxiliary_loss(*tensors, lengths=lengths, scorer=module.scorer))
    loss.backward()
    assert all(p.grad is not None for p in module.parameters())


def test_a_scorer_may_run_in_lower_precision_under_autocast():
    scorer = nn.Bilinear(7, 7, 1)
    tensors = sequences(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = functional.auxiliary_loss(
            *tensors, scorer=lambda h, e: nn.functional.linear(h * e, scorer.weight[:, 0]).squeeze(-1)
        )
    assert loss.dtype == torch.float32


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(states=None), TypeError, "states must be a Tensor, got NoneType"),
        (dict(positives=None), TypeError, "positives must be a Tensor, got NoneType"),
        (dict(negatives=None), TypeError, "negatives must be a Tensor, got NoneType"),
        (dict(lengths=[1, 2]), TypeError, "lengths must be a Tensor, got list"),
        (dict(states=torch.zeros(2, 3)), ValueError, "states must be 3-D, got 2-D"),
        (
            dict(states=torch.zeros(2, 3, 4).long()),
            ValueError,
            "states must be float32, float64, bfloat16 or float16, got int64",
        ),
        (
            dict(positives=torch.zeros(2, 3, 4).double()),
            ValueError,
            "positives must have the dtype of states",
        ),
        (
            dict(positives=torch.zeros(2, 2, 4)),
            RuntimeError,
            r"positives must have shape \[2, 3, 4\] \[B, T, E\]",
        ),
        (
            dict(negatives=torch.zeros(2, 3, 5)),
            RuntimeError,
            r"negatives must have shape \[2, 3, 4\] \[B, T, E\]",
        ),
        (dict(lengths=torch.tensor([1])), RuntimeError, r"lengths must have shape \[2\] \[B\]"),
        (dict(lengths=torch.tensor([1.0, 1.0])), ValueError, "lengths must be int32 or int64"),
        (dict(lengths=torch.tensor([1, 4])), RuntimeError, r"lengths must be in 0..3 \(T\), got 4 at row 1"),
        (
            dict(lengths=torch.tensor([-1, 3])),
            RuntimeError,
            r"lengths must be in 0..3 \(T\), got -1 at row 0",
        ),
        (
            dict(lengths=torch.tensor([1, 4]), scorer=lambda h, e: (h * e).sum(-1)),
            RuntimeError,
            "got 4 at row 1",
        ),
        (dict(scorer="mlp"), ValueError, "scorer must be one of 'inner', got 'mlp'"),
        (
            dict(scorer=lambda h, e: h * e),
            RuntimeError,
            r"the scorer's result must have shape \[2, 2\] \[B, T-1\]",
        ),
        (dict(reduction="sum"), ValueError, "reduction must be one of 'paper', 'mean', 'authors', got 'sum'"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    arguments = {name: torch.zeros(2, 3, 4) for name in ("states", "positives", "negatives")}
    with pytest.raises(error, match=message):
        functional.auxiliary_loss(**{**arguments, **change})


class NormedScorer(nn.Module):
    """A scorer that writes when it is called."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width, dtype=torch.float64)

    def forward(self, states: Tensor, items: Tensor) -> Tensor:
        return self.norm((states * items).flatten(0, 1)).sum(-1).view(states.shape[:2])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_lengths_out_of_range_are_refused_before_a_scorer_runs(compiled, dtype):
    torch._dynamo.reset()
    scorer = NormedScorer(7)
    module = dien_ops.AuxiliaryLoss(scorer)
    call = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager") if compiled else module
    call(*sequences(2), lengths=torch.tensor([1, 6], dtype=dtype))
    before = [x.clone() for x in scorer.norm.buffers()]
    assert before[-1] == 2  # batches: the clicked items and the sampled ones
    for wrong in (-1, 7):
        with pytest.raises(RuntimeError, match=rf"lengths must be in 0..6 \(T\), got {wrong} at row 1"):
            call(*sequences(2), lengths=torch.tensor([1, wrong], dtype=dtype))
        assert all(torch.equal(a, b) for a, b in zip(scorer.norm.buffers(), before, strict=True))


def test_inner_products_of_different_widths_are_refused():
    with pytest.raises(ValueError, match="needs items as wide as states, got H=7 and E=4"):
        functional.auxiliary_loss(*sequences(items=4))


def test_the_module_refuses_unknown_names_at_once():
    with pytest.raises(ValueError, match="scorer must be one of"):
        dien_ops.AuxiliaryLoss("mlp")
    with pytest.raises(ValueError, match="reduction must be one of"):
        dien_ops.AuxiliaryLoss(reduction="sum")
