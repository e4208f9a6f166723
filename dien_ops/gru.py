# SPDX-License-Identifier: Apache-2.0
"""The recurrent column: GRU (DIEN eq. 2-5), AIGRU, AGRU and AUGRU (DIEN eq. 9-12)."""

from __future__ import annotations

import math
import numbers
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from dien_ops import _checks, reference
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
    *_: Any,
) -> tuple[Tensor, ...]:
    arguments = (input, attention, hx, weight_ih, weight_hh, bias_ih, bias_hh)
    return tuple(input.new_empty(x.shape if x is not None else [0]) for x in arguments)


def _save_for_gru_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, gate, reset_after, batch_first, reverse, _ = inputs
    states, _, gates = output
    ctx.save_for_backward(*tensors, states, gates)
    ctx.options = (gate, reset_after, batch_first, reverse)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(gates)


def _gru_backward(ctx: Any, grad_output: Tensor | None, grad_h_n: Tensor | None, _: None) -> tuple[Any, ...]:
    tensors = ctx.saved_tensors
    if tensors[-1].dim() == 1:
        raise RuntimeError("dien_ops::gru was called with save_gates=False and cannot be differentiated")
    grads = torch.ops.dien_ops.gru_backward(grad_output, grad_h_n, *tensors, *ctx.options)
    present = [g if x is not None else None for g, x in zip(grads, tensors, strict=False)]
    return (*present, None, *[None] * 5)  # lengths; gate, reset_after, batch_first, reverse, save_gates


def _save_for_double_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:10])
    ctx.options = inputs[12:]
    ctx.set_materialize_grads(False)


def _gru_double_backward(ctx: Any, *grad_grads: Tensor | None) -> tuple[Any, ...]:
    grad_output, grad_h_n, *primals, lengths = ctx.saved_tensors
    gate, reset_after, batch_first, reverse = ctx.options

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
    return (*for_grads, *for_primals, *[None] * 7)  # lengths, output, gates; the options


torch.library.register_autograd("dien_ops::gru", _gru_backward, setup_context=_save_for_gru_backward)
torch.library.register_autograd("dien_ops::gru_backward", _gru_double_backward, setup_context=_save_for_double_backward)

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
    """Checks what all cells share and calls the operator."""
    _checks.supported("input", input)
    _checks.rank("input", input, 3)
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
    save_gates = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (input, *tensors.values()))
    output, h_n, _ = torch.ops.dien_ops.gru(
        input, attention, hx, weight_ih, weight_hh, bias_ih, bias_hh, lengths,
        gate, reset_after, batch_first, reverse, save_gates,
    )  # fmt: skip
    return output, h_n


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
        input: [T, B, I], or [B, T, I] where batch_first.
        weight_ih: [3H, I], gates in the order r, z, n.
        weight_hh: [3H, H].
        bias_ih: [3H].
        bias_hh: [3H].
        hx: [B, H], the state before the first step; zeros where None.
        lengths: [B], int32 or int64, each in 0..T, on the input's device.
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
        input: [T, B, I], or [B, T, I] where batch_first.
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


# ------------------------------------------------------------------------------------------------------------ modules


def _add_gru_parameters(
    module: nn.Module, suffix: str, input_size: int, hidden_size: int, bias: bool, **factory: Any
) -> None:
    module.register_parameter(f"weight_ih_{suffix}", nn.Parameter(torch.empty(3 * hidden_size, input_size, **factory)))
    module.register_parameter(f"weight_hh_{suffix}", nn.Parameter(torch.empty(3 * hidden_size, hidden_size, **factory)))
    if bias:
        module.register_parameter(f"bias_ih_{suffix}", nn.Parameter(torch.empty(3 * hidden_size, **factory)))
        module.register_parameter(f"bias_hh_{suffix}", nn.Parameter(torch.empty(3 * hidden_size, **factory)))


def _check_sizes(input_size: int, hidden_size: int) -> None:
    for name, size in (("input_size", input_size), ("hidden_size", hidden_size)):
        if not isinstance(size, int):
            raise TypeError(f"{name} must be an int, got {type(size).__name__}")
    if hidden_size <= 0:
        raise ValueError(f"hidden_size must be greater than zero, got {hidden_size}")
    if input_size < 0:
        raise ValueError(f"input_size must not be negative, got {input_size}")


class _Recurrent(nn.Module):
    """What GRU and the attentional cells share: sizes, parameters by nn.GRU's names, initialisation."""

    input_size: int
    hidden_size: int
    bias: bool
    batch_first: bool

    def reset_parameters(self) -> None:
        """As nn.GRU: all parameters uniform in -1/sqrt(H)..1/sqrt(H), in the order of nn.GRU's parameters."""
        bound = 1.0 / math.sqrt(self.hidden_size)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def flatten_parameters(self) -> None:
        """Does nothing: there is no flat buffer to rebuild. Kept because code written for nn.GRU calls it."""

    def _weights(self, suffix: str) -> list[Tensor | None]:
        names = (f"weight_ih_{suffix}", f"weight_hh_{suffix}", f"bias_ih_{suffix}", f"bias_hh_{suffix}")
        return [getattr(self, name) if self.bias or name.startswith("weight") else None for name in names]

    def _check_features(self, input: Tensor) -> None:
        if input.shape[-1] != self.input_size:
            raise RuntimeError(
                f"input.size(-1) must be equal to input_size. Expected {self.input_size}, got {input.shape[-1]}"
            )


class GRU(_Recurrent):
    r"""A GRU (DIEN eq. 2-5): constructor, parameters, initialisation and results of :class:`torch.nn.GRU`.

    Beyond it: ``lengths`` on the input's device with zeros allowed and no packing, backward in eval mode, double
    backward, ``torch.compile(fullgraph=True)`` and ``torch.export`` without a graph break, reproducible bits.
    Equations: :func:`dien_ops.functional.gru`.

    Args:
        input_size: I, the features of the input.
        hidden_size: H, the features of the state.
        num_layers: stacked layers; each takes the output of the one below.
        bias: whether the gates have the biases b_ih and b_hh.
        batch_first: [B, T, I] instead of [T, B, I]; does not apply to hx and h_n.
        dropout: probability of dropping an output of every layer but the last, in training.
        bidirectional: a second set of weights runs each sequence backwards; outputs are concatenated.
        device, dtype: of the parameters; float32 and float64 are supported.

    Shapes: with L = num_layers and N = 2 if bidirectional else 1,

    * input [T, B, I], [B, T, I] where batch_first, [T, I] unbatched, or a PackedSequence
    * hx [L * N, B, H] ([L * N, H] unbatched), zeros where None
    * lengths [B], int32 or int64, each in 0..T; not with unbatched or packed input
    * output as the input with N * H features, 0 behind a row's length; a PackedSequence where one came in
    * h_n as hx: each layer's and direction's state after its last valid step, hx where the length is 0

    Raises:
        ValueError: wrong rank or dtype, lengths together with a PackedSequence.
        RuntimeError: wrong size or device, lengths outside 0..T.

    Example:
        >>> rnn = dien_ops.GRU(36, 36, batch_first=True)
        >>> rnn.load_state_dict(torch.nn.GRU(36, 36).state_dict())
        <All keys matched successfully>
        >>> output, h_n = rnn(torch.randn(8, 50, 36), lengths=torch.randint(0, 51, (8,)))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_sizes(input_size, hidden_size)
        if num_layers <= 0:
            raise ValueError(f"num_layers must be greater than zero, got {num_layers}")
        if not isinstance(dropout, numbers.Number) or isinstance(dropout, bool) or not 0 <= dropout <= 1:
            raise ValueError(
                f"dropout must be a number in 0..1, the probability of dropping an output, got {dropout!r}"
            )
        if dropout > 0 and num_layers == 1:
            warnings.warn(
                f"dropout acts between layers, on the outputs of all but the last: dropout={dropout} does nothing "
                f"with num_layers=1",
                stacklevel=2,
            )
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.bias = bias
        self.batch_first = batch_first
        self.dropout = float(dropout)
        self.bidirectional = bidirectional
        width = hidden_size * len(self._directions)
        for layer in range(num_layers):
            for suffix in self._directions:
                _add_gru_parameters(
                    self, f"l{layer}{suffix}", input_size if layer == 0 else width, hidden_size, bias,
                    device=device, dtype=dtype,
                )  # fmt: skip
        self.reset_parameters()

    @property
    def _directions(self) -> tuple[str, ...]:
        return ("", "_reverse") if self.bidirectional else ("",)

    @property
    def all_weights(self) -> list[list[Tensor]]:
        """The parameters of each layer and direction, as nn.GRU's."""
        return [
            [w for w in self._weights(f"l{layer}{suffix}") if w is not None]
            for layer in range(self.num_layers)
            for suffix in self._directions
        ]

    def extra_repr(self) -> str:
        options = [f"{self.input_size}, {self.hidden_size}"]
        defaults = {
            "num_layers": 1, "bias": True, "batch_first": False, "dropout": 0.0, "bidirectional": False,
        }  # fmt: skip
        options += [f"{k}={getattr(self, k)}" for k, default in defaults.items() if getattr(self, k) != default]
        return ", ".join(options)

    def forward(
        self, input: Tensor | PackedSequence, hx: Tensor | None = None, *, lengths: Tensor | None = None
    ) -> tuple[Any, Tensor]:
        if isinstance(input, PackedSequence):
            if lengths is not None:
                raise ValueError("lengths must not be given with a PackedSequence, which has its own")
            return self._forward_packed(input, hx)
        _checks.tensor("input", input)
        if input.dim() not in (2, 3):
            raise ValueError(f"GRU: Expected input to be 2D or 3D, got {input.dim()}D instead")
        if input.dim() == 3:
            return self._forward_batched(input, hx, lengths, self.batch_first)
        if lengths is not None:
            raise ValueError("lengths must not be given with unbatched 2-D input")
        if hx is not None and hx.dim() != 2:
            raise RuntimeError(f"For unbatched 2-D input, hx should also be 2-D but got {hx.dim()}-D tensor")
        output, h_n = self._forward_batched(
            input.unsqueeze(1), hx.unsqueeze(1) if hx is not None else None, None, batch_first=False
        )
        return output.squeeze(1), h_n.squeeze(1)

    def _forward_batched(
        self, input: Tensor, hx: Tensor | None, lengths: Tensor | None, batch_first: bool
    ) -> tuple[Tensor, Tensor]:
        self._check_features(input)
        batch = input.shape[0 if batch_first else 1]
        if hx is not None:
            _checks.tensor("hx", hx)
            expected = (self.num_layers * len(self._directions), batch, self.hidden_size)
            if tuple(hx.shape) != expected:
                raise RuntimeError(f"Expected hidden size {expected}, got {list(hx.shape)}")
        layer_input, states = input, list[Tensor]()
        for layer in range(self.num_layers):
            if layer > 0 and self.dropout > 0:
                layer_input = F.dropout(layer_input, self.dropout, self.training)
            outputs = []
            for suffix in self._directions:
                w_ih, w_hh, b_ih, b_hh = self._weights(f"l{layer}{suffix}")
                assert w_ih is not None and w_hh is not None
                output, state = gru(
                    layer_input, w_ih, w_hh, b_ih, b_hh,
                    hx[len(states)] if hx is not None else None,
                    lengths=lengths, batch_first=batch_first, reverse=suffix == "_reverse",
                )  # fmt: skip
                outputs.append(output)
                states.append(state)
            layer_input = torch.cat(outputs, dim=-1) if len(outputs) > 1 else outputs[0]
        return layer_input, torch.stack(states)

    def _forward_packed(self, packed: PackedSequence, hx: Tensor | None) -> tuple[PackedSequence, Tensor]:
        padded, lengths = pad_packed_sequence(packed)
        output, h_n = self._forward_batched(padded, hx, lengths.to(padded.device), batch_first=False)
        if packed.sorted_indices is not None:
            output, lengths = output.index_select(1, packed.sorted_indices), lengths[packed.sorted_indices.cpu()]
        data = pack_padded_sequence(output, lengths).data
        return PackedSequence(data, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices), h_n


class _AttentionalGRU(_Recurrent):
    """One layer of attentional_gru with nn.GRU's parameters."""

    gate: str

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        batch_first: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        reset_after: bool = True,
    ) -> None:
        super().__init__()
        _check_sizes(input_size, hidden_size)
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.bias = bias
        self.batch_first = batch_first
        self.reset_after = reset_after
        _add_gru_parameters(self, "l0", input_size, hidden_size, bias, device=device, dtype=dtype)
        self.reset_parameters()

    def extra_repr(self) -> str:
        options = [f"{self.input_size}, {self.hidden_size}"]
        defaults = {"bias": True, "batch_first": False, "reset_after": True}
        options += [f"{k}={getattr(self, k)}" for k, default in defaults.items() if getattr(self, k) != default]
        return ", ".join(options)

    def forward(
        self, input: Tensor, attention: Tensor, hx: Tensor | None = None, *, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        _checks.tensor("input", input)
        _checks.tensor("attention", attention)
        _checks.rank("input", input, 3)
        _checks.rank("attention", attention, 2, 3)
        self._check_features(input)
        if hx is not None:
            _checks.tensor("hx", hx)
            batch = input.shape[0 if self.batch_first else 1]
            targets = [attention.shape[1 if self.batch_first else 2]] if attention.dim() == 3 else []
            expected = (1, batch, *targets, self.hidden_size)
            if tuple(hx.shape) != expected:
                raise RuntimeError(f"Expected hidden size {expected}, got {list(hx.shape)}")
        w_ih, w_hh, b_ih, b_hh = self._weights("l0")
        assert w_ih is not None and w_hh is not None
        output, state = attentional_gru(
            input, attention, w_ih, w_hh, b_ih, b_hh, hx[0] if hx is not None else None,
            gate=self.gate, reset_after=self.reset_after, lengths=lengths, batch_first=self.batch_first,
        )  # fmt: skip
        return output, state.unsqueeze(0)


_SHAPES = """

    Args:
        input_size: I, the features of the input.
        hidden_size: H, the features of the state.
        bias: whether the gates have the biases b_ih and b_hh.
        batch_first: batch before time in input, attention and output.
        device, dtype: of the parameters; float32 and float64 are supported.
        reset_after: the reset gate acts after the product with the state (the paper, torch, cuDNN) or, False, before it
            (the authors' TensorFlow code). No conversion of weights leads from one to the other.

    Shapes: C targets of each sequence, scored in one call, are optional.

    * input [T, B, I], or [B, T, I] where batch_first
    * attention [T, B] or [T, B, C]; [B, T] or [B, C, T] where batch_first
    * hx [1, B, H] or [1, B, C, H], zeros where None
    * lengths [B], int32 or int64, each in 0..T
    * output [T, B, H] or [T, B, C, H] ([B, T, H] or [B, C, T, H]), 0 behind a row's length
    * h_n as hx: the state after the last valid step, hx where the length is 0

    Parameters, their names and initialisation are those of a one-layer :class:`torch.nn.GRU`.

    Raises:
        ValueError: wrong rank, dtype or gate.
        RuntimeError: wrong size or device, lengths outside 0..T.
"""


class AIGRU(_AttentionalGRU):
    __doc__ = f"""GRU with attentional input (DIEN eq. 9): the GRU over a x.{_SHAPES}
    Example:
        >>> aigru = dien_ops.AIGRU(36, 36, batch_first=True)
        >>> output, h_n = aigru(torch.randn(8, 50, 36), torch.rand(8, 50))
    """
    gate = "input"


class AGRU(_AttentionalGRU):
    __doc__ = f"""Attention based GRU (DIEN eq. 10): h' = (1 - a) h + a n, the score replaces the update gate.{_SHAPES}
    Example:
        >>> agru = dien_ops.AGRU(36, 36, batch_first=True)
        >>> output, h_n = agru(torch.randn(8, 50, 36), torch.rand(8, 50))
    """
    gate = "replace"


class AUGRU(_AttentionalGRU):
    __doc__ = f"""GRU with attentional update gate (DIEN eq. 11-12).

    ``gate="paper"``: h' = (1 - a u) h + a u n with u = 1 - z. With a = 1 it is the GRU; with a = 0 the state stands
    still. ``gate="authors"``: h' = (1 - z') n + z' h with z' = (1 - a) z, the form of the released code, oneDNN and
    OpenVINO. With a = 0 it is the GRU. Neither can be converted into the other.{_SHAPES}
    Example:
        >>> augru = dien_ops.AUGRU(36, 36, batch_first=True)
        >>> scores = torch.softmax(torch.randn(1, 200, 50), dim=-1)  # 200 ads for one user
        >>> _, h_n = augru(torch.randn(1, 50, 36), scores)
        >>> h_n.shape
        torch.Size([1, 1, 200, 36])
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        batch_first: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        reset_after: bool = True,
        gate: str = "paper",
    ) -> None:
        _checks.one_of("gate", gate, ("paper", "authors"))
        super().__init__(input_size, hidden_size, bias, batch_first, device, dtype, reset_after=reset_after)
        self.gate = gate

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", gate={self.gate!r}" if self.gate != "paper" else "")
