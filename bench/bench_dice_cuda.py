# SPDX-License-Identifier: Apache-2.0
"""Dice on a GPU, beside the same equation in torch's operators, with F.batch_norm, and torch.compile of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bench import composed
from bench.composed import COMPILED, EAGER, OURS_FROM_A_GRAPH
from bench.results import COPY, Target
from bench.rivals import from_a_graph
from bench.rivals_dice import BATCH_NORM, Activation, batch_norm

OURS = {"dien_ops": composed.ours}
GRAPH = {OURS_FROM_A_GRAPH: from_a_graph(composed.ours)}
OTHERS = {EAGER: composed.eager, BATCH_NORM: batch_norm}
NEAR_THE_COPY = [Target(COPY, 0.8)]

# The last is bound by its launches.
SHAPES = [
    (Activation(1 << 20, 80, device="cuda"), NEAR_THE_COPY),
    (Activation(1 << 18, 512, device="cuda"), NEAR_THE_COPY),
    (Activation(1 << 20, 37, device="cuda"), []),
    (Activation(16384, 80, steps=50, uniform_lengths=True, device="cuda"), []),
    (Activation(65536, 80, device="cuda"), []),
]


def rows(*dtypes: torch.dtype):
    return [
        pytest.param(replace(p, dtype=dtype), targets, id=f"{p.name} {str(dtype).removeprefix('torch.')}")
        for dtype in dtypes
        for p, targets in SHAPES
    ]


DTYPES = pytest.mark.parametrize("p, targets", rows(torch.float32, torch.bfloat16))


def measure(bench, p: Activation, targets, others) -> None:
    bench.measure(p, OURS, GRAPH | others, targets, without_memory=GRAPH)


@DTYPES
def test_dice_training(bench, p, targets):
    """Dice with the batch's statistics, forward and backward."""
    compiled = {COMPILED: composed.compiled} if p.name == SHAPES[0][0].name else {}
    measure(bench, replace(p, train=True), targets, OTHERS | compiled)


@DTYPES
def test_dice_training_forward(bench, p, targets):
    """Dice with the batch's statistics, forward."""
    measure(bench, p, targets, OTHERS)


@DTYPES
def test_dice_evaluation(bench, p, targets):
    """Dice with moving averages, forward."""
    measure(bench, replace(p, batch_statistics=False), targets, OTHERS)
