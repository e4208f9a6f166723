# SPDX-License-Identifier: Apache-2.0
"""Argument checks. Each names the argument, what was expected and what came, and raises what torch raises for it:
``TypeError`` for a wrong Python type, ``ValueError`` for a wrong rank, dtype or name, ``RuntimeError`` for a wrong size
or device."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from dien_ops import _library

ANY_PRECISION = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(value).__name__}")


def supported(name: str, value: Tensor) -> None:
    """The first tensor of a call: its device and dtype are what all others must share."""
    tensor(name, value)
    if value.device.type == "cuda":
        if problem := _library.cuda_problem() or _library.gpu_problem(value.device):
            raise RuntimeError(
                f"{name} is on {value.device}, and {problem}. Or move the tensors and the module to the CPU with .cpu()"
            )
    elif value.device.type not in ("cpu", "meta"):
        raise RuntimeError(f"{name} must be on the CPU or a CUDA device, got {value.device}")
    if value.dtype not in ANY_PRECISION:
        *others, last, got = (str(dtype).removeprefix("torch.") for dtype in (*ANY_PRECISION, value.dtype))
        raise ValueError(f"{name} must be {', '.join(others)} or {last}, got {got}")
    _not_dual(name, value)


def _not_dual(name: str, value: Tensor) -> None:
    """Forward-mode differentiation has no formulas here, and torch would take the derivative for zero."""
    if forward_ad._current_level < 0:
        return
    # The compiler's tensors show no tangent.
    if torch.compiler.is_compiling() or forward_ad.unpack_dual(value).tangent is not None:
        raise NotImplementedError(
            f"{name} has a forward-mode tangent (torch.func.jvp, torch.autograd.forward_ad), and dien_ops "
            f"differentiates in reverse mode only"
        )


def _of_dtypes(
    reference_name: str, reference: Tensor, dtypes: Sequence[torch.dtype], others: dict[str, Any], what: str = "dtype"
) -> None:
    for name, value in others.items():
        if value is None:
            continue
        tensor(name, value)
        if value.dtype not in dtypes:
            expected = " or ".join(dict.fromkeys(map(str, dtypes)))
            raise ValueError(f"{name} must have the {what} of {reference_name}: expected {expected}, got {value.dtype}")
        same_device(reference_name, reference, name, value)
        _not_dual(name, value)


def matches(reference_name: str, reference: Tensor, **others: Tensor | None) -> None:
    """Each of the others that is given has the reference's dtype and device."""
    _of_dtypes(reference_name, reference, [reference.dtype], others)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What tensors of the dtype are computed in: the 16-bit formats are formats of storage."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def parameters(reference_name: str, reference: Tensor, **others: Tensor | None) -> None:
    """Each of the others that is given has the reference's device, and its dtype or that in which it is computed:
    float32 parameters go with 16-bit input, as under autocast."""
    _of_dtypes(reference_name, reference, [reference.dtype, compute_dtype(reference.dtype)], others)


def states(reference_name: str, reference: Tensor, **others: Tensor | None) -> None:
    """Each of the others that is given has the reference's device, and the dtype in which it is computed."""
    _of_dtypes(reference_name, reference, [compute_dtype(reference.dtype)], others, "computing dtype")


def same_device(reference_name: str, reference: Tensor, name: str, value: Tensor) -> None:
    if value.device != reference.device:
        raise RuntimeError(
            f"{name} must be on the device of {reference_name}: expected {reference.device}, got {value.device}"
        )


def rank(name: str, value: Tensor, *allowed: int) -> None:
    if value.dim() not in allowed:
        expected = " or ".join(f"{dim}-D" for dim in allowed)
        raise ValueError(f"{name} must be {expected}, got {value.dim()}-D of shape {list(value.shape)}")


def shape(name: str, value: Tensor | None, expected: Sequence[int], meaning: str) -> None:
    """The exact shape; meaning names its axes, as in ``"[B, H]"``."""
    if value is not None and list(value.shape) != list(expected):
        raise RuntimeError(f"{name} must have shape {list(expected)} {meaning}, got {list(value.shape)}")


def lengths(value: Tensor | None, batch: int, device: torch.device) -> None:
    """Type, shape and device; the values 0..T are checked by the operator before it computes anything."""
    if value is None:
        return
    tensor("lengths", value)
    if value.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"lengths must be int32 or int64, got {str(value.dtype).removeprefix('torch.')}")
    shape("lengths", value, [batch], "[B]")
    if value.device != device:
        raise RuntimeError(f"lengths must be on the device of the input: expected {device}, got {value.device}")


def one_of(name: str, value: object, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def number(name: str, value: object) -> None:
    if type(value) in (float, int):  # the others take a microsecond each
        return
    if isinstance(value, bool) or not isinstance(value, (numbers.Real, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")


def non_negative(name: str, value: float) -> None:
    """Raises ValueError for a negative or infinite number and for NaN."""
    number(name, value)
    if not 0.0 <= value < math.inf:
        raise ValueError(f"{name} must be finite and >= 0, got {value}")


def fraction(name: str, value: float) -> None:
    """Raises ValueError for a number outside of [0, 1) and for NaN."""
    number(name, value)
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{name} must be in [0, 1), got {value}")


def size(name: str, value: object) -> None:
    """A size that a constructor is given: an int of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value <= 0:
        raise ValueError(f"{name} must be greater than zero, got {value}")


def boolean(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {type(value).__name__}")


def tensors(name: str, value: object) -> None:
    """A list of tensors, by its own type; the type of each is for the caller to check, who knows how many there are."""
    if not isinstance(value, (Sequence, torch.nn.ParameterList)):
        raise TypeError(f"{name} must be a sequence of Tensors, got {type(value).__name__}")
