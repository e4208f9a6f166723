# SPDX-License-Identifier: Apache-2.0
"""Forward and backward of the recurrent kernels over small sizes that fit no tile, for gpu_small.py."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch

from bench import small_cases
from bench.small_cases import PRECISIONS, check_finite
from dien_ops import functional

GATES = ("none", "input", "replace", "paper", "authors")
SIZES = ((1, 1, 1, 1), (3, 5, 3, 5), (17, 3, 19, 33), (70, 2, 36, 36), (5, 3, 64, 128), (5, 2, 36, 257))  # B, T, I, H


@dataclass(frozen=True)
class Case:
    precision: str
    gate: str
    sizes: tuple[int, int, int, int]
    reset_after: bool = True
    targets: int | None = None
    batch_first: bool = True
    lengths: bool = True


def cases() -> Iterator[Case]:
    """In every precision every cell in one size, and every size with and without attention."""
    for precision in PRECISIONS:
        for gate in GATES:
            for reset_after in (True, False):
                targets = 3 if gate != "none" and reset_after else None
                yield Case(precision, gate, SIZES[1], reset_after, targets, batch_first=not reset_after)
        for sizes in SIZES:
            yield Case(precision, "none", sizes, lengths=False)
            yield Case(precision, "paper", sizes)


def run(case: Case, device: str) -> None:
    """Raises FloatingPointError: a result is not finite."""
    dtype, torch.backends.cudnn.allow_tf32 = PRECISIONS[case.precision]
    batch, steps, features, hidden = case.sizes

    leaf = partial(small_cases.leaf, device, dtype)
    rows = [batch] if case.targets is None else [batch, case.targets]
    x = leaf(*([batch, steps] if case.batch_first else [steps, batch]), features)
    a = leaf(*([*rows, steps] if case.batch_first else [steps, *rows]))
    weights = [leaf(3 * hidden, features), leaf(3 * hidden, hidden), leaf(3 * hidden), leaf(3 * hidden)]
    leaves = [x, *weights, leaf(*rows, hidden)]
    options = {"batch_first": case.batch_first, "reset_after": case.reset_after, "lengths": None}
    if case.lengths:
        options["lengths"] = torch.arange(batch, device=device) % (steps + 1)
    if case.gate == "none":
        output, h_n = functional.gru(*leaves, **options)
    else:
        leaves.insert(1, a)
        output, h_n = functional.attentional_gru(*leaves, gate=case.gate, **options)
    grads = torch.autograd.grad([output.sum(), h_n.sum()], leaves)
    check_finite(case, (output, h_n, *grads))
