# SPDX-License-Identifier: Apache-2.0
"""Dice, beside the same equation in torch's operators, with F.batch_norm, and torch.compile of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bench import composed
from bench.composed import COMPILED, EAGER
from bench.results import COPY, Target
from bench.rivals import in_dtype
from bench.rivals_dice import BATCH_NORM, Activation, batch_norm

OURS = {"dien_ops": composed.ours}
RIVALS = {EAGER: composed.eager, BATCH_NORM: batch_norm, COMPILED: composed.compiled}

LARGE = Activation(65536, 80)
BATCH = Activation(1024, 200)  # a mini-batch in DIEN's last layers
SEQUENCES = Activation(2048, 80, steps=50, uniform_lengths=True)  # of the activation unit's hidden layer
NEAR_THE_COPY = 1 / 1.3


def rows(*problems_and_targets):
    """Parameters of a test: a problem and its targets, with the problem's name."""
    return [pytest.param(problem, targets, id=problem.name) for problem, *targets in problems_and_targets]


def measure(bench, p: Activation, targets, ours=OURS, others=RIVALS, with_memory: bool = True) -> None:
    absent = {name: "left out of a quick run" for name in others if bench.quick and name.startswith(COMPILED)}
    small = replace(p, rows=4) if with_memory else None
    others = {name: factory for name, factory in others.items() if name not in absent}
    compiled = [name for name in others if name.startswith(COMPILED)]
    bench.measure(p, ours, others, targets, absent=absent, memory=small, without_memory=compiled)


@pytest.mark.parametrize(
    "p, targets",
    rows((LARGE, Target(COMPILED, 1.5), Target(COPY, NEAR_THE_COPY)), (BATCH, Target(COMPILED, 1.5)), (SEQUENCES,)),
)
def test_dice_training_forward(bench, p, targets):
    """Dice with the batch's statistics, forward."""
    measure(bench, p, targets)


@pytest.mark.parametrize(
    "p, targets",
    rows((LARGE, Target(COMPILED, 1.5)), (BATCH, Target(COMPILED, 1.5)), (SEQUENCES, Target(COMPILED, 1.5))),
)
def test_dice_training(bench, p, targets):
    """Dice with the batch's statistics, forward and backward."""
    measure(bench, replace(p, train=True), targets)


@pytest.mark.parametrize("p, targets", rows((LARGE, Target(COPY, NEAR_THE_COPY)), (BATCH,), (SEQUENCES,)))
def test_dice_evaluation(bench, p, targets):
    """Dice with moving averages, forward."""
    measure(bench, replace(p, batch_statistics=False), targets)


@pytest.mark.parametrize("train", [False, True], ids=["forward", "forward and backward"])
@pytest.mark.parametrize("p, targets", rows((LARGE, Target("dien_ops, float32", 1.0))))
def test_dice_bfloat16(bench, p, targets, train):
    """Dice with the batch's statistics, in bfloat16."""
    others = {"dien_ops, float32": composed.ours} | {
        f"{name}, bfloat16": in_dtype(factory, torch.bfloat16) for name, factory in RIVALS.items()
    }
    ours = {"dien_ops, bfloat16": in_dtype(composed.ours, torch.bfloat16)}
    measure(bench, replace(p, train=train), targets, ours, others, with_memory=False)  # no factory has a name
