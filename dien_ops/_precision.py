# SPDX-License-Identifier: Apache-2.0
"""What torch's settings of precision ask of our operators: the same as of its own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """What products on the tensor's device are computed in; None where autocast is off."""
    device = tensor.device.type
    enabled = device in ("cpu", "cuda") and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if enabled else None


def cast(dtype: torch.dtype | None, *values: Any) -> tuple[Any, ...]:
    """The values: floating-point tensors other than float64 in the given dtype, where one is given."""
    if dtype is None:
        return values

    def one(x: Any) -> Any:
        eligible = isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64
        return x.to(dtype) if eligible else x

    return tuple(one(x) for x in values)


def in_dtype(dtype: torch.dtype, tensors: Iterable[Tensor]) -> list[Tensor]:
    return [x if x.dtype == dtype else x.to(dtype) for x in tensors]  # x.to takes a microsecond to do nothing


@torch.compiler.assume_constant_result  # as they are while compiling: the compiler does not look into torch.backends
def _tf32_is_allowed(backend: str) -> bool:
    settings: Any = torch.backends.cudnn.rnn if backend == "rnn" else torch.backends.cuda.matmul
    return bool(settings.fp32_precision == "tf32")


def allow_tf32(tensor: Tensor, backend: str) -> bool:
    """Whether products of float32 may round their operands to tf32: where those of nn.GRU ("rnn") or of nn.Linear
    ("matmul") may."""
    return tensor.device.type == "cuda" and tensor.dtype == torch.float32 and _tf32_is_allowed(backend)
