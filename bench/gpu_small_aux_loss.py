# SPDX-License-Identifier: Apache-2.0
"""The auxiliary loss in small sizes that fit no tile, once each: a part of gpu_small.py."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.small_cases import check_finite, leaf
from dien_ops import functional

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
REDUCTIONS = ("paper", "mean", "authors")
SIZES = ((1, 1, 1), (3, 5, 3), (70, 9, 36), (5, 3, 140), (300, 2, 4))  # B, T, H


@dataclass(frozen=True)
class Case:
    dtype: torch.dtype
    sizes: tuple[int, int, int]
    reduction: str = "paper"
    scorer: str = "inner"
    lengths: bool = True


def cases() -> Iterator[Case]:
    for dtype in DTYPES:
        for sizes in SIZES:
            yield Case(dtype, sizes)
        for reduction in REDUCTIONS:
            yield Case(dtype, SIZES[1], reduction, lengths=False)
            yield Case(dtype, SIZES[2], reduction, scorer="function")


def function(states: Tensor, items: Tensor) -> Tensor:
    """A scorer: its logits have the loss of any scorer's."""
    return (states * items).sum(-1)


def run(case: Case, device: str) -> None:
    """Raises FloatingPointError: a result is not finite."""
    batch, steps, _ = case.sizes
    leaves = [leaf(device, case.dtype, *case.sizes) for _ in range(3)]
    lengths = torch.arange(batch, device=device) % (steps + 1) if case.lengths else None
    scorer = function if case.scorer == "function" else case.scorer
    loss = functional.auxiliary_loss(*leaves, lengths=lengths, scorer=scorer, reduction=case.reduction)
    grads = torch.autograd.grad(loss, leaves)
    check_finite(case, (loss, *grads))
