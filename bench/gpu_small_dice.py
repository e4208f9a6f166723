# SPDX-License-Identifier: Apache-2.0
"""Small cases of the Dice column for gpu_small.py: every kernel, precision and kind of size once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch

from bench import small_cases
from bench.small_cases import check_finite
from dien_ops import functional

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((1, 1), (300, 81), (70, 64), (9, 7, 5), (5, 40, 24), (3, 4, 520))  # [N, C] or [B, T, C]


@dataclass(frozen=True)
class Case:
    dtype: torch.dtype
    shape: tuple[int, ...]
    training: bool
    affine: bool = True


def cases() -> Iterator[Case]:
    """In every precision every size with the batch's statistics, and two with moving averages."""
    for dtype in DTYPES:
        for shape in SHAPES:
            yield Case(dtype, shape, training=True)
        yield Case(dtype, SHAPES[2], training=False, affine=False)
        yield Case(dtype, SHAPES[3], training=False)


def run(case: Case, device: str) -> None:
    """Raises FloatingPointError: a result is not finite."""
    channels = case.shape[-1]

    leaf = partial(small_cases.leaf, device, case.dtype)
    s, leaves = leaf(*case.shape), [leaf(channels) for _ in range(3 if case.affine else 1)]
    averages = [torch.zeros(channels, device=device), torch.ones(channels, device=device)]
    if case.dtype == torch.float64:
        averages = [x.double() for x in averages]
    lengths = torch.arange(case.shape[0], device=device) % (case.shape[1] + 1) if len(case.shape) == 3 else None
    alpha, *affine = leaves
    output = functional.dice(s, alpha, *averages, *affine, training=case.training, eps=1e-3, lengths=lengths)
    grads = torch.autograd.grad(output.sum(), [s, *leaves])
    check_finite(case, (output, *grads, *averages))
