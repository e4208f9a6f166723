# SPDX-License-Identifier: Apache-2.0
"""Forward and backward of the local activation unit's kernels over small sizes that fit no tile, for gpu_small.py."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch

from bench import small_cases
from bench.small_cases import PRECISIONS, check_finite
from dien_ops import functional

# activation, Dice's statistics of the batch, softmax
KINDS = (("sigmoid", False, True), ("prelu", False, False), ("dice", True, False), ("dice", False, True))
# B, C, T, D, hidden sizes
SIZES = (
    (1, 1, 1, 1, ()),
    (3, 2, 5, 3, (5,)),
    (9, 1, 17, 36, (80, 40)),
    (2, 70, 9, 7, (6, 3)),
    (2, 3, 70, 19, (33, 20, 9)),
    (2, 1, 5, 400, (300, 70)),
)


@dataclass(frozen=True)
class Case:
    precision: str
    activation: str
    batch_statistics: bool
    softmax: bool
    sizes: tuple[int, int, int, int, tuple[int, ...]]
    lengths: bool


def cases() -> Iterator[Case]:
    """In every precision every size, with each kind in turn, and every kind in one size."""
    for precision in PRECISIONS:
        for i, sizes in enumerate(SIZES):
            yield Case(precision, *KINDS[i % len(KINDS)], sizes, lengths=i % 2 == 0)
        for kind in KINDS[1:]:  # the first kind has had it
            yield Case(precision, *kind, SIZES[4], lengths=True)


def run(case: Case, device: str) -> None:
    """Raises FloatingPointError: a result is not finite."""
    dtype, torch.backends.cuda.matmul.allow_tf32 = PRECISIONS[case.precision]
    batch, targets, steps, dim, hidden = case.sizes

    leaf = partial(small_cases.leaf, device, dtype)
    dice = case.activation == "dice"
    widths = [4 * dim, *hidden, 1]
    query, keys = leaf(batch, targets, dim), leaf(batch, steps, dim)
    weights, biases = [leaf(o, i) for i, o in pairwise(widths)], [leaf(o) for o in widths[1:]]
    alphas = [leaf(h) for h in hidden] if case.activation != "sigmoid" else []
    pooled, scores = functional.local_activation_unit(
        query, keys, weights, biases,
        activation=case.activation,
        alphas=alphas,
        running_means=[torch.zeros(h, device=device, dtype=dtype) for h in hidden if dice],
        running_vars=[torch.ones(h, device=device, dtype=dtype) for h in hidden if dice],
        training=case.batch_statistics or not dice,
        eps=0.1,
        softmax=case.softmax,
        lengths=torch.arange(batch, device=device) % (steps + 1) if case.lengths else None,
        return_scores=True,
    )  # fmt: skip
    leaves = [query, keys, *weights, *biases, *alphas]
    grads = torch.autograd.grad([pooled.sum(), scores.sum()], leaves)
    check_finite(case, (pooled, scores, *grads))
