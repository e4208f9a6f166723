# SPDX-License-Identifier: Apache-2.0
"""The auxiliary loss that supervises the interest extractor's states (DIEN eq. 6)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dien_ops import _checks, _precision, reference
from dien_ops._autograd import backward_of_backward

Scorer = Callable[[Tensor, Tensor], Tensor]
REDUCTIONS = ("paper", "mean", "authors")

# -------------------------------------------------------------------------------------------------- operators


def _pairs(steps: int) -> int:
    pairs: int = torch.sym_max(steps - 1, 0)
    return pairs


@torch.library.register_fake("dien_ops::checked_lengths")
def _checked_lengths_fake(lengths: Tensor, steps: int) -> Tensor:
    return lengths.new_empty(lengths.shape, dtype=torch.int64)


@torch.library.register_fake("dien_ops::auxiliary_inner_loss")
def _inner_loss_fake(
    states: Tensor, positives: Tensor, negatives: Tensor, lengths: Tensor | None, reduction: str
) -> tuple[Tensor, Tensor]:
    dtype = _checks.compute_dtype(states.dtype)
    logits = states.new_empty([states.shape[0], 2, _pairs(states.shape[1])], dtype=dtype)
    return states.new_empty([], dtype=dtype), logits


@torch.library.register_fake("dien_ops::auxiliary_inner_loss_backward")
def _inner_loss_backward_fake(
    grad_loss: Tensor,
    logits: Tensor,
    states: Tensor,
    positives: Tensor,
    negatives: Tensor,
    lengths: Tensor | None,
    reduction: str,
) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (states, positives, negatives))


@torch.library.register_fake("dien_ops::auxiliary_loss_of_logits")
def _loss_of_logits_fake(logits: Tensor, lengths: Tensor | None, steps: int, reduction: str) -> Tensor:
    return logits.new_empty([])


@torch.library.register_fake("dien_ops::auxiliary_loss_of_logits_backward")
def _loss_of_logits_backward_fake(
    grad_loss: Tensor, logits: Tensor, lengths: Tensor | None, steps: int, reduction: str
) -> Tensor:
    return logits.new_empty(logits.shape)


def _save_for_inner_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.reduction = inputs
    _, logits = output
    ctx.mark_non_differentiable(logits)
    ctx.save_for_backward(logits, *tensors)
    ctx.set_materialize_grads(False)


def _inner_backward(ctx: Any, grad_loss: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return (None,) * 5
    grads = torch.ops.dien_ops.auxiliary_inner_loss_backward(grad_loss, *ctx.saved_tensors, ctx.reduction)
    return (*grads, None, None)


def _save_for_inner_double_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    grad_loss, _, *tensors, ctx.reduction = inputs
    ctx.save_for_backward(grad_loss, *tensors)
    ctx.set_materialize_grads(False)


def _inner_double_backward(ctx: Any, *grad_grads: Tensor | None) -> tuple[Tensor | None, ...]:
    grad_loss, *primals, lengths = ctx.saved_tensors

    def equations(states: Tensor, positives: Tensor, negatives: Tensor) -> Sequence[Tensor]:
        options: Any = {"lengths": lengths, "reduction": ctx.reduction}
        return [reference.auxiliary_loss(states, positives, negatives, **options)]

    (for_grad,), for_primals = backward_of_backward(equations, primals, [grad_loss], grad_grads)
    return (for_grad, None, *for_primals, None, None)


def _save_for_logits_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, steps, reduction = inputs
    ctx.save_for_backward(*tensors)
    ctx.options = (steps, reduction)
    ctx.set_materialize_grads(False)


def _logits_backward(ctx: Any, grad_loss: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return (None,) * 4
    grad = torch.ops.dien_ops.auxiliary_loss_of_logits_backward(grad_loss, *ctx.saved_tensors, *ctx.options)
    return grad, None, None, None


def _logits_double_backward(ctx: Any, grad_grad: Tensor | None) -> tuple[Tensor | None, ...]:
    grad_loss, logits, lengths = ctx.saved_tensors

    def equations(logits: Tensor) -> Sequence[Tensor]:
        return [reference._loss_of_logits(logits, lengths, *ctx.options)]

    for_grads, for_primals = backward_of_backward(equations, [logits], [grad_loss], [grad_grad])
    return (*for_grads, *for_primals, None, None, None)


torch.library.register_autograd(
    "dien_ops::auxiliary_inner_loss", _inner_backward, setup_context=_save_for_inner_backward
)
torch.library.register_autograd(
    "dien_ops::auxiliary_inner_loss_backward", _inner_double_backward, setup_context=_save_for_inner_double_backward
)
torch.library.register_autograd(
    "dien_ops::auxiliary_loss_of_logits", _logits_backward, setup_context=_save_for_logits_backward
)
torch.library.register_autograd(
    "dien_ops::auxiliary_loss_of_logits_backward", _logits_double_backward, setup_context=_save_for_logits_backward
)

# ------------------------------------------------------------------------------------------------- functional


def auxiliary_loss(
    states: Tensor,
    positives: Tensor,
    negatives: Tensor,
    *,
    lengths: Tensor | None = None,
    scorer: str | Scorer = "inner",
    reduction: str = "paper",
) -> Tensor:
    r"""The auxiliary loss of DIEN eq. 6: each state should tell the next behaviour from a sampled one.

    .. math::
        L_{aux} = -\frac{1}{N} \sum_{i=1}^N \sum_{t=1}^{n_i - 1}
            \log \sigma(h_t^i, e_{t+1}^i) + \log (1 - \sigma(h_t^i, \hat e_{t+1}^i))

    The three sequences are given whole; state t is paired with item t + 1 here, so the caller shifts nothing.
    The loss is computed from logits and never forms a sigmoid that could saturate: it is finite for all
    finite input whose inner products are.

    Args:
        states: [B, T, H], the interest extractor's outputs; float32, float64, bfloat16 or float16.
        positives: [B, T, E], the behaviours' embeddings, the same sequence that the extractor read; dtype as states.
            Under ``torch.autocast`` they may differ, 16-bit states beside float32 embeddings: all three are
            promoted to the wider dtype.
        negatives: [B, T, E], an item that was not clicked for each of them. The first of both is not used.
        lengths: [B], int32 or int64, each in 0..T, on the states' device. Rows of length 0 and 1 have no pair and
            contribute 0. On CUDA nobody waits for lengths: one outside of 0..T is a device-side assertion, which
            names it and ends the process's use of the GPU.
        scorer: ``"inner"``, the inner product of state and item (H = E), all in one kernel, or a function of states
            [B, T-1, H] and items [B, T-1, E] that gives logits [B, T-1]; it is called once for each of the two
            sequences of items, with zeros in place of the padding.
        reduction: ``"paper"`` divides the sum over all pairs by B (eq. 6), ``"mean"`` by the number of pairs,
            ``"authors"`` by B (T - 1), padding included, as the released code does.

    Returns:
        The loss, a scalar, 0 where there is no pair. It is computed in float32, or in float64 for float64 states; its
        dtype is that of states, and under autocast that in which it is computed.

    Raises:
        TypeError, ValueError, RuntimeError: an argument has the wrong type; rank, dtype or name; size, device
            or value.

    Example:
        >>> states, clicked, sampled = torch.randn(3, 2, 5, 8).unbind()
        >>> loss = dien_ops.functional.auxiliary_loss(states, clicked, sampled, lengths=torch.tensor([5, 2]))
        >>> loss.shape
        torch.Size([])
    """
    _checks.one_of("reduction", reduction, REDUCTIONS)
    _checks.tensor("states", states)
    autocast = _precision.autocast_dtype(states) is not None
    if autocast:
        states, positives, negatives = _promoted(states, positives, negatives)
    _checks.supported("states", states)
    _checks.rank("states", states, 3)
    _checks.tensor("positives", positives)
    _checks.tensor("negatives", negatives)
    _checks.matches("states", states, positives=positives, negatives=negatives)
    _checks.rank("positives", positives, 3)
    batch, steps, width = states.shape
    _checks.shape("positives", positives, [batch, steps, positives.shape[2]], "[B, T, E]")
    _checks.shape("negatives", negatives, positives.shape, "[B, T, E]")
    _checks.lengths(lengths, batch, states.device)
    if callable(scorer):
        if lengths is not None:  # a scorer may write, as BatchNorm does: what it reads hangs on the check
            lengths = torch.ops.dien_ops.checked_lengths(lengths, steps)
        logits = _logits_of(scorer, states, positives, negatives, lengths)
        loss: Tensor = torch.ops.dien_ops.auxiliary_loss_of_logits(logits, lengths, steps, reduction)
    else:
        _checks.one_of("scorer", scorer, ("inner",))
        if positives.shape[2] != width:
            raise ValueError(
                f'scorer="inner" needs items as wide as states, got H={width} and E={positives.shape[2]}: '
                f"give a scorer that takes both"
            )
        loss, _ = torch.ops.dien_ops.auxiliary_inner_loss(states, positives, negatives, lengths, reduction)
    return loss if autocast else loss.to(states.dtype)


def _promoted(*values: Any) -> tuple[Any, ...]:
    """Floating-point tensors in the widest dtype among them, and all else as it is."""
    floating = [x.dtype for x in values if isinstance(x, Tensor) and x.is_floating_point()]
    widest = functools.reduce(torch.promote_types, floating) if floating else None
    return tuple(x.to(widest) if isinstance(x, Tensor) and x.is_floating_point() else x for x in values)


def _logits_of(scorer: Scorer, states: Tensor, positives: Tensor, negatives: Tensor, lengths: Tensor | None) -> Tensor:
    """[B, 2, T-1]. The padding is blanked before it is scored: none of it can reach the scorer's gradient."""
    batch, steps, _ = states.shape
    h, e, e_hat = states[:, :-1], positives[:, 1:], negatives[:, 1:]
    if lengths is not None:
        valid = (torch.arange(steps, device=states.device) < lengths.unsqueeze(1))[:, 1:, None]
        h, e, e_hat = (torch.where(valid, x, 0.0) for x in (h, e, e_hat))
    scored = []
    for items in (e, e_hat):
        logits = scorer(h, items)
        _checks.tensor("the scorer's result", logits)
        _checks.shape("the scorer's result", logits, [batch, _pairs(steps)], "[B, T-1]")
        if not logits.is_floating_point():
            raise ValueError(f"the scorer's result must be floating-point, got {logits.dtype}")
        scored.append(logits.to(_checks.compute_dtype(states.dtype)))  # autocast may have lowered it
    return torch.stack(scored, dim=1)


# ----------------------------------------------------------------------------------------------------- module


class AuxiliaryLoss(nn.Module):
    """The auxiliary loss of DIEN eq. 6 as a module, which owns its scorer: see
    :func:`dien_ops.functional.auxiliary_loss`.

    Args:
        scorer: ``"inner"``, or a module (states [..., H], items [..., E]) -> logits [...].
        reduction: ``"paper"``, ``"mean"`` or ``"authors"``.

    Shapes: states [B, T, H], positives and negatives [B, T, E] (whole sequences), lengths [B]; the result is
    a scalar.

    Raises:
        TypeError, ValueError, RuntimeError: as the function.

    Example, with the scorer of the authors' released code:
        >>> class Scorer(torch.nn.Module):
        ...     def __init__(self, width):
        ...         super().__init__()
        ...         self.layers = torch.nn.Sequential(
        ...             torch.nn.Linear(width, 100), torch.nn.Sigmoid(),
        ...             torch.nn.Linear(100, 50), torch.nn.Sigmoid(), torch.nn.Linear(50, 1))
        ...     def forward(self, states, items):
        ...         return self.layers(torch.cat([states, items], dim=-1)).squeeze(-1)
        >>> loss = dien_ops.AuxiliaryLoss(Scorer(36 + 36))
        >>> loss(*torch.randn(3, 2, 5, 36).unbind(), lengths=torch.tensor([5, 2])).shape
        torch.Size([])
    """

    def __init__(self, scorer: str | Scorer = "inner", reduction: str = "paper") -> None:
        super().__init__()
        if not callable(scorer):
            _checks.one_of("scorer", scorer, ("inner",))
        _checks.one_of("reduction", reduction, REDUCTIONS)
        self.scorer = scorer
        self.reduction = reduction

    def forward(self, states: Tensor, positives: Tensor, negatives: Tensor, *, lengths: Tensor | None = None) -> Tensor:
        return auxiliary_loss(
            states, positives, negatives, lengths=lengths, scorer=self.scorer, reduction=self.reduction
        )

    def extra_repr(self) -> str:
        scorer = "" if isinstance(self.scorer, nn.Module) else f"scorer={self.scorer!r}, "
        return f"{scorer}reduction={self.reduction!r}"
