# SPDX-License-Identifier: Apache-2.0
"""What the columns' small cases (gpu_small_<column>.py) share."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

# dtype, and whether torch lets products round their operands to tf32
PRECISIONS = {
    "float64": (torch.float64, False),
    "float32": (torch.float32, False),
    "tf32": (torch.float32, True),
    "bfloat16": (torch.bfloat16, False),
    "float16": (torch.float16, False),
}


def leaf(device: str, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.empty(shape, device=device).uniform_(-0.5, 0.5).to(dtype).requires_grad_()


def check_finite(case: object, results: Iterable[Tensor]) -> None:
    """Raises FloatingPointError: a result is not finite."""
    if not all(result.isfinite().all() for result in results):
        raise FloatingPointError(f"{case} has results that are not finite")
