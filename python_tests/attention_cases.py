# SPDX-License-Identifier: Apache-2.0
"""What the tests of softmax attention share: arguments, results with their gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from helpers import gradients, leaf

F64 = torch.float64


def arguments(sizes: tuple[int, int | None, int, int, int], dtype: torch.dtype = F64) -> list[Tensor]:
    B, C, T, H, A = sizes
    return [
        leaf(B, T, H, dtype=dtype),
        leaf(B, *([] if C is None else [C]), A, dtype=dtype),
        leaf(H, A, dtype=dtype),
    ]


def results(module, arguments: list[Tensor], lengths: Tensor | None) -> list[Tensor]:
    scores = module.bilinear_attention(*arguments, lengths=lengths)
    return [scores.detach(), *gradients([scores], arguments)]
