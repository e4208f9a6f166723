# SPDX-License-Identifier: Apache-2.0
"""What ``torch.autocast`` asks of an operator of ours: the same as of torch's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def dtype_for(tensor: Tensor) -> torch.dtype | None:
    """What products on the tensor's device are computed in; None where autocast is off."""
    device = tensor.device.type
    enabled = device in ("cpu", "cuda") and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if enabled else None


def cast(dtype: torch.dtype | None, *values: Any) -> tuple[Any, ...]:
    """The values: floating-point tensors other than float64 in the given dtype, where one is given."""

    def one(x: Any) -> Any:
        eligible = isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64
        return x.to(dtype) if dtype is not None and eligible else x

    return tuple(one(x) for x in values)
