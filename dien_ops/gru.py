# SPDX-License-Identifier: Apache-2.0
"""The recurrent column as functions: GRU (DIEN eq. 2-5), AIGRU, AGRU and AUGRU (DIEN eq. 9-12)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dien_ops import _checks, _precision, reference
from dien_ops._autograd import backward_of_backward

ATTENTIONAL_GATES = ("paper", "authors", "replace", "input")

# ---------------------------------------------------------------------------------------------------------- operators


@torch.library.register_fake("dien_ops::gru")
def _gru_fake(
    input: Tensor,
    attention: Tensor | None,
    hx: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    lengths: Tensor | None,
    gate: str,
    reset_after: bool,
    batch_first: bool,
    reverse: bool,
    allow_tf32: bool,
    save_gates: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, steps = input.shape[:2] if batch_first else (input.shape[1], input.shape[0])
    hidden = weight_hh.shape[1]
    several = attention is not None and attention.dim() == 3
    rows = [batch, attention.shape[1 if batch_first else 2]] if several else [batch]  # type: ignore[union-attr]
    output = input.new_empty([*rows, steps, hidden] if batch_first else [steps, *rows, hidden])
    saved = [batch, rows[1] if several else 1, steps, (4 if reset_after else 3) * hidden]
    return output, input.new_empty([*rows, hidden]), input.new_empty(saved if save_gates else [0])


@torch.library.register_fake("dien_ops::gru_backward")
def _gru_backward_fake(
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    input: Tensor,
    attention: Tensor | None,
    hx: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    lengths: Tensor | None,
    output: Tensor,
    gates: Tensor,
    gate: str,
    reset_after: bool,
    batch_first: bool,
    *_: Any,
) -> tuple[Tensor, ...]:
    arguments = (input, None, hx, weight_ih, weight_hh, bias_ih, bias_hh)
    grads = [input.new_empty(x.shape if x is not None else [0]) for x in arguments]
    if attention is not None:
        time, other = (-1, 0) if batch_first else (0, -1)
        moved = attention.movedim(time, other)
        if not attention.is_contiguous() and moved.is_contiguous():  # as the other batch_first's would lie
            grads[1] = input.new_empty(moved.shape).movedim(other, time)
        else:
            grads[1] = input.new_empty(attention.shape)
    return tuple(grads)


def _save_for_gru_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    tensors, options = inputs[:8], inputs[8:13]
    states, _, gates = output
    ctx.save_for_backward(*tensors, states, gates)
    ctx.options = options
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(gates)


def _gru_backward(ctx: Any, grad_output: Tensor | None, grad_h_n: Tensor | None, _: None) -> tuple[Any, ...]:
    tensors = ctx.saved_tensors
    grads = _differentiable_gru_backward(grad_output, grad_h_n, *tensors, *ctx.options)
    present = [g if x is not None else None for g, x in zip(grads, tensors, strict=False)]
    return (*present, None, *[None] * 6)  # lengths; the options and save_gates


def _backward_operator(*arguments: Any) -> Any:
    grad_output, grad_h_n, *tensors, output, gates = arguments[:12]
    options = arguments[12:]
    if gates.dim() == 1:  # the forward ran without saving them (exported, traced, under vmap): run it again
        _, _, gates = torch.ops.dien_ops.gru(*tensors, *options, True)
    return torch.ops.dien_ops.gru_backward(grad_output, grad_h_n, *tensors, output, gates, *options)


def _save_for_double_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:10])
    ctx.options = inputs[12:]
    ctx.set_materialize_grads(False)


def _gru_double_backward(ctx: Any, *grad_grads: Tensor | None) -> tuple[Any, ...]:
    grad_output, grad_h_n, *primals, lengths = ctx.saved_tensors
    gate, reset_after, batch_first, reverse, _ = ctx.options

    def equations(
        x: Tensor,
        a: Tensor | None,
        hx: Tensor | None,
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor | None,
        b_hh: Tensor | None,
    ) -> Sequence[Tensor]:
        options = {"lengths": lengths, "batch_first": batch_first, "reset_after": reset_after}
        if a is None:
            return reference.gru(x, w_ih, w_hh, b_ih, b_hh, hx, reverse=reverse, **options)
        return reference.attentional_gru(x, a, w_ih, w_hh, b_ih, b_hh, hx, gate=gate, **options)

    for_grads, for_primals = backward_of_backward(equations, primals, [grad_output, grad_h_n], grad_grads)
    return (*for_grads, *for_primals, *[None] * 8)  # lengths, output, gates; the options


def _gru_vmap(gru: Callable[..., Any], info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
    """Rows are independent, so a mapped axis becomes part of the batch; mapped weights take one call each."""
    if any(dim is not None for dim in in_dims[3:7]):
        return _one_call_each(gru, info, in_dims, *arguments)
    input, attention, hx, *weights, lengths = arguments[:8]
    options = arguments[8:13]
    axis = 0 if options[2] else 1  # batch_first

    def folded(x: Tensor | None, dim: int | None, axis: int) -> Any:
        if x is None:
            return None
        if dim is None:
            x, dim = x.expand(info.batch_size, *x.shape), 0
        return x.movedim(dim, axis).flatten(axis, axis + 1)

    def unfolded(x: Tensor, axis: int) -> Any:
        return x.unflatten(axis, (info.batch_size, x.shape[axis] // info.batch_size))

    output, h_n, _ = gru(
        folded(input, in_dims[0], axis), folded(attention, in_dims[1], axis), folded(hx, in_dims[2], 0), *weights,
        folded(lengths, in_dims[7], 0), *options, False,
    )  # fmt: skip
    # The gates are not one block per sequence, so they cannot be handed to one backward call each: none are, even where
    # gru saved them for a derivative of its own.
    return (unfolded(output, axis), unfolded(h_n, 0), output.new_empty(0)), (axis, 0, None)


def _one_call_each(
    operator: Callable[..., Any], info: Any, in_dims: tuple[int | None, ...], *arguments: Any
) -> tuple[Any, Any]:
    """The backward's rule too: its gradients of the weights are sums over the batch, which may not be folded."""
    results = [
        operator(*(x.select(dim, i) if dim is not None else x for x, dim in zip(arguments, in_dims, strict=True)))
        for i in range(info.batch_size)
    ]
    outputs = tuple(torch.stack(same) for same in zip(*results, strict=True))
    return outputs, (0,) * len(outputs)


def _through_function() -> bool:
    """torch.func transforms an autograd.Function and not what register_autograd registers; with the compiler and with
    torch.jit.trace it is the other way round."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling() and not torch.jit.is_tracing()  # type: ignore[attr-defined]


def _differentiable_gru(*arguments: Any) -> Any:
    """dien_ops::gru, which saves its gates where a gradient is wanted, but not in an exported or traced graph."""
    *others, save_gates = arguments
    wanted = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in others)
    save_gates |= wanted and not torch.compiler.is_exporting() and not torch.jit.is_tracing()  # type: ignore[attr-defined]
    return (_GRU.apply if _through_function() else torch.ops.dien_ops.gru)(*others, save_gates)


def _differentiable_gru_backward(*arguments: Any) -> Any:
    return (_GRUBackward.apply if _through_function() else _backward_operator)(*arguments)


class _GRU(torch.autograd.Function):
    @staticmethod
    def forward(*arguments: Any) -> Any:
        return torch.ops.dien_ops.gru(*arguments)

    setup_context = staticmethod(_save_for_gru_backward)
    backward = staticmethod(_gru_backward)
    vmap = staticmethod(partial(_gru_vmap, _differentiable_gru))


class _GRUBackward(torch.autograd.Function):
    @staticmethod
    def forward(*arguments: Any) -> Any:
        return _backward_operator(*arguments)

    setup_context = staticmethod(_save_for_double_backward)
    backward = staticmethod(_gru_double_backward)
    vmap = staticmethod(partial(_one_call_each, _differentiable_gru_backward))


torch.library.register_autograd("dien_ops::gru", _gru_backward, setup_context=_save_for_gru_backward)
torch.library.register_autograd("dien_ops::gru_backward", _gru_double_backward, setup_context=_save_for_double_backward)
torch.library.register_vmap("dien_ops::gru", partial(_gru_vmap, torch.ops.dien_ops.gru))

# --------------------------------------------------------------------------------------------------------- functional


def _run(
    input: Tensor,
    attention: Tensor | None,
    hx: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    lengths: Tensor | None,
    gate: str,
    reset_after: bool,
    batch_first: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """Checks what all cells share and calls the operator; under autocast as nn.GRU: the products take autocast's dtype,
    and so do the results on CUDA. On the CPU they take that of the state, which is promoted to the other."""
    _checks.tensor("input", input)
    _checks.boolean("reset_after", reset_after)
    _checks.boolean("batch_first", batch_first)
    _checks.boolean("reverse", reverse)
    kept = None
    dtype = _precision.autocast_dtype(input)
    if dtype is not None:
        if not input.is_cuda:
            kept = torch.promote_types((hx if isinstance(hx, Tensor) else input).dtype, dtype)
        input, attention, hx, weight_ih, weight_hh, bias_ih, bias_hh = _precision.cast(
            dtype, input, attention, hx, weight_ih, weight_hh, bias_ih, bias_hh
        )
    _checks.supported("input", input)
    _checks.rank("input", input, 3)
    _checks.tensor("weight_ih", weight_ih)
    _checks.tensor("weight_hh", weight_hh)
    tensors = {
        "attention": attention, "hx": hx, "weight_ih": weight_ih, "weight_hh": weight_hh,
        "bias_ih": bias_ih, "bias_hh": bias_hh,
    }  # fmt: skip
    _checks.matches("input", input, **tensors)
    _checks.rank("weight_hh", weight_hh, 2)
    batch, steps = input.shape[:2] if batch_first else (input.shape[1], input.shape[0])
    features, hidden = input.shape[2], weight_hh.shape[1]
    _checks.shape("weight_ih", weight_ih, [3 * hidden, features], "[3H, I]")
    _checks.shape("weight_hh", weight_hh, [3 * hidden, hidden], "[3H, H]")
    _checks.shape("bias_ih", bias_ih, [3 * hidden], "[3H]")
    _checks.shape("bias_hh", bias_hh, [3 * hidden], "[3H]")
    _checks.lengths(lengths, batch, input.device)
    rows, meaning = [batch], "[B, H]"
    if attention is not None:
        _checks.rank("attention", attention, 2, 3)
        if attention.dim() == 3:
            targets = attention.shape[1] if batch_first else attention.shape[2]
            rows, meaning = [batch, targets], "[B, C, H]"
            expected, axes = ([*rows, steps], "[B, C, T]") if batch_first else ([steps, *rows], "[T, B, C]")
        else:
            expected, axes = ([batch, steps], "[B, T]") if batch_first else ([steps, batch], "[T, B]")
        _checks.shape("attention", attention, expected, axes)
    _checks.shape("hx", hx, [*rows, hidden], meaning)
    output, h_n, _ = _differentiable_gru(
        input, attention, hx, weight_ih, weight_hh, bias_ih, bias_hh, lengths,
        gate, reset_after, batch_first, reverse, _precision.allow_tf32(input, "rnn"), False,
    )  # fmt: skip
    return (output, h_n) if kept is None else (output.to(kept), h_n.to(kept))


def gru(
    input: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    hx: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    batch_first: bool = False,
    reverse: bool = False,
    reset_after: bool = True,
) -> tuple[Tensor, Tensor]:
    r"""One layer, one direction of a GRU (DIEN eq. 2-5).

    .. math::
        r &= \sigma(W_r x + b_{ir} + U_r h + b_{hr}) \\
        z &= \sigma(W_z x + b_{iz} + U_z h + b_{hz}) \\
        n &= \tanh(W_n x + b_{in} + r \circ (U_n h + b_{hn})) \\
        h' &= (1 - z) \circ n + z \circ h

    The paper's update gate is :math:`u = 1 - z`; the parameters are those of :class:`torch.nn.GRU`.

    Args:
        input: [T, B, I], or [B, T, I] where batch_first; float32, float64, bfloat16 or float16, as all the others.
            Under ``torch.autocast`` they are cast to its dtype; on the CPU the results are promoted to that of hx (of
            the input where None). On CUDA, float32 is multiplied as tf32 where nn.GRU's may be, see
            ``torch.backends.cudnn.rnn.fp32_precision``.
        weight_ih: [3H, I], gates in the order r, z, n.
        weight_hh: [3H, H].
        bias_ih: [3H].
        bias_hh: [3H].
        hx: [B, H], the state before the first step; zeros where None.
        lengths: [B], int32 or int64, each in 0..T, on the input's device. On CUDA nobody waits for them: one outside
            of 0..T is a device-side assertion, which names it and ends the process's use of the GPU.
        batch_first: whether batch comes before time in input and output.
        reverse: run each sequence from its last valid step to its first.
        reset_after: False applies the reset gate before the product, ``n = tanh(W_n x + b_in + U_n (r h) + b_hn)``.

    Returns:
        output, laid out as the input with H as its last axis and 0 behind a row's length, and h_n [B, H], the state
        after the last valid step (hx where the length is 0).

    Raises:
        TypeError, ValueError, RuntimeError: an argument has the wrong type; rank or dtype; size, device or value.

    Example:
        >>> w_ih, w_hh = torch.randn(12, 3), torch.randn(12, 4)
        >>> output, h_n = dien_ops.functional.gru(torch.randn(5, 2, 3), w_ih, w_hh)
        >>> output.shape, h_n.shape
        (torch.Size([5, 2, 4]), torch.Size([2, 4]))
    """
    return _run(
        input, None, hx, weight_ih, weight_hh, bias_ih, bias_hh, lengths, "none", reset_after, batch_first, reverse
    )


def attentional_gru(
    input: Tensor,
    attention: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    hx: Tensor | None = None,
    *,
    gate: str = "paper",
    reset_after: bool = True,
    lengths: Tensor | None = None,
    batch_first: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""A GRU whose steps are weighted by attention scores (DIEN eq. 9-12).

    With r, z, n as in :func:`gru` and the step's score a:

    * ``"paper"`` (AUGRU, eq. 11-12): :math:`h' = (1 - a u) h + a u n` with :math:`u = 1 - z`. With a = 1 it is the GRU;
      with a = 0 the state stands still.
    * ``"authors"`` (AUGRU as released): :math:`h' = (1 - z') n + z' h` with :math:`z' = (1 - a) z`. With a = 0 it is
      the GRU; with a = 1 the candidate replaces the state.
    * ``"replace"`` (AGRU, eq. 10): :math:`h' = (1 - a) h + a n`.
    * ``"input"`` (AIGRU, eq. 9): the GRU over :math:`a x`.

    The two AUGRUs cannot be converted into each other by their weights.

    Args:
        input: [T, B, I], or [B, T, I] where batch_first; dtypes and autocast as in :func:`gru`.
        attention: [T, B], or [T, B, C] for C targets of each sequence ([B, T] or [B, C, T] where batch_first). The
            input's share of the gates is computed once per sequence, not once per target.
        weight_ih, weight_hh, bias_ih, bias_hh: as in :func:`gru`.
        hx: [B, H], or [B, C, H] with several targets; zeros where None.
        gate: which of the four.
        reset_after: False applies the reset gate before the product, as the authors' code does.
        lengths: [B], int32 or int64, each in 0..T.
        batch_first: whether batch comes before time.

    Returns:
        output [T, B, H] or [T, B, C, H] ([B, T, H] or [B, C, T, H]), 0 behind a row's length, and h_n [B, H] or
        [B, C, H].

    Raises:
        TypeError, ValueError, RuntimeError: an argument has the wrong type; rank, dtype or name; size, device or value.

    Example:
        >>> w_ih, w_hh = torch.randn(12, 3), torch.randn(12, 4)
        >>> scores = torch.softmax(torch.randn(2, 7, 5), dim=-1)  # 7 targets for each of 2 sequences
        >>> x = torch.randn(2, 5, 3)
        >>> output, h_n = dien_ops.functional.attentional_gru(x, scores, w_ih, w_hh, batch_first=True)
        >>> output.shape, h_n.shape
        (torch.Size([2, 7, 5, 4]), torch.Size([2, 7, 4]))
    """
    _checks.one_of("gate", gate, ATTENTIONAL_GATES)
    _checks.tensor("attention", attention)
    return _run(
        input, attention, hx, weight_ih, weight_hh, bias_ih, bias_hh, lengths, gate, reset_after, batch_first, False
    )
