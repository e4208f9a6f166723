# SPDX-License-Identifier: Apache-2.0
"""The auxiliary loss: against reference.py, and every way to call it."""

from __future__ import annotations

import itertools
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
    begins_anywhere,
    captured,
    gradients,
    leaf,
    run_python,
    second_derivatives,
    spread_lengths,
    waiting_is_an_error,
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
    [
        (5, 6, 7), (3, 2, 1), (4, 1, 3), (1, 40, 16), (2, 9, 67), (0, 4, 3), (3, 0, 3), (3, 4, 0),
        (90, 9, 4), (3, 4, 140), (260, 2, 3), (2, 30, 33), (1, 1, 1),
    ],
)  # fmt: skip
def test_loss_and_gradients_are_the_references(reduction, masked, batch, steps, width):
    tensors = sequences(batch, steps, width)
    options = dict(reduction=reduction, lengths=spread_lengths(batch, steps) if masked else None)
    assert_close(results(functional, tensors, **options), results(reference, tensors, **options))


@EVERY_REDUCTION
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [36, 18, 5])
def test_low_precision_is_as_good_as_torchs(width, dtype, reduction):
    def draw():
        low = sequences(24, 20, width, dtype=dtype)
        exact = [x.detach().double().requires_grad_() for x in low]
        options = dict(reduction=reduction, lengths=spread_lengths(24, 20))
        return (
            results(functional, low, **options),
            results(reference, low, **options),
            results(reference, exact, **options),
        )

    assert_at_most_twice_torchs_error(draw() for _ in range(5))


# ------------------------------------------------------------------------------------------------------------- dtypes


@pytest.mark.parametrize("scorer", ["inner", "function"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_the_loss_has_the_dtype_of_states_and_under_autocast_that_of_computing(dtype, scorer):
    tensors = sequences(dtype=dtype)
    scorer = "inner" if scorer == "inner" else lambda h, e: (h * e).sum(-1)
    loss = functional.auxiliary_loss(*tensors, scorer=scorer)
    assert loss.dtype == dtype
    with torch.autocast(loss.device.type, dtype=torch.bfloat16):
        wide = functional.auxiliary_loss(*tensors, scorer=scorer)
    assert wide.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(wide.to(dtype), loss)
    assert [g.dtype for g in gradients([wide], tensors)] == [dtype] * 3


def test_a_loss_that_16_bits_cannot_hold_is_held_under_autocast():
    states = torch.full((2, 9, 4), 90.0, dtype=torch.float16).requires_grad_()
    items = -states.detach(), states.detach()
    assert functional.auxiliary_loss(states, *items).isinf()
    with torch.autocast(states.device.type, dtype=torch.float16):
        loss = functional.auxiliary_loss(states, *items)
    assert loss == 8 * 2 * 4 * 90 * 90
    (grad,) = torch.autograd.grad(loss, states)
    assert grad.isfinite().all()


@pytest.mark.parametrize("scorer", ["inner", "function"])
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
def test_under_autocast_states_and_items_are_promoted_to_the_wider_dtype(low, scorer):
    states, positives, negatives = sequences(dtype=torch.float32)
    narrow = states.detach().to(low).requires_grad_()
    options = dict(scorer="inner" if scorer == "inner" else lambda h, e: (h * e).sum(-1), lengths=spread_lengths(5, 6))
    given = [narrow, positives, negatives]
    with torch.autocast(states.device.type, dtype=low):
        loss = functional.auxiliary_loss(*given, **options)
    wide = [narrow.detach().float().requires_grad_(), positives, negatives]
    expected = functional.auxiliary_loss(*wide, **options)
    assert loss.dtype == torch.float32 and torch.equal(loss, expected)
    for grad, other, x in zip(gradients([loss], given), gradients([expected], wide), given, strict=True):
        assert grad.dtype == x.dtype and torch.equal(grad, other.to(x.dtype))
    with pytest.raises(ValueError, match="positives must have the dtype of states"):
        functional.auxiliary_loss(*given, **options)


def test_under_autocast_two_16_bit_formats_meet_in_float32():
    tensors = [x.detach() for x in sequences()]
    mixed = [tensors[0].half(), tensors[1].bfloat16(), tensors[2].half()]
    with torch.autocast(tensors[0].device.type, dtype=torch.bfloat16):
        loss = functional.auxiliary_loss(*mixed)
    assert torch.equal(loss, functional.auxiliary_loss(*(x.float() for x in mixed)))


@EVERY_REDUCTION
def test_more_pairs_than_one_block_adds_at_once(reduction):
    # the CUDA kernels' blocks take 256 pairs each, and the last one has 256 threads for their sums
    tensors, lengths = sequences(300, 230, 1), spread_lengths(300, 230)
    options = dict(lengths=lengths, reduction=reduction, scorer=lambda h, e: (h * e).sum(-1))
    assert_close(results(functional, tensors, **options), results(reference, tensors, **options), 1e-11)


# --------------------------------------------------------------------------------------------------------- properties


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


@EVERY_REDUCTION
def test_the_logits_of_the_inner_products_are_kept_for_the_backward(reduction):
    states, positives, negatives = tensors = [x.detach() for x in sequences(3, 4, 5)]
    lengths = torch.tensor([4, 0, 2])
    loss, logits = torch.ops.dien_ops.auxiliary_inner_loss(*tensors, lengths, reduction)
    products = [(states[:, :-1] * items[:, 1:]).sum(-1) for items in (positives, negatives)]
    valid = torch.arange(3) + 1 < lengths.unsqueeze(1)
    assert_close([logits], [torch.stack(products, 1) * valid.unsqueeze(1)])
    assert not logits[~valid.unsqueeze(1).expand_as(logits)].any()
    again = torch.ops.dien_ops.auxiliary_loss_of_logits(logits, lengths, 4, reduction)
    assert_close([again], [loss])


def test_the_items_of_the_first_step_have_no_gradient_nor_has_the_last_state():
    tensors = sequences()
    states, positives, negatives = gradients([functional.auxiliary_loss(*tensors)], tensors)
    assert not states[:, -1].any() and not positives[:, 0].any() and not negatives[:, 0].any()
    assert states[:, :-1].all() and positives[:, 1:].all() and negatives[:, 1:].all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [8, 6])
def test_contiguous_tensors_may_begin_anywhere(width, dtype):
    tensors, lengths = sequences(4, 9, width, dtype=dtype), spread_lengths(4, 9)
    moved = [begins_anywhere(x) for x in tensors]
    expected = results(functional, tensors, lengths=lengths)
    for result, same in zip(results(functional, moved, lengths=lengths), expected, strict=True):
        assert torch.equal(result, same)


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


def test_a_bad_number_spoils_the_loss_and_the_gradients_of_its_own_pairs_alone():
    tensors = sequences(3)
    clean = results(functional, tensors)
    with torch.no_grad():
        tensors[0][1, 2, 0] = math.nan
    loss, states, positives, negatives = results(functional, tensors)
    assert loss.isnan() and states[1, 2].isnan().all() and positives[1, 3].isnan().all()
    for found, expected in zip((states, positives, negatives), clean[1:], strict=True):
        assert_close([found[[0, 2]]], [expected[[0, 2]]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [0.0, 1e2, 1e4, 1e15])
def test_huge_logits_give_finite_losses_and_gradients(dtype, size):
    states = torch.ones(2, 3, 1, dtype=dtype)
    items = torch.full((2, 3, 1), size, dtype=dtype)
    wrong = results(functional, [x.requires_grad_() for x in (states, -items, items.clone())])
    right = functional.auxiliary_loss(states, items, -items)
    assert all(x.isfinite().all() for x in wrong)
    torch.testing.assert_close(wrong[0], torch.tensor(max(4 * size, 4 * math.log(2)), dtype=dtype))
    assert right < 1e-30 or size == 0


def test_tiny_losses_keep_their_relative_precision():
    """log1p(exp(-x)) is exp(-x) far out, where 1 + exp(-x) is 1."""
    for x in range(0, 81, 3):
        items = torch.full((1, 2, 1), float(x), dtype=torch.float64)
        loss = functional.auxiliary_loss(torch.ones_like(items), items, -items)
        expected = torch.tensor(2 * math.log1p(math.exp(-x)), dtype=torch.float64)
        torch.testing.assert_close(loss, expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("scorer", ["inner", "function"])
def test_tiny_gradients_keep_their_relative_precision(scorer):
    """sigmoid(-x) is exp(-x) far out, where 1 - sigmoid(x) is 0."""
    scorer = "inner" if scorer == "inner" else lambda h, e: (h * e).sum(-1)
    for x in range(0, 81, 3):
        items = [torch.full((1, 2, 1), float(y), dtype=torch.float64, requires_grad=True) for y in (x, -x)]
        loss = functional.auxiliary_loss(torch.ones(1, 2, 1, dtype=torch.float64), *items, scorer=scorer)
        found = torch.stack([g[0, 1, 0] for g in torch.autograd.grad(loss, items)])
        expected = torch.tensor([-1.0, 1.0], dtype=torch.float64) / (1 + math.exp(x))
        torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_second_derivatives_in_16_bits_are_computed_in_float32(dtype):
    low = sequences(5, 6, 300, dtype=dtype)
    wide = [x.detach().float().requires_grad_() for x in low]
    found, expected = (second_derivatives([functional.auxiliary_loss(*x, reduction="mean")], x) for x in (low, wide))
    assert_close(found, [x.to(dtype) for x in expected], torch.finfo(dtype).eps)


def test_derivatives_of_a_scorer_pass_gradgradcheck():
    scorer = Scorer(3, 2)

    def loss(*tensors):
        return functional.auxiliary_loss(*tensors, lengths=torch.tensor([3, 2]), scorer=scorer)

    assert gradgradcheck(loss, sequences(2, 3, 3, 2))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_operators_pass_opcheck(dtype):
    tensors, lengths = sequences(dtype=dtype), spread_lengths(5, 6)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    ops = torch.ops.dien_ops
    torch.library.opcheck(ops.checked_lengths, (lengths.int(), 6))
    torch.library.opcheck(ops.auxiliary_inner_loss, (*tensors, lengths, "mean"))
    _, logits = ops.auxiliary_inner_loss(*tensors, lengths, "mean")
    torch.library.opcheck(ops.auxiliary_inner_loss_backward, (leaf(dtype=wide), logits, *tensors, lengths, "mean"))
    logits = leaf(5, 2, 5, dtype=wide)
    torch.library.opcheck(ops.auxiliary_loss_of_logits, (logits, lengths, 6, "paper"))
    torch.library.opcheck(ops.auxiliary_loss_of_logits_backward, (leaf(dtype=wide), logits, lengths, 6, "paper"))


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


@pytest.mark.cpu_kernels
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
    with torch.autocast(tensors[0].device.type, dtype=torch.bfloat16):
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
        (dict(scorer="mlp"), ValueError, "scorer must be one of 'inner', got 'mlp'"),
        (
            dict(scorer=lambda h, e: h * e),
            RuntimeError,
            r"the scorer's result must have shape \[2, 2\] \[B, T-1\]",
        ),
        (
            dict(scorer=lambda h, e: (h * e).sum(-1).long()),
            ValueError,
            "the scorer's result must be floating-point, got torch.int64",
        ),
        (dict(reduction="sum"), ValueError, "reduction must be one of 'paper', 'mean', 'authors', got 'sum'"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    arguments = {name: torch.zeros(2, 3, 4) for name in ("states", "positives", "negatives")}
    device = arguments["states"].device
    change = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in change.items()}
    with pytest.raises(error, match=message):
        functional.auxiliary_loss(**{**arguments, **change})


FOUND_BY_A_KERNEL = pytest.mark.not_on_cuda(reason="a kernel finds it there, and the process loses the GPU")


@FOUND_BY_A_KERNEL
@pytest.mark.parametrize("scorer", ["inner", lambda h, e: (h * e).sum(-1)], ids=["inner", "function"])
@pytest.mark.parametrize("lengths", [[1, 4], [3, -1]])
def test_a_length_outside_of_the_steps_is_named(lengths, scorer):
    zeros = torch.zeros(2, 3, 4)
    with pytest.raises(RuntimeError, match=rf"lengths must be in 0..3 \(T\), got {lengths[1]} at row 1"):
        functional.auxiliary_loss(zeros, zeros, zeros, lengths=torch.tensor(lengths), scorer=scorer)


def test_what_autocast_makes_of_a_wrong_argument_is_named_too():
    zeros = torch.zeros(2, 3, 4)
    with torch.autocast(zeros.device.type, dtype=torch.bfloat16):
        with pytest.raises(TypeError, match="positives must be a Tensor, got NoneType"):
            functional.auxiliary_loss(zeros, None, zeros)
        with pytest.raises(ValueError, match="negatives must have the dtype of states"):
            functional.auxiliary_loss(zeros, zeros, zeros.long())


class NormedScorer(nn.Module):
    """A scorer that writes when it is called."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width, dtype=torch.float64)

    def forward(self, states: Tensor, items: Tensor) -> Tensor:
        return self.norm((states * items).flatten(0, 1)).sum(-1).view(states.shape[:2])


@FOUND_BY_A_KERNEL
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


# ----------------------------------------------------------------------------------------------- the CUDA kernels alone


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_do_not_depend_on_the_order_of_threads(dtype, set_executor):
    every = [sequences(*sizes, dtype=dtype) for sizes in ((40, 9, 10), (3, 4, 140), (70, 5, 3))]
    lengths = [spread_lengths(*x[0].shape[:2]) for x in every]
    scorers = ["inner", lambda h, e: (h * e).sum(-1)]

    def run():
        return [
            result
            for tensors, some in zip(every, lengths, strict=True)
            for scorer in scorers
            for result in results(functional, tensors, lengths=some, scorer=scorer, reduction="mean")
        ]

    expected = run()
    for order, seed in [("in_order", 0), ("reverse", 0), *itertools.product(["shuffled", "skewed"], range(2))]:
        set_executor(order=order, seed=seed)
        assert all(torch.equal(a, b) for a, b in zip(run(), expected, strict=True))


@pytest.mark.usefixtures("cuda_kernels")
@pytest.mark.parametrize("scorer", ["inner", lambda h, e: (h * e).sum(-1)], ids=["inner", "function"])
@EVERY_REDUCTION
def test_memory_that_nobody_wrote_is_never_read(reduction, scorer):
    tensors, options = sequences(), dict(lengths=spread_lengths(5, 6), scorer=scorer, reduction=reduction)
    torch.use_deterministic_algorithms(True)  # fills such memory with NaN
    try:
        found = results(functional, tensors, **options)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_close(found, results(reference, tensors, **options))


def step(tensors: list[Tensor], lengths: Tensor) -> list[Tensor]:
    loss = functional.auxiliary_loss(*tensors, lengths=lengths, reduction="mean")
    return [loss, *torch.autograd.grad(loss, tensors)]


def test_a_training_step_replays_from_a_cuda_graph(on_device):
    tensors, lengths = sequences(40, 9, 36, dtype=torch.float32), spread_lengths(40, 9)
    graph, replayed = captured(lambda: step(tensors, lengths))
    others, other_lengths = sequences(40, 9, 36, dtype=torch.float32), spread_lengths(40, 9)
    with torch.no_grad():
        for to, x in zip([*tensors, lengths], [*others, other_lengths], strict=True):
            to.copy_(x)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(replayed, step(others, other_lengths), strict=True))


def test_nothing_waits_for_the_device(on_device):
    tensors, lengths = sequences(40, 9, 36, dtype=torch.float32), spread_lengths(40, 9)
    with waiting_is_an_error():
        step(tensors, lengths)


def test_a_length_beyond_the_steps_is_named_before_the_context_is_lost(on_device):
    code = """
import torch, dien_ops
zeros = torch.zeros(2, 4, 3, device="cuda")
dien_ops.AuxiliaryLoss()(zeros, zeros, zeros, lengths=torch.tensor([4, 7]).cuda())
torch.cuda.synchronize()
"""
    done = run_python(code)
    assert "lengths must be in 0..4 (T), got 7 at row 1" in done.stdout and "device-side assert" in done.stderr
