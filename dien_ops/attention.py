# SPDX-License-Identifier: Apache-2.0
"""Softmax attention over states (DIEN eq. 8)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dien_ops import _checks, _precision, reference
from dien_ops._autograd import backward_of_backward

# -------------------------------------------------------------------------------------------------- operators


@torch.library.register_fake("dien_ops::bilinear_attention")
def _bilinear_attention_fake(
    states: Tensor, target: Tensor, weight: Tensor, lengths: Tensor | None, allow_tf32: bool
) -> tuple[Tensor, Tensor]:
    batch, steps, hidden = states.shape
    targets = target.size(1)
    return states.new_empty(batch, targets, steps), weight.new_empty(batch, targets, hidden)


@torch.library.register_fake("dien_ops::bilinear_attention_backward")
def _bilinear_attention_backward_fake(
    grad_scores: Tensor,
    states: Tensor,
    target: Tensor,
    weight: Tensor,
    projected: Tensor,
    scores: Tensor,
    lengths: Tensor | None,
    allow_tf32: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, steps, hidden = states.shape
    if not states.is_contiguous() and states.transpose(0, 1).is_contiguous():
        grad_states = states.new_empty(steps, batch, hidden).transpose(0, 1)
    else:
        grad_states = states.new_empty(states.shape)
    return grad_states, target.new_empty(target.shape), weight.new_empty(weight.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    states, target, weight, lengths, ctx.allow_tf32 = inputs
    scores, projected = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(projected)
    ctx.save_for_backward(states, target, weight, projected, scores, lengths)


def _backward(ctx: Any, grad_scores: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad_scores is None:
        return (None,) * 5
    grads = torch.ops.dien_ops.bilinear_attention_backward(grad_scores, *ctx.saved_tensors, ctx.allow_tf32)
    return *grads, None, None


def _backward_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    grad_scores, states, target, weight, _, _, lengths, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(grad_scores, states, target, weight, lengths)


def _double_backward(ctx: Any, *grad_grads: Tensor | None) -> tuple[Tensor | None, ...]:
    grad_scores, states, target, weight, lengths = ctx.saved_tensors

    def equations(states: Tensor, target: Tensor, weight: Tensor) -> Sequence[Tensor]:
        return (reference.bilinear_attention(states, target, weight, lengths=lengths),)

    (for_scores,), for_inputs = backward_of_backward(equations, (states, target, weight), (grad_scores,), grad_grads)
    return for_scores, *for_inputs, None, None, None, None


torch.library.register_autograd("dien_ops::bilinear_attention", _backward, setup_context=_setup_context)
torch.library.register_autograd(
    "dien_ops::bilinear_attention_backward", _double_backward, setup_context=_backward_setup_context
)

# ------------------------------------------------------------------------------------------------- functional


def bilinear_attention(states: Tensor, target: Tensor, weight: Tensor, *, lengths: Tensor | None = None) -> Tensor:
    """How much each step of a sequence matters to a target (DIEN eq. 8): ``a_t = softmax_t(h_t W e_a)``.

    The softmax runs over the valid steps of each sequence. Padding scores exactly 0, and so does an empty sequence.

    Args:
        states: ``[B, T, H]``, the states of the first GRU; float32, float64, bfloat16 or float16. Any strides; none are
            copied that are contiguous, or the ``transpose(0, 1)`` of a contiguous ``[T, B, H]``. Under
            ``torch.autocast`` states and target are cast to its dtype, as nn.Linear's input is, and the scores have it.
            On CUDA, products of float32 may be tf32 where nn.Linear's may be, see
            ``torch.backends.cuda.matmul.fp32_precision``.
        target: ``[B, A]``, the embedding of the target, or ``[B, C, A]``, those of C targets per sequence; dtype as
            states.
        weight: ``[H, A]``, dtype as states, or float32 with 16-bit states.
        lengths: ``[B]`` int32 or int64, each in 0..T, on the states' device. On CUDA nobody waits for them: one outside
            of 0..T is a device-side assertion, which names it and ends the process's use of the GPU.

    Returns:
        ``[B, T]``, or ``[B, C, T]`` for C targets, in the states' dtype.

    Raises:
        TypeError: an argument is no Tensor.
        ValueError: a wrong rank or dtype.
        RuntimeError: a wrong size or device, or lengths outside 0..T.

    Example:
        >>> states, target, weight = torch.randn(8, 50, 36), torch.randn(8, 18), torch.randn(36, 18)
        >>> scores = dien_ops.functional.bilinear_attention(states, target, weight)
        >>> bool(torch.allclose(scores.sum(1), torch.ones(8)))
        True
    """
    _checks.tensor("states", states)
    dtype = _precision.autocast_dtype(states)
    if dtype is not None:
        states, target = _precision.cast(dtype, states, target)
        (weight,) = _precision.cast(torch.float32, weight)
    _checks.supported("states", states)
    _checks.rank("states", states, 3)
    _checks.tensor("target", target)
    _checks.tensor("weight", weight)
    _checks.matches("states", states, target=target)
    _checks.parameters("states", states, weight=weight)
    _checks.rank("target", target, 2, 3)
    _checks.rank("weight", weight, 2)
    _checks.shape("weight", weight, [states.size(2), target.size(-1)], "[H, A]")
    if target.size(0) != states.size(0):
        raise RuntimeError(f"target must have the batch size of states, {states.size(0)}, got {target.size(0)}")
    _checks.lengths(lengths, states.size(0), states.device)
    several = target.dim() == 3
    targets = target if several else target.unsqueeze(1)
    scores: Tensor
    scores, _ = torch.ops.dien_ops.bilinear_attention(
        states,
        targets,
        weight.to(_checks.compute_dtype(states.dtype)),
        lengths,
        _precision.allow_tf32(states, "matmul"),
    )
    return scores if several else scores.squeeze(1)


# ---------------------------------------------------------------------------------------------------- modules


class BilinearAttention(nn.Module):
    """:func:`dien_ops.functional.bilinear_attention` (DIEN eq. 8) with its parameter ``weight`` [H, A].

    The weight starts uniform with variance ``1 / (H A)``: for states and targets of unit variance the logits then
    have unit variance, so that the softmax starts neither flat nor saturated. The paper does not say how it starts.

    Args:
        hidden_size: H >= 1, the size of the states.
        target_size: A >= 1, the size of the target's embedding.
        device, dtype: of the parameter.

    Shapes: states [B, T, H], target [B, A] or [B, C, A], lengths [B]; scores [B, T] or [B, C, T].

    Raises:
        TypeError, ValueError, RuntimeError: an argument has the wrong type; rank or dtype; size, device or value.

    Example, and the scores' way to the attentional GRU: with the same lengths, and no mask and no copy between them:
        >>> attention = dien_ops.BilinearAttention(36, 18)
        >>> states, lengths = torch.randn(8, 50, 36), torch.randint(0, 51, (8,))
        >>> scores = attention(states, torch.randn(8, 18), lengths=lengths)  # [8, 50]
        >>> output, h_n = dien_ops.AUGRU(36, 20, batch_first=True)(states, scores, lengths=lengths)

        Time first, and with several targets:
        >>> states = torch.randn(50, 8, 36)
        >>> scores = attention(states.transpose(0, 1), torch.randn(8, 30, 18), lengths=lengths)  # [8, 30, 50]
        >>> output, h_n = dien_ops.AUGRU(36, 20)(states, scores.movedim(-1, 0), lengths=lengths)
        >>> output.shape, h_n.shape
        (torch.Size([50, 8, 30, 20]), torch.Size([1, 8, 30, 20]))
    """

    def __init__(
        self, hidden_size: int, target_size: int, device: Any = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        _checks.size("hidden_size", hidden_size)
        _checks.size("target_size", target_size)
        self.hidden_size, self.target_size = hidden_size, target_size
        self.weight = nn.Parameter(torch.empty(hidden_size, target_size, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = (3.0 / (self.hidden_size * self.target_size)) ** 0.5
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, states: Tensor, target: Tensor, *, lengths: Tensor | None = None) -> Tensor:
        """Args: states ``[B, T, H]``; target ``[B, A]`` or ``[B, C, A]``. Returns ``[B, T]`` or ``[B, C, T]``."""
        return bilinear_attention(states, target, self.weight, lengths=lengths)

    def extra_repr(self) -> str:
        return f"{self.hidden_size}, {self.target_size}"
