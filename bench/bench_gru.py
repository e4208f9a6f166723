# SPDX-License-Identifier: Apache-2.0
"""The recurrent column: GRU and AUGRU, beside nn.GRU, the loops of public libraries, torch.compile and OpenVINO."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bench import machine, rivals
from bench.harness import Unavailable
from bench.results import CEILING, Sweep, Target
from bench.rivals import COMPILED, LOOP, Recurrence

OURS = {"dien_ops": rivals.ours}
NN_GRU = {"nn.GRU": rivals.nn_gru}
LOOPS = {LOOP: rivals.python_loop, COMPILED: rivals.compiled_loop, "deepctr-torch": rivals.deepctr_torch}

SMALL = Recurrence(128, 100, 36, 36)
NARROW = Recurrence(256, 50, 36, 108)
LARGE = Recurrence(1024, 100, 64, 64)
WIDE = Recurrence(512, 100, 128, 128)
LONG = pytest.mark.long


def rows(*problems_and_targets, long=(LARGE, WIDE)):
    """Parameters of a test: a problem and what else the row has, with the problem's name."""
    return [
        pytest.param(problem, *others, id=problem.name, marks=[LONG] if problem in long else [])
        for problem, *others in problems_and_targets
    ]


def without_compilers(bench, factories):
    """The rivals, and which of them a quick run leaves out."""
    if not bench.quick:
        return factories, {}
    return {k: f for k, f in factories.items() if k != COMPILED}, {COMPILED: "left out of a quick run"}


def as_small(p: Recurrence) -> Recurrence:
    """The same kind of problem with next to no memory."""
    return replace(p, batch=2, steps=2)


# --------------------------------------------------------------------------------------------------- against the rivals


@pytest.mark.parametrize(
    "p, times, share", rows((SMALL, 5, 0.65), (NARROW, 2.8, 0.8), (LARGE, 3, 0.87), (WIDE, 2.1, 0.9))
)
def test_gru_forward(bench, p, times, share):
    """GRU, forward."""
    targets = [Target("nn.GRU", times), Target(CEILING, share)]
    bench.measure(p, OURS, NN_GRU | {"OpenVINO": rivals.openvino_gru}, targets)


@pytest.mark.parametrize("p, times", rows((SMALL, 6), (NARROW, 2.4), (LARGE, 2.6), (WIDE, 1.8)))
def test_gru_training(bench, p, times):
    """GRU, forward and backward."""
    p = replace(p, train=True)
    bench.measure(p, OURS, NN_GRU, [Target("nn.GRU", times)], memory=as_small(p))


@pytest.mark.parametrize("p, times", rows((SMALL, 15), (NARROW, 5), (LARGE, 8), (WIDE, 5)))
def test_augru_training(bench, p, times):
    """AUGRU, forward and backward."""
    p = replace(p, attention=True, train=True)
    loops, absent = without_compilers(bench, LOOPS)
    bench.measure(p, OURS, loops, [Target(LOOP, times)], absent=absent, memory=as_small(p), without_memory=[COMPILED])


@pytest.mark.parametrize("p", rows((Recurrence(1, 50, 36, 36),), (Recurrence(1, 50, 36, 108),)))
def test_augru_of_many_targets(bench, p):
    """AUGRU, forward: 200 targets of one user (rivals: 200 copies of the history)."""
    p = replace(p, attention=True, targets=200)
    loops, absent = without_compilers(bench, LOOPS)
    copies = "dien_ops on copies"
    targets = [Target(LOOP, 15), Target(copies, 3)]
    bench.measure(p, OURS, loops | {copies: rivals.ours_on_copies}, targets, absent=absent)


@pytest.mark.parametrize("p", rows((Recurrence(1, 50, 36, 36),)))
def test_gru_of_one_user(bench, p):
    """GRU, forward: one user."""
    bench.measure(p, OURS, NN_GRU | {"OpenVINO": rivals.openvino_gru}, [Target("nn.GRU", 1.0)])


# --------------------------------------------------------------------------------------------------- against ourselves


@pytest.mark.parametrize("train", [False, True], ids=["forward", "forward and backward"])
@pytest.mark.parametrize("p", rows((NARROW,), (LARGE,)))
def test_gru_padding(bench, p, train):
    """GRU, lengths uniform in 0..T: what a valid step costs, against full length."""
    full = "dien_ops at full length"
    bench.measure(
        replace(p, uniform_lengths=True, train=train),
        {"dien_ops": rivals.per_valid_step(rivals.ours)},
        {full: rivals.at_full_length(rivals.per_valid_step(rivals.ours))},
        [Target(full, 1 / 1.15)],  # proportional to the sum of lengths within 15 %
        unit="valid step",
    )


@pytest.mark.parametrize("train", [False, True], ids=["forward", "forward and backward"])
@pytest.mark.parametrize("p", rows((Recurrence(64, 100, 36, 36),), (SMALL,), (LARGE,), (WIDE,)))
def test_gru_threads(bench, p, train):
    """GRU, one core and two."""
    if machine.cores() < 2 or torch.get_num_threads() < 2:
        raise Unavailable("this process has one thread")
    one, two = "dien_ops, 1 thread", "dien_ops, 2 threads"
    bench.measure(
        replace(p, train=train),
        {two: rivals.with_threads(rivals.ours, 2)},
        {one: rivals.with_threads(rivals.ours, 1)},
        [Target(one, 1.8)],
    )


@pytest.mark.parametrize("train", [False, True], ids=["forward", "forward and backward"])
@pytest.mark.parametrize("p", rows((SMALL,), (NARROW,), (LARGE,), (WIDE,)))
def test_gru_bfloat16(bench, p, train):
    """GRU in bfloat16."""
    ours32 = "dien_ops, float32"
    bench.measure(
        replace(p, train=train),
        {"dien_ops, bfloat16": rivals.in_dtype(rivals.ours, torch.bfloat16)},
        {
            ours32: rivals.ours,
            "nn.GRU, bfloat16": rivals.in_dtype(rivals.nn_gru, torch.bfloat16),
        },
        [Target(ours32, 1.0)],
    )


# --------------------------------------------------------------------------------------------------- how the cost grows


def sweep(axis, values, problem, long):
    return [
        pytest.param(problem(v), Sweep(axis, v), id=f"{axis}{v}", marks=[LONG] if v in long else []) for v in values
    ]


def measure_sweep(bench, p, swept):
    bench.measure(replace(p, train=True), OURS, NN_GRU, sweep=swept)


HIDDEN = (16, 32, 36, 64, 108, 128, 256, 512)


@pytest.mark.parametrize("p, swept", sweep("H", HIDDEN, lambda h: Recurrence(128, 50, h, h), (256, 512)))
def test_gru_over_hidden_size(bench, p, swept):
    """GRU, forward and backward, as H grows (B128 T50 I=H)."""
    measure_sweep(bench, p, swept)


@pytest.mark.parametrize(
    "p, swept", sweep("B", (1, 4, 16, 64, 256, 1024), lambda b: Recurrence(b, 50, 36, 36), (1024,))
)
def test_gru_over_batch(bench, p, swept):
    """GRU, forward and backward, as B grows (T50 I36 H36)."""
    measure_sweep(bench, p, swept)


@pytest.mark.parametrize(
    "p, swept", sweep("T", (10, 25, 50, 100, 200, 400), lambda t: Recurrence(128, t, 36, 36), (200, 400))
)
def test_gru_over_time(bench, p, swept):
    """GRU, forward and backward, as T grows (B128 I36 H36)."""
    measure_sweep(bench, p, swept)
