# SPDX-License-Identifier: Apache-2.0
"""The recurrent column as modules: GRU in the place of torch.nn.GRU, AIGRU, AGRU and AUGRU."""

from __future__ import annotations

import math
import numbers
import warnings
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, SupportsIndex, TypeVar, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from dien_ops import _checks, _precision, gru_weights
from dien_ops.gru import attentional_gru, gru

_GRU = TypeVar("_GRU", bound="GRU")
_Cell = TypeVar("_Cell", bound="_AttentionalGRU")


def _add_gru_parameters(
    module: nn.Module, suffix: str, input_size: int, hidden_size: int, bias: bool, **factory: Any
) -> None:
    module.register_parameter(f"weight_ih_{suffix}", nn.Parameter(torch.empty(3 * hidden_size, input_size, **factory)))
    module.register_parameter(f"weight_hh_{suffix}", nn.Parameter(torch.empty(3 * hidden_size, hidden_size, **factory)))
    if bias:
        module.register_parameter(f"bias_ih_{suffix}", nn.Parameter(torch.empty(3 * hidden_size, **factory)))
        module.register_parameter(f"bias_hh_{suffix}", nn.Parameter(torch.empty(3 * hidden_size, **factory)))


class _Recurrent(nn.Module):
    """What GRU and the attentional cells share: sizes, parameters by nn.GRU's names, initialisation."""

    input_size: int
    hidden_size: int
    bias: bool
    batch_first: bool
    _defaults: ClassVar[dict[str, Any]]  # the constructor's other options; repr shows those that differ

    def extra_repr(self) -> str:
        options = [f"{self.input_size}, {self.hidden_size}"]
        options += [f"{k}={getattr(self, k)!r}" for k, default in self._defaults.items() if getattr(self, k) != default]
        return ", ".join(options)

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

    def _check_input(self, input: Tensor) -> None:
        """Its features and its dtype against the parameters'."""
        parameter = next(self.parameters(), None)  # None where code has put plain tensors in the parameters' places
        if parameter is not None and input.dtype != parameter.dtype and _precision.autocast_dtype(input) is None:
            convertible = input.dtype in _checks.ANY_PRECISION
            raise ValueError(
                f"input must have the dtype of the parameters: expected {parameter.dtype}, got {input.dtype}; convert "
                f"it with input.to({parameter.dtype})"
                + (f", or the module with .to({input.dtype})" if convertible else "")
            )
        if input.shape[-1] != self.input_size:
            raise RuntimeError(
                f"input.size(-1) must be equal to input_size. Expected {self.input_size}, got {input.shape[-1]}"
            )


class GRU(_Recurrent):
    r"""A GRU (DIEN eq. 2-5): constructor, parameters, initialisation and results of :class:`torch.nn.GRU`.

    Beyond it: ``lengths`` on the input's device with zeros allowed and no packing, backward in eval mode, double
    backward, ``torch.compile(fullgraph=True)``, ``torch.export`` and AOTInductor without a graph break, ``torch.vmap``,
    reproducible bits. Equations: :func:`dien_ops.functional.gru`.

    Args:
        input_size: I, the features of the input.
        hidden_size: H, the features of the state.
        num_layers: stacked layers; each takes the output of the one below.
        bias: whether the gates have the biases b_ih and b_hh.
        batch_first: [B, T, I] instead of [T, B, I]; does not apply to hx and h_n.
        dropout: probability of dropping an output of every layer but the last, in training. On the CPU it draws the
            random numbers that nn.GRU draws.
        bidirectional: a second set of weights runs each sequence backwards; outputs are concatenated.
        device, dtype: of the parameters; float32, float64, bfloat16 and float16 are supported.

    Shapes: with L = num_layers and N = 2 if bidirectional else 1,

    * input [T, B, I], [B, T, I] where batch_first, [T, I] unbatched, or a PackedSequence
    * hx [L * N, B, H] ([L * N, H] unbatched), zeros where None
    * lengths [B], int32 or int64, each in 0..T; not with unbatched or packed input
    * output as the input with N * H features, 0 behind a row's length; a PackedSequence where one came in
    * h_n as hx: each layer's and direction's state after its last valid step, hx where the length is 0

    Under ``torch.autocast`` the products take autocast's dtype, and output and h_n have the dtype that nn.GRU's have:
    on CUDA autocast's, on the CPU that of hx (of the input where None), promoted to autocast's.

    ``torch.vmap`` over input, hx or lengths folds the mapped axis into the batch; over the weights, as for an ensemble,
    it makes one call for each. ``torch.func.grad`` and ``vmap(grad)`` work, the latter with one backward call for each
    sample; ``torch.compile`` does not compile ``torch.func.grad`` of this module.

    An exported graph (``torch.export``, ``torch.jit.trace``) saves nothing for backward, whether gradients are enabled
    or not. It can be trained all the same: backward then runs the forward once more.

    Differences from nn.GRU:

    * ``isinstance(module, nn.GRU)`` is False: loops that look for it, to initialise or to quantize
      (``quantize_dynamic``), pass this module by. :meth:`from_torch` and :meth:`to_torch` convert.
    * Derivatives are taken in reverse mode only: no ``torch.func.jvp``. No ``torch.jit.script``.
    * An output that backward still needs must not be changed in place.
    * hx must have as many rows as a packed batch. A sequence of no steps (T = 0) is allowed.
    * There are no proj_size and mode, and none of nn.GRU's undocumented members: ``_flat_weights``,
      ``check_forward_args``, ``permute_hidden``.

    Raises:
        TypeError: input or hx is no Tensor.
        ValueError: wrong rank or dtype of the input, lengths together with a PackedSequence.
        RuntimeError: wrong size or device, wrong rank or dtype of hx, lengths outside 0..T.

    Example:
        >>> rnn = dien_ops.GRU(36, 36, batch_first=True)
        >>> rnn.load_state_dict(torch.nn.GRU(36, 36).state_dict())
        <All keys matched successfully>
        >>> output, h_n = rnn(torch.randn(8, 50, 36), lengths=torch.randint(0, 51, (8,)))
    """

    _defaults: ClassVar[dict[str, Any]] = {
        "num_layers": 1,
        "bias": True,
        "batch_first": False,
        "dropout": 0.0,
        "bidirectional": False,
    }

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
        _checks.size("input_size", input_size)
        _checks.size("hidden_size", hidden_size)
        _checks.boolean("bias", bias)
        _checks.boolean("batch_first", batch_first)
        if not isinstance(num_layers, SupportsIndex):
            raise TypeError(f"num_layers must be an int, got {type(num_layers).__name__}")
        if num_layers <= 0:
            raise ValueError(f"num_layers must be greater than zero, got {num_layers}")
        if dropout is None or isinstance(dropout, complex):
            raise TypeError(f"dropout must be a real number, got {type(dropout).__name__}")
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

    @classmethod
    def from_torch(cls: type[_GRU], rnn: nn.GRU) -> _GRU:
        """A copy of a torch.nn.GRU: its options, parameters, their dtype, device and requires_grad, and training mode.

        Raises:
            TypeError: rnn is no torch.nn.GRU, or a subclass of it, which may compute something else.
            ValueError: a weight of it is parametrized.

        Example:
            >>> fast = dien_ops.GRU.from_torch(torch.nn.GRU(36, 36, num_layers=2, batch_first=True))
        """
        return gru_weights.copied(cls, gru_weights.torch_gru(rnn), ("input_size", "hidden_size", *cls._defaults))

    def to_torch(self) -> nn.GRU:
        """A copy as a torch.nn.GRU, the inverse of :meth:`from_torch`.

        Raises:
            ValueError: a weight is parametrized.

        Example:
            >>> rnn = dien_ops.GRU(36, 36).to_torch()  # for torch.onnx, or where dien_ops is not installed
        """
        gru_weights.check_plain("the GRU", self)
        return gru_weights.copied(nn.GRU, self, ("input_size", "hidden_size", *self._defaults))

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

    @overload
    def forward(
        self, input: Tensor, hx: Tensor | None = None, *, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]: ...

    @overload
    def forward(self, input: PackedSequence, hx: Tensor | None = None) -> tuple[PackedSequence, Tensor]: ...

    def forward(
        self, input: Tensor | PackedSequence, hx: Tensor | None = None, *, lengths: Tensor | None = None
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        if hx is not None:
            _checks.tensor("hx", hx)
        if isinstance(input, PackedSequence):
            if lengths is not None:
                raise ValueError("lengths must not be given with a PackedSequence, which has its own")
            return self._forward_packed(input, hx)
        _checks.tensor("input", input)
        if input.dim() not in (2, 3):
            raise ValueError(f"GRU: Expected input to be 2D or 3D, got {input.dim()}D instead")
        if input.dim() == 3:
            if hx is not None and hx.dim() != 3:
                raise RuntimeError(f"For batched 3-D input, hx should also be 3-D but got {hx.dim()}-D tensor")
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
        def dropped(x: Tensor) -> Tensor:  # in the order in which nn.GRU draws its random numbers: time first
            if not batch_first:
                return F.dropout(x, self.dropout)
            return F.dropout(x.transpose(0, 1).contiguous(), self.dropout).transpose(0, 1)

        self._check_input(input)
        self._check_hx(input, hx, input.shape[0 if batch_first else 1])
        return self._run_layers(input, hx, lengths, batch_first, dropped)

    def _forward_packed(self, packed: PackedSequence, hx: Tensor | None) -> tuple[PackedSequence, Tensor]:
        data, batch_sizes, sorted_indices, unsorted_indices = packed
        if data.dim() != 2:
            raise RuntimeError(f"input must have 2 dimensions, got {data.dim()}")
        self._check_input(data)
        self._check_hx(data, hx, int(batch_sizes[0]))

        def padded(data: Tensor) -> Tensor:  # the rows stay as they are packed, the longest first
            return pad_packed_sequence(PackedSequence(data, batch_sizes))[0]

        def packed_data(x: Tensor) -> Tensor:
            return pack_padded_sequence(x, lengths).data

        def dropped(x: Tensor) -> Tensor:  # nn.GRU draws no random numbers for padding
            return padded(F.dropout(packed_data(x), self.dropout))

        input, lengths = pad_packed_sequence(PackedSequence(data, batch_sizes))
        if hx is not None and sorted_indices is not None:
            hx = hx.index_select(1, sorted_indices)
        output, h_n = self._run_layers(input, hx, lengths.to(input.device), False, dropped)
        if unsorted_indices is not None:
            h_n = h_n.index_select(1, unsorted_indices)
        return PackedSequence(packed_data(output), batch_sizes, sorted_indices, unsorted_indices), h_n

    def _check_hx(self, input: Tensor, hx: Tensor | None, batch: int) -> None:
        if hx is None:
            return
        expected = (self.num_layers * len(self._directions), batch, self.hidden_size)
        if tuple(hx.shape) != expected:
            raise RuntimeError(f"Expected hidden size {expected}, got {list(hx.shape)}")
        if hx.dtype != input.dtype and _precision.autocast_dtype(input) is None:
            raise RuntimeError(f"hx must have the dtype of input: expected {input.dtype}, got {hx.dtype}")

    def _run_layers(
        self,
        input: Tensor,
        hx: Tensor | None,
        lengths: Tensor | None,
        batch_first: bool,
        dropped: Callable[[Tensor], Tensor],
    ) -> tuple[Tensor, Tensor]:
        layer_input = input
        states: list[Tensor] = []
        for layer in range(self.num_layers):
            if layer > 0 and self.dropout > 0 and self.training:
                layer_input = dropped(layer_input)
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


class _AttentionalGRU(_Recurrent):
    """One layer of attentional_gru with nn.GRU's parameters."""

    gate: str
    _defaults: ClassVar[dict[str, Any]] = {"bias": True, "batch_first": False, "reset_after": True}
    _set_by_library: tuple[str, ...] = ("reset_after",)  # arguments that say which function of the weights is computed

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
        _checks.size("input_size", input_size)
        _checks.size("hidden_size", hidden_size)
        _checks.boolean("bias", bias)
        _checks.boolean("batch_first", batch_first)
        _checks.boolean("reset_after", reset_after)
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.bias = bias
        self.batch_first = batch_first
        self.reset_after = reset_after
        _add_gru_parameters(self, "l0", input_size, hidden_size, bias, device=device, dtype=dtype)
        self.reset_parameters()

    @classmethod
    def from_torch(cls: type[_Cell], rnn: nn.GRU, **options: Any) -> _Cell:
        """A cell with a copy of the parameters of a torch.nn.GRU of one layer and one direction.

        Copies batch_first, the parameters' dtype, device and requires_grad, and the training mode too.

        Args:
            rnn: the GRU. It resets after the product with the state, as a cell does by default.
            options: the constructor's keyword-only arguments: ``gate`` of an AUGRU.

        Raises:
            TypeError: rnn is no torch.nn.GRU, or a subclass of it, which may compute something else; an option is one
                that is copied.
            ValueError: rnn has several layers or both directions, or a weight of it is parametrized.

        Example:
            >>> augru = dien_ops.AUGRU.from_torch(torch.nn.GRU(36, 36, batch_first=True), gate="authors")
        """
        rnn = gru_weights.torch_gru(rnn)
        if rnn.num_layers != 1 or rnn.bidirectional:
            raise ValueError(
                f"rnn must have one layer and one direction, got num_layers={rnn.num_layers}, "
                f"bidirectional={rnn.bidirectional}"
            )
        same = ("input_size", "hidden_size", "bias", "batch_first")
        for name in options.keys() & {*same, "device", "dtype"}:
            raise TypeError(f"{name} must not be given: it is copied from rnn")
        return gru_weights.copied(cls, rnn, same, **options)

    @classmethod
    def from_library(
        cls: type[_Cell], library: str, weights: Mapping[str, Any], *, prefix: str = "", batch_first: bool = False
    ) -> _Cell:
        """A cell that gives another library's results with a copy of its weights.

        The library decides where the reset gate acts, and for an AUGRU the gate: no weights turn reset_after=True into
        False, or the paper's AUGRU into the authors'. Libraries, layouts: :mod:`dien_ops.gru_weights`.

        Args:
            library: ``"tensorflow"``, ``"deepctr_torch"``, ``"fuxictr"``, ``"recbole"``, ``"onednn"``,
                ``"onednn_lbr"`` or ``"openvino"``.
            weights: the library's tensors or NumPy arrays by its own names: the state_dict of its cell, the variables
                of a checkpoint, the inputs of its operator. Their dtype and device become the cell's.
            prefix: what stands before the names, where weights is a whole model's.
            batch_first: of the cell.

        Raises:
            TypeError: weights is no mapping, or one of them neither Tensor nor array.
            ValueError: an unknown library; names that are missing or not the layout's; a wrong rank or dtype.
            RuntimeError: a wrong size or device.

        Example:
            >>> variables = {"gates/kernel": torch.randn(72, 72), "gates/bias": torch.ones(72),
            ...              "candidate/kernel": torch.randn(72, 36), "candidate/bias": torch.zeros(36)}
            >>> dien_ops.AUGRU.from_library("tensorflow", variables, batch_first=True)
            AUGRU(36, 36, batch_first=True, reset_after=False, gate='authors')
        """
        state = gru_weights.from_library(library, weights, prefix)
        weight = state["weight_ih_l0"]
        hidden, features = weight.shape[0] // 3, weight.shape[1]
        cell = cls(
            features, hidden, "bias_ih_l0" in state, batch_first, "meta", weight.dtype,
            **{name: gru_weights.LAYOUTS[library].augru[name] for name in cls._set_by_library},
        ).to_empty(device=weight.device)  # fmt: skip
        cell.load_state_dict(state)
        return cell

    def to_library(self, library: str) -> dict[str, Tensor]:
        """A copy of the weights by the library's names in its layout, the inverse of :meth:`from_library`.

        Raises:
            ValueError: an unknown library, or one whose cell computes something else; a weight is parametrized.

        Example:
            >>> cell = dien_ops.AUGRU(36, 36, reset_after=False, gate="authors")
            >>> list(cell.to_library("openvino"))
            ['W', 'R', 'B']
        """
        _checks.one_of("library", library, tuple(gru_weights.LAYOUTS))
        theirs = gru_weights.LAYOUTS[library].augru
        for name in self._set_by_library:
            if getattr(self, name) != theirs[name]:
                raise ValueError(
                    f"{library} computes {name}={theirs[name]!r}, this {type(self).__name__} has "
                    f"{name}={getattr(self, name)!r}, and no weights turn one into the other"
                )
        gru_weights.check_plain("the cell", self)
        return gru_weights.to_library(library, self.state_dict())

    def forward(
        self, input: Tensor, attention: Tensor, hx: Tensor | None = None, *, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        _checks.tensor("input", input)
        _checks.tensor("attention", attention)
        _checks.rank("input", input, 3)
        _checks.rank("attention", attention, 2, 3)
        self._check_input(input)
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
        device, dtype: of the parameters; float32, float64, bfloat16 and float16 are supported.
        reset_after: the reset gate acts after the product with the state (the paper, torch, cuDNN) or, False, before it
            (the authors' TensorFlow code). No conversion of weights leads from one to the other.

    Shapes: C targets of each sequence, scored in one call, are optional.

    * input [T, B, I], or [B, T, I] where batch_first
    * attention [T, B] or [T, B, C]; [B, T] or [B, C, T] where batch_first
    * hx [1, B, H] or [1, B, C, H], zeros where None
    * lengths [B], int32 or int64, each in 0..T
    * output [T, B, H] or [T, B, C, H] ([B, T, H] or [B, C, T, H]), 0 behind a row's length
    * h_n as hx: the state after the last valid step, hx where the length is 0

    Parameters, their names and initialisation are those of a one-layer :class:`torch.nn.GRU`; autocast, ``torch.vmap``,
    ``torch.func.grad`` and export behave as for :class:`GRU`.

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

    _defaults: ClassVar[dict[str, Any]] = _AttentionalGRU._defaults | {"gate": "paper"}
    _set_by_library = ("reset_after", "gate")

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

    def to_library(self, library: str) -> dict[str, Tensor]:
        """As the other cells'; "deepctr_torch" takes no biases that differ: its AUGRUCell has one tensor for both."""
        weights = super().to_library(library)
        if library == "deepctr_torch" and self.bias and not torch.equal(weights["bias_ih"], weights["bias_hh"]):
            raise ValueError(
                "the AUGRUCell of deepctr_torch has one tensor for both biases, and this AUGRU's bias_ih and bias_hh "
                "differ"
            )
        return weights
