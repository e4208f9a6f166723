# SPDX-License-Identifier: Apache-2.0
"""What the tests of Dice share: arguments, moving averages, results with their gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from helpers import gradients, leaf

F64 = torch.float64
LOW = [torch.float32, torch.bfloat16, torch.float16]


def arguments(shape: tuple[int, ...], affine: bool = True, dtype: torch.dtype = F64) -> dict[str, Tensor]:
    result = {"input": leaf(*shape, dtype=dtype), "alpha": leaf(shape[-1], dtype=dtype)}
    if affine:
        result |= {"weight": leaf(shape[-1], dtype=dtype), "bias": leaf(shape[-1], dtype=dtype)}
    return result


def running(channels: int, dtype: torch.dtype = F64) -> dict[str, Tensor]:
    mean, var = torch.linspace(-1, 1, channels, dtype=dtype), torch.linspace(0.5, 2, channels, dtype=dtype)
    return {"running_mean": mean, "running_var": var}


def results(module, arguments: dict[str, Tensor], **options) -> list[Tensor]:
    output = module.dice(**arguments, **options)
    return [output.detach(), *gradients([output], [x for x in arguments.values() if x.requires_grad])]
