# SPDX-License-Identifier: Apache-2.0
"""Dice, the data adaptive activation function of DIN (eq. 9)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dien_ops import _checks, reference
from dien_ops._autograd import backward_of_backward

# -------------------------------------------------------------------------------------------------- operators


@torch.library.register_fake("dien_ops::dice")
def _dice_fake(
    input: Tensor,
    alpha: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    lengths: Tensor | None,
    eps: float,
    variance_eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return input.new_empty(input.shape), alpha.new_empty(alpha.shape), alpha.new_empty(alpha.shape)


@torch.library.register_fake("dien_ops::dice_backward")
def _dice_backward_fake(
    grad_output: Tensor,
    input: Tensor,
    alpha: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    lengths: Tensor | None,
    batch_statistics: bool,
    eps: float,
    variance_eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    affine = [alpha.new_empty(alpha.shape if x is not None else 0) for x in (weight, bias)]
    return input.new_empty(input.shape), alpha.new_empty(alpha.shape), affine[0], affine[1]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    input, alpha, mean, _, weight, bias, lengths, *eps = inputs
    _, used_mean, used_var = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(used_mean, used_var)
    ctx.save_for_backward(input, alpha, used_mean, used_var, weight, bias, lengths)
    ctx.batch_statistics, ctx.eps = mean is None, eps


def _backward(ctx: Any, grad_output: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad_output is None:
        return (None,) * 9
    grad_input, grad_alpha, grad_weight, grad_bias = torch.ops.dien_ops.dice_backward(
        grad_output, *ctx.saved_tensors, ctx.batch_statistics, *ctx.eps
    )
    weight, bias = ctx.saved_tensors[4:6]
    return (
        grad_input,
        grad_alpha,
        None,
        None,
        grad_weight if weight is not None else None,
        grad_bias if bias is not None else None,
        None,
        None,
        None,
    )


def _backward_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.batch_statistics, eps, variance_eps = inputs
    ctx.eps = (eps, variance_eps)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _double_backward(ctx: Any, *grad_grads: Tensor | None) -> tuple[Tensor | None, ...]:
    grad_output, input, alpha, mean, var, weight, bias, lengths = ctx.saved_tensors
    training = ctx.batch_statistics
    eps, variance_eps = ctx.eps

    def equations(input: Tensor, alpha: Tensor, weight: Tensor | None, bias: Tensor | None) -> Sequence[Tensor]:
        used_mean, used_var = (None, None) if training else (mean, var)
        return (
            reference.dice(
                input,
                alpha,
                used_mean,
                used_var,
                weight,
                bias,
                training=training,
                eps=eps,
                variance_eps=variance_eps,
                lengths=lengths,
            ),
        )

    (for_output,), (for_input, for_alpha, for_weight, for_bias) = backward_of_backward(
        equations, (input, alpha, weight, bias), (grad_output,), grad_grads
    )
    return for_output, for_input, for_alpha, None, None, for_weight, for_bias, None, None, None, None


torch.library.register_autograd("dien_ops::dice", _backward, setup_context=_setup_context)
torch.library.register_autograd("dien_ops::dice_backward", _double_backward, setup_context=_backward_setup_context)

# ------------------------------------------------------------------------------------------------- functional


def dice(
    input: Tensor,
    alpha: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-8,
    variance_eps: float = 0.0,
    lengths: Tensor | None = None,
) -> Tensor:
    """Dice (DIN eq. 9): ``f(s) = p s + (1 - p) alpha s``, with the gate
    ``p = sigmoid(weight (s - E) / (sqrt(Var + variance_eps) + eps) + bias)``.

    With ``training=True``, E and Var are the mean and the biased variance of each channel over the batch, the gradient
    flows through them, and the moving averages, where given, are updated in place as by
    :func:`torch.nn.functional.batch_norm`: ``running = (1 - momentum) running + momentum batch``, with the unbiased
    variance. With ``training=False``, E and Var are the moving averages. Steps behind a sequence's length count in no
    statistic; their output and gradient are 0.

    Args:
        input: ``[N, C]``, or ``[B, T, C]`` with C channels last; float32, float64, bfloat16 or float16, on the CPU or a
            CUDA device. Any strides. 16-bit input is computed in float32, and so are its statistics; under autocast
            it is taken as it comes, like batch_norm's.
        alpha: ``[C]``, the slope where the gate is closed. As weight and bias of the input's dtype, or float32 with
            16-bit input.
        running_mean, running_var: ``[C]`` moving averages, both or neither; needed with ``training=False``. Of the
            input's dtype, or float64, or float32 with 16-bit input, which is what they should be there: small steps
            are lost in 16 bits.
        weight, bias: ``[C]``, optional affine parameters; the paper has none.
        training: take the batch's statistics; else the moving averages.
        momentum: the weight of the newest batch in the moving averages, in 0..1: with 0 they never move, with 1 they
            are the newest batch's statistics.
        eps: finite and >= 0, is added to the standard deviation, as in the paper.
        variance_eps: finite and >= 0, is added to the variance, below the root, as in BatchNorm. With both 0 a constant
            channel gives NaN.
        lengths: ``[B]`` int32 or int64 on the input's device, each in 0..T; with a ``[B, T, C]`` input only.

    Returns:
        The shape and dtype of ``input``.

    Raises:
        TypeError: an argument is no Tensor, or momentum or eps no number.
        ValueError: a wrong rank or dtype, moving averages that are missing, momentum or eps out of range.
        RuntimeError: a wrong size or device, lengths outside 0..T, or, with ``training=True``, moving averages whose
            elements share memory (an expanded tensor). On CUDA nobody waits for the lengths' values: one outside 0..T
            is a device-side assertion that names it.

        After an error the moving averages are as they were.

    Example:
        >>> s = torch.randn(32, 80)
        >>> y = dien_ops.functional.dice(s, alpha=torch.zeros(80))
    """
    _check_arguments(input, alpha, running_mean, running_var, weight, bias, lengths, training)
    check_options(momentum, eps, variance_eps)
    dtype = _checks.compute_dtype(input.dtype)
    alpha, weight, bias = alpha.to(dtype), *(None if x is None else x.to(dtype) for x in (weight, bias))
    output: Tensor
    if training:
        output, mean, var = torch.ops.dien_ops.dice(input, alpha, None, None, weight, bias, lengths, eps, variance_eps)
        if running_mean is not None and running_var is not None:
            rows = input.shape[:-1].numel()
            count = torch.full((), rows, device=input.device) if lengths is None else lengths.sum()
            update_running_statistics(running_mean, running_var, mean, var, count, momentum)
        return output
    if running_mean is None or running_var is None:
        raise ValueError("running_mean and running_var are needed where training=False, got None")
    mean, var = running_mean.to(dtype), running_var.to(dtype)
    output, _, _ = torch.ops.dien_ops.dice(input, alpha, mean, var, weight, bias, lengths, eps, variance_eps)
    return output


def check_options(momentum: float, eps: float, variance_eps: float) -> None:
    """Raises TypeError for what is no number; ValueError for a momentum outside of [0, 1] or an eps below 0."""
    _checks.number("momentum", momentum)
    if not 0.0 <= momentum <= 1.0:
        raise ValueError(f"momentum must be in [0, 1], got {momentum}")
    _checks.non_negative("eps", eps)
    _checks.non_negative("variance_eps", variance_eps)


def check_average(name: str, value: Tensor, input_name: str, input: Tensor, channels: int, training: bool) -> None:
    """That a moving average can be read and, in training, be written: several are, and none alone."""
    _checks.tensor(name, value)
    _checks.same_device(input_name, input, name, value)
    _checks.shape(name, value, [channels], "[C]")
    wider = [x for x in (torch.float32, torch.float64) if x.itemsize > input.dtype.itemsize]
    if value.dtype not in (input.dtype, *wider):
        others = " or ".join(map(str, [input.dtype, *wider]))
        raise ValueError(f"{name} must have the dtype of {input_name}, {others}, got {value.dtype}")
    if training and channels > 1 and value.stride(0) == 0:
        raise RuntimeError(f"{name} must not be an expanded tensor, one element for all channels, with training=True")


@torch.no_grad()
def update_running_statistics(
    running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, count: Tensor, momentum: float
) -> None:
    """Moves the averages to a batch's mean and biased variance over `count` values; an empty batch moves nothing."""
    n = count.to(var.dtype)
    unbiased = var * (n / (n - 1).clamp(min=1))
    for running, batch in ((running_mean, mean), (running_var, unbiased)):
        running.lerp_(batch.to(running.dtype), momentum * (n > 0).to(running.dtype))


def _check_arguments(
    input: Tensor,
    alpha: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    lengths: Tensor | None,
    training: bool,
) -> None:
    _checks.supported("input", input)
    _checks.rank("input", input, 2, 3)
    _checks.tensor("alpha", alpha)
    _checks.parameters("input", input, alpha=alpha, weight=weight, bias=bias)
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var must be given together, got one of them")
    for name, value in (("alpha", alpha), ("weight", weight), ("bias", bias)):
        _checks.shape(name, value, [input.size(-1)], "[C]")
    for name, value in (("running_mean", running_mean), ("running_var", running_var)):
        if value is not None:
            check_average(name, value, "input", input, input.size(-1), training)
    if lengths is not None and input.dim() == 2:
        raise ValueError("lengths need an input of shape [B, T, C], got a 2-D input")
    _checks.lengths(lengths, input.size(0), input.device)


# ---------------------------------------------------------------------------------------------------- modules


class Dice(nn.Module):
    """The activation :func:`dien_ops.functional.dice` (DIN eq. 9) with its parameters and moving averages.

    In training mode the statistics are the batch's, in evaluation mode the moving averages: what a row is scored then
    does not depend on the rest of its batch. Parameter ``alpha`` [C] starts at 0; ``weight`` [C] and ``bias`` [C]
    exist with ``affine=True`` and start at 1 and 0. Buffers ``running_mean`` (0), ``running_var`` (1) and
    ``num_batches_tracked`` are those of :class:`torch.nn.BatchNorm1d`, by name too.

    Public code differs from the paper, and from each other. What gives the same numbers:

    ===================  ==================================================================================
    paper                ``Dice(C)``
    authors' DIEN        ``Dice(C, eps=1e-9, variance_eps=1e-9, track_running_stats=False)``
    authors' DIN         ``Dice(C, eps=0, variance_eps=1e-3, affine=True).eval()``, in training too: the moving
                         averages stay 0 and 1; ``weight`` is its learned scale, which starts at 0, ``bias`` stays 0
    DeepCTR-Torch        ``Dice(C, eps=0, variance_eps=1e-8, affine=True)``
    FuxiCTR              ``Dice(C, eps=0, variance_eps=1e-9, momentum=0.01)``
    ===================  ==================================================================================

    The last two keep a ``BatchNorm1d`` named ``bn``: their checkpoints load without that prefix.

    Args:
        num_features: C >= 1, the size of the last axis.
        eps: is added to the standard deviation, as in the paper. Finite and >= 0.
        momentum: the weight of the newest batch in the moving averages, in 0..1. There is no ``None``, by which
            :class:`torch.nn.BatchNorm1d` means the average over all batches.
        affine: learn a scale and an offset of the gate's argument; not in the paper.
        device, dtype: of the parameters and the moving averages. float32 ones go with 16-bit input too.
        variance_eps: is added to the variance, below the root, as in BatchNorm. Finite and >= 0; where it and eps are 0
            a constant channel gives NaN.
        track_running_stats: keep moving averages. Without them the buffers are None, and the statistics are the batch's
            in evaluation mode too.

    Shapes: input [N, C], or [B, T, C] with lengths [B]; the output is shaped as the input.

    Raises:
        TypeError, ValueError, RuntimeError: an argument has the wrong type; rank or dtype; size, device or value.

    Example:
        >>> activation = dien_ops.Dice(80)
        >>> y = activation(torch.randn(32, 50, 80), lengths=torch.randint(0, 51, (32,)))
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-8,
        momentum: float = 0.1,
        affine: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        variance_eps: float = 0.0,
        track_running_stats: bool = True,
    ) -> None:
        super().__init__()
        _checks.size("num_features", num_features)
        _checks.boolean("affine", affine)
        _checks.boolean("track_running_stats", track_running_stats)
        check_options(momentum, eps, variance_eps)
        factory = {"device": device, "dtype": dtype}
        self.num_features, self.eps, self.momentum, self.affine = num_features, eps, momentum, affine
        self.variance_eps, self.track_running_stats = variance_eps, track_running_stats
        self.alpha = nn.Parameter(torch.empty(num_features, **factory))
        self.register_parameter("weight", nn.Parameter(torch.empty(num_features, **factory)) if affine else None)
        self.register_parameter("bias", nn.Parameter(torch.empty(num_features, **factory)) if affine else None)
        for name in ("running_mean", "running_var"):
            self.register_buffer(name, torch.empty(num_features, **factory) if track_running_stats else None)
        batches = torch.tensor(0, dtype=torch.long, device=device) if track_running_stats else None
        self.register_buffer("num_batches_tracked", batches)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.alpha)
        for tensor, value in (
            (self.weight, 1),
            (self.bias, 0),
            (self.running_mean, 0),
            (self.running_var, 1),
            (self.num_batches_tracked, 0),
        ):
            if tensor is not None:
                nn.init.constant_(tensor, value)

    def forward(self, input: Tensor, *, lengths: Tensor | None = None) -> Tensor:
        """Args: input ``[N, C]`` or ``[B, T, C]``; lengths ``[B]`` for the latter. Returns the shape of the input."""
        output = dice(
            input,
            self.alpha,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            training=self.training or self.running_mean is None,
            momentum=self.momentum,
            eps=self.eps,
            variance_eps=self.variance_eps,
            lengths=lengths,
        )
        # Last: an error above leaves all buffers as they were.
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        return output

    def extra_repr(self) -> str:
        more = f", variance_eps={self.variance_eps}" if self.variance_eps else ""
        more += ", track_running_stats=False" if not self.track_running_stats else ""
        return f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}{more}"
