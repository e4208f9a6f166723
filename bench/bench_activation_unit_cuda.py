# SPDX-License-Identifier: Apache-2.0
"""The local activation unit on a GPU, beside its equations in eager torch and through torch.compile.

float32 rows may round the factors of products to tf32, ours as the rivals'. "graph" is the same kernels without the
host's work between them.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bench import composed
from bench.composed import COMPILED
from bench.results import Target
from bench.rivals_attention import Unit

OURS = {"dien_ops": composed.ours}
RIVALS = composed.on_gpu()
DTYPES = (torch.float32, torch.bfloat16)

DIN = Unit(device="cuda")  # the released code's network
PROBLEMS = (
    DIN,
    replace(DIN, activation="dice"),
    replace(DIN, activation="prelu"),
    replace(DIN, embedding_dim=128, hidden_sizes=(200, 80)),
    replace(DIN, batch=64, targets=30, softmax=True),
)
USER = Unit(batch=1, targets=200, embedding_dim=108, softmax=True, device="cuda")


def rows(*problems: Unit):
    return [
        pytest.param(replace(p, dtype=dtype), id=f"{p.name} {str(dtype).removeprefix('torch.')}")
        for dtype in DTYPES
        for p in problems
    ]


def measure(bench, p: Unit) -> None:
    bench.measure(p, OURS, RIVALS, [Target(COMPILED, 1.0)], without_memory=composed.WITHOUT_MEMORY_ON_GPU)


@pytest.mark.parametrize("p", rows(*PROBLEMS))
def test_unit_training(bench, p):
    """Local activation unit, forward and backward."""
    measure(bench, replace(p, train=True))


@pytest.mark.parametrize("p", rows(*PROBLEMS))
def test_unit_forward(bench, p):
    """Local activation unit, forward."""
    measure(bench, p)


@pytest.mark.parametrize("p", rows(USER))
def test_unit_of_many_targets(bench, p):
    """Local activation unit with softmax, forward: 200 targets of one user."""
    measure(bench, p)


@pytest.mark.parametrize("p", rows(DIN))
def test_unit_padding(bench, p):
    """Local activation unit, forward and backward, lengths uniform in 0..T."""
    measure(bench, replace(p, train=True, uniform_lengths=True))
