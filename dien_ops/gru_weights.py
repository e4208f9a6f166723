# SPDX-License-Identifier: Apache-2.0
"""Weights of a recurrent layer from and to the layouts of other libraries.

Beside :class:`torch.nn.GRU`, a library has its own order of the gates, its own meaning of the update gate (the weight
of the old state, z, or of the candidate, u = 1 - z: rows and biases change sign), orientation and number of biases. All
of that can be converted; :data:`LAYOUTS` says it for each library. Two things cannot, because they make another
function of the same weights: whether the reset gate acts after or before the product with the state, and whether the
attention scales u (``gate="paper"``) or z (``gate="authors"``).

=================  ======================================================  =======  =====  ======  =======
library            cells                                                   gates    reset  biases  AUGRU
=================  ======================================================  =======  =====  ======  =======
"tensorflow"       GRUCell, and of the authors' code, its XDL port,        r, z, n  before 1       authors
                   DeepCTR, EasyRec and NVIDIA's SIM: QAAttGRUCell (AGRU)
                   and VecAttGRUCell (AUGRU)
"deepctr_torch"    AGRUCell, AUGRUCell                                     r, u, n  after  2       paper
"fuxictr"          AGRUCell, AUGRUCell                                     u, r, n  after  2       paper
"recbole"          AGRUCell, AUGRUCell                                     r, u, n  after  2       paper
"onednn"           gru, augru; weights in ldigo, biases in ldgo            z, r, n  before 1       authors
"onednn_lbr"       lbr_gru, lbr_augru; the same                            z, r, n  after  1 + 1   authors
"openvino"         GRUCell, AUGRUCell; of a sequence W[0], R[0], B[0]      z, r, n  before 1       authors
=================  ======================================================  =======  =====  ======  =======

An AIGRU is the library's GRU over a x. oneDNN and OpenVINO have no AGRU; :class:`AGRU` takes their GRU's weights, and
places the reset gate as they do. FuxiCTR's ``DynamicGRU(gru_type="AGRU")`` builds its AUGRUCell: load it as an AUGRU.

Where a gate has one bias it becomes ``bias_ih``, and ``bias_hh`` is 0; on the way back the two are added. The second 1
of "onednn_lbr" is the candidate's bias inside of the reset gate's product.

DeepCTR-Torch's AUGRUCell registers one tensor as both ``bias_ih`` and ``bias_hh``: its state_dict has the same values
under both names, and its gates add them twice. That is what the weights mean, and what is loaded, into two parameters.
An AUGRU whose biases differ does not fit into that cell.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from dien_ops import _checks

_NAMES = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
_GATES = "rzn"
_OTHER_SIGN = {"u": "z", "z": "u"}

# ---------------------------------------------------------------------------------------------------------- packings
# A packing leads from a library's tensors to weight_ih [3H, I], weight_hh [3H, H], bias_ih [3H] and bias_hh [3H], gates
# in the library's order; its inverse leads back. Biases are None where the library's layer has none.


def _to_rows(w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None) -> tuple[Tensor | None, ...]:
    return w_ih, w_hh, b_ih, b_hh


def _from_rows(w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor) -> tuple[Tensor, ...]:
    return w_ih, w_hh, b_ih, b_hh


def _to_rows_one_bias(w_ih: Tensor, w_hh: Tensor, b: Tensor) -> tuple[Tensor | None, ...]:
    return w_ih, w_hh, b, torch.zeros_like(b)


def _from_rows_one_bias(w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor) -> tuple[Tensor, ...]:
    return w_ih, w_hh, b_ih + b_hh


def _to_kernels(gates: Tensor, gates_bias: Tensor, candidate: Tensor, candidate_bias: Tensor) -> tuple[Tensor, ...]:
    hidden = candidate.shape[1]
    rows = torch.cat((gates, candidate), dim=1).t()
    bias = torch.cat((gates_bias, candidate_bias))
    return rows[:, :-hidden], rows[:, -hidden:], bias, torch.zeros_like(bias)


def _from_kernels(w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor) -> tuple[Tensor, ...]:
    hidden = w_hh.shape[1]
    kernel, bias = torch.cat((w_ih, w_hh), dim=1).t(), b_ih + b_hh
    return kernel[:, :-hidden], bias[:-hidden], kernel[:, -hidden:], bias[-hidden:]


def _to_ldigo(
    weights_layer: Tensor, weights_iter: Tensor, bias: Tensor | None, second_candidate_bias: bool
) -> tuple[Tensor | None, ...]:
    w_ih, w_hh = (w[0, 0].permute(1, 2, 0).flatten(0, 1) for w in (weights_layer, weights_iter))
    if bias is None:
        return w_ih, w_hh, None, None
    b_ih, b_hh = bias[0, 0, :3], torch.zeros_like(bias[0, 0, :3])
    if second_candidate_bias:
        b_hh[2] = bias[0, 0, 3]
    return w_ih, w_hh, b_ih.flatten(), b_hh.flatten()


def _from_ldigo(
    w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor, second_candidate_bias: bool
) -> tuple[Tensor, ...]:
    weights_layer, weights_iter = (w.unflatten(0, (3, -1)).permute(2, 0, 1)[None, None] for w in (w_ih, w_hh))
    b_ih, b_hh = b_ih.unflatten(0, (3, -1)), b_hh.unflatten(0, (3, -1))
    bias = torch.cat((b_ih[:2] + b_hh[:2], b_ih[2:], b_hh[2:])) if second_candidate_bias else b_ih + b_hh
    return weights_layer, weights_iter, bias[None, None]


# ----------------------------------------------------------------------------------------------------------- layouts


@dataclass(frozen=True)
class Layout:
    """How a library lays out one recurrent layer, and what its AUGRU computes."""

    shapes: dict[str, str]  # of its tensors by its own names
    gates: str  # their order; "u" where the update gate weighs the candidate, "z" where it weighs the old state
    augru: dict[str, Any]  # gate and reset_after of the AUGRU with the same results
    to_rows: Callable[..., tuple[Tensor | None, ...]]
    from_rows: Callable[..., tuple[Tensor, ...]]
    optional: tuple[str, ...] = ()  # biases that a layer may lack, all together


_PAPER: dict[str, Any] = {"gate": "paper", "reset_after": True}
_AUTHORS: dict[str, Any] = {"gate": "authors", "reset_after": False}
_CELL = {"weight_ih": "3H, I", "weight_hh": "3H, H", "bias_ih": "3H", "bias_hh": "3H"}
_LDIGO = {"weights_layer": "1, 1, I, 3, H", "weights_iter": "1, 1, H, 3, H"}

LAYOUTS = {
    "tensorflow": Layout(
        {"gates/kernel": "I+H, 2H", "gates/bias": "2H", "candidate/kernel": "I+H, H", "candidate/bias": "H"},
        "rzn", _AUTHORS, _to_kernels, _from_kernels,
    ),
    "deepctr_torch": Layout(_CELL, "run", _PAPER, _to_rows, _from_rows, ("bias_ih", "bias_hh")),
    "fuxictr": Layout(
        {"x2h.weight": "3H, I", "h2h.weight": "3H, H", "x2h.bias": "3H", "h2h.bias": "3H"},
        "urn", _PAPER, _to_rows, _from_rows, ("x2h.bias", "h2h.bias"),
    ),
    "recbole": Layout(_CELL, "run", _PAPER, _to_rows, _from_rows, ("bias_ih", "bias_hh")),
    "onednn": Layout(
        _LDIGO | {"bias": "1, 1, 3, H"}, "zrn", _AUTHORS,
        partial(_to_ldigo, second_candidate_bias=False), partial(_from_ldigo, second_candidate_bias=False), ("bias",),
    ),
    "onednn_lbr": Layout(
        _LDIGO | {"bias": "1, 1, 4, H"}, "zrn", _AUTHORS | {"reset_after": True},
        partial(_to_ldigo, second_candidate_bias=True), partial(_from_ldigo, second_candidate_bias=True), ("bias",),
    ),
    "openvino": Layout(
        {"W": "3H, I", "R": "3H, H", "B": "3H"}, "zrn", _AUTHORS, _to_rows_one_bias, _from_rows_one_bias
    ),
}  # fmt: skip
_TORCH = Layout(dict(zip(_NAMES, _CELL.values(), strict=True)), _GATES, {}, _to_rows, _from_rows, _NAMES[2:])


def _reordered(rows: Tensor, source: str, target: str) -> Tensor:
    """The gates' rows in another order, negated where the update gate changes between z and u."""
    blocks = dict(zip(source, rows.chunk(3), strict=True))
    return torch.cat([blocks[gate] if gate in blocks else -blocks[_OTHER_SIGN[gate]] for gate in target])


def _layout(library: str) -> Layout:
    _checks.one_of("library", library, tuple(LAYOUTS))
    return LAYOUTS[library]


def _named(layout: Layout, weights: object, prefix: str) -> dict[str, object]:
    """The entries of weights that the layout names. Those below a name, a TensorFlow optimizer's, are passed over."""
    if not isinstance(weights, Mapping):
        raise TypeError(f"weights must be a mapping of names to tensors (a state_dict), got {type(weights).__name__}")
    named = {name.removesuffix(":0"): value for name, value in weights.items()}  # a TensorFlow variable's own name
    found = {name.removeprefix(prefix): value for name, value in named.items() if name.startswith(prefix)}
    below = tuple(f"{name}/" for name in layout.shapes)
    found = {name: value for name, value in found.items() if not name.startswith(below)}
    required = [name for name in layout.shapes if name not in layout.optional]
    if set(found) not in (set(layout.shapes), set(required)):
        optional = f" and, if it has biases, {', '.join(layout.optional)}" if layout.optional else ""
        names = ", ".join(sorted(found)[:8]) + (f" and {len(found) - 8} more" if len(found) > 8 else "")
        under = f" under the prefix {prefix!r}" if prefix else ""
        raise ValueError(f"weights must hold {', '.join(required)}{optional}{under}, got {names or 'none'}")
    return {name: found[name] for name in layout.shapes if name in found}


def _as_tensor(name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor) and not hasattr(value, "__array__"):
        raise TypeError(f"{name} must be a Tensor or a NumPy array, got {type(value).__name__}")
    tensor = value.detach() if isinstance(value, Tensor) else torch.tensor(value.__array__())
    if not tensor.is_floating_point():
        raise ValueError(f"{name} must be of a floating-point dtype, got {str(tensor.dtype).removeprefix('torch.')}")
    return tensor


def _check_shapes(layout: Layout, tensors: dict[str, Tensor]) -> None:
    """H and I are read where a shape names them, first in the tensors of least rank; every shape must then be right."""
    axes = {name: layout.shapes[name].split(", ") for name in tensors}
    for name, tensor in tensors.items():
        _checks.rank(name, tensor, len(axes[name]))
    by_rank = sorted(reversed(tensors), key=lambda name: -tensors[name].dim())
    lengths = {axis: n for name in by_rank for axis, n in zip(axes[name], tensors[name].shape, strict=True)}
    hidden = lengths["H"]
    features = lengths["I"] if "I" in lengths else lengths["I+H"] - hidden
    sizes = {"I": features, "H": hidden, "2H": 2 * hidden, "3H": 3 * hidden, "I+H": features + hidden}
    for name, tensor in tensors.items():
        expected = [sizes[axis] if axis in sizes else int(axis) for axis in axes[name]]
        _checks.shape(name, tensor, expected, f"[{layout.shapes[name]}]")


def _read(layout: Layout, weights: object, prefix: str) -> dict[str, Tensor]:
    """The tensors of a layout, in its order, of one dtype and device and the right shapes."""
    tensors = {name: _as_tensor(name, value) for name, value in _named(layout, weights, prefix).items()}
    first, *others = tensors
    _checks.matches(first, tensors[first], **{name: tensors[name] for name in others})
    _check_shapes(layout, tensors)
    return tensors


def from_library(library: str, weights: Mapping[str, Any], prefix: str = "") -> dict[str, Tensor]:
    """One layer's weights as the state_dict of a one-layer :class:`torch.nn.GRU`.

    They give the library's results only with its place of the reset gate, and an AUGRU's only with its gate:
    ``LAYOUTS[library].augru``. The modules' ``from_library`` sees to that. :class:`GRU` resets after the product, so a
    GRU that resets before it ("tensorflow", "onednn", "openvino"; the first layer of a TensorFlow DIEN is one) runs in
    ``functional.gru(..., reset_after=False)``.

    Args:
        library: one of the names in :data:`LAYOUTS`.
        weights: the library's tensors or NumPy arrays by its own names: a cell's state_dict, a checkpoint's variables,
            the inputs of an operator. All of one floating-point dtype, which the result keeps.
        prefix: what stands before the names, where weights is a whole model's: ``"gru2/"``.

    Returns:
        weight_ih_l0 [3H, I], weight_hh_l0 [3H, H] and, unless the layer has no biases, bias_ih_l0 and bias_hh_l0 [3H].

    Raises:
        TypeError: weights is no mapping, or one of them neither Tensor nor array.
        ValueError: an unknown library; names that are missing or not the layout's; a wrong rank or dtype.
        RuntimeError: a wrong size or device.

    Example:
        >>> B, R, W = torch.randn(12), torch.randn(12, 4), torch.randn(12, 3)
        >>> state = dien_ops.gru_weights.from_library("openvino", {"W": W, "R": R, "B": B})
        >>> output, h_n = dien_ops.functional.gru(torch.randn(5, 2, 3), *state.values(), reset_after=False)
    """
    layout = _layout(library)
    tensors = _read(layout, weights, prefix)
    rows = layout.to_rows(*(tensors.get(name) for name in layout.shapes))
    return {name: _reordered(x, layout.gates, _GATES) for name, x in zip(_NAMES, rows, strict=True) if x is not None}


def to_library(library: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of :func:`from_library`: a one-layer nn.GRU's state_dict as the library's tensors, copied.

    A layer without biases gets zeros where the library has no layer without them.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`from_library`.

    Example:
        >>> kernel = dien_ops.gru_weights.to_library("tensorflow", torch.nn.GRU(3, 4).state_dict())["gates/kernel"]
        >>> kernel.shape
        torch.Size([7, 8])
    """
    layout = _layout(library)
    w_ih, w_hh, *biases = (_reordered(x, _GATES, layout.gates) for x in _read(_TORCH, weights, "").values())
    b_ih, b_hh = biases or [w_ih.new_zeros(w_ih.shape[0])] * 2
    packed = zip(layout.shapes, layout.from_rows(w_ih, w_hh, b_ih, b_hh), strict=True)
    return {name: x.contiguous() for name, x in packed if biases or name not in layout.optional}


# ------------------------------------------------------------------------------------------------------------- torch

_Module = TypeVar("_Module", bound=nn.Module)


def check_plain(name: str, module: nn.Module) -> None:
    """Its weights are parameters, and nothing computes them from others (torch.nn.utils.parametrize, prune)."""
    other = [key for key in module.state_dict() if not re.fullmatch(r"(weight|bias)_(ih|hh)_l\d+(_reverse)?", key)]
    if other:
        raise ValueError(
            f"{name} must have plain parameters, got {', '.join(other)}: remove the parametrizations first, with "
            f"remove_parametrizations of torch.nn.utils.parametrize or remove of torch.nn.utils.prune"
        )


def torch_gru(rnn: Any) -> nn.GRU:
    """rnn, if it is a torch.nn.GRU with plain parameters and no subclass, which may compute something else."""
    cls = parametrize.type_before_parametrizations(rnn)
    if cls is not nn.GRU:
        kind = "its subclass " if isinstance(rnn, nn.GRU) else ""
        raise TypeError(f"rnn must be a torch.nn.GRU, got {kind}{cls.__module__}.{cls.__name__}")
    check_plain("rnn", rnn)
    return cast(nn.GRU, rnn)


def copied(cls: Callable[..., _Module], source: nn.Module, same: Sequence[str], **options: Any) -> _Module:
    """A cls with source's attributes named in same as arguments, its parameters, their requires_grad, and its mode."""
    weight = source.get_parameter("weight_ih_l0")
    arguments = {name: getattr(source, name) for name in same}
    module = cls(**arguments, **options, device="meta", dtype=weight.dtype).to_empty(device=weight.device)
    module.load_state_dict(source.state_dict())
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(source.get_parameter(name).requires_grad)
    return module.train(source.training)
