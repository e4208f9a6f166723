# SPDX-License-Identifier: Apache-2.0
"""Softmax attention over states in small sizes that fit no tile, once each: a part of gpu_small.py."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch

from bench import small_cases
from bench.small_cases import PRECISIONS, check_finite
from dien_ops import functional

# B, C (None: no axis of targets), T, H, A: a row in one pass and in several, tiles of 8 and of 32 targets, two blocks
SIZES = (
    (1, None, 1, 1, 1), (3, None, 70, 36, 18), (5, 3, 9, 19, 5), (2, 4, 5, 140, 66), (3, 7, 70, 33, 5),
    (2, 35, 9, 20, 8), (130, 1, 2, 4, 3),
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    precision: str
    sizes: tuple[int, int | None, int, int, int]
    time_first: bool = False
    lengths: bool = True


def cases() -> Iterator[Case]:
    for precision in PRECISIONS:
        for sizes in SIZES:
            yield Case(precision, sizes)
        for sizes in SIZES[2], SIZES[4]:
            yield Case(precision, sizes, time_first=True, lengths=False)


def run(case: Case, device: str) -> None:
    """Raises FloatingPointError: a result is not finite."""
    dtype, torch.backends.cuda.matmul.allow_tf32 = PRECISIONS[case.precision]
    batch, targets, steps, hidden, size = case.sizes

    leaf = partial(small_cases.leaf, device, dtype)
    states = leaf(steps, batch, hidden) if case.time_first else leaf(batch, steps, hidden)
    target = leaf(batch, *([] if targets is None else [targets]), size)
    leaves = [states, target, leaf(hidden, size)]
    lengths = torch.arange(batch, device=device) % (steps + 1) if case.lengths else None
    read = states.transpose(0, 1) if case.time_first else states
    scores = functional.bilinear_attention(read, *leaves[1:], lengths=lengths)
    grads = torch.autograd.grad(scores, leaves, torch.rand_like(scores))
    check_finite(case, (scores, *grads))
