# SPDX-License-Identifier: Apache-2.0
"""The recurrent column on a GPU: GRU and AUGRU, beside cuDNN's GRU, public libraries' loop and torch.compile of it.

float32 rows may round the factors of products to tf32, ours as the rivals'. torch gives bfloat16 to cuDNN in some
versions only; cuDNN's 16-bit GRU is float16's, so that one is beside our bfloat16.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bench import rivals
from bench.compiling import WithinSeconds
from bench.results import PER_SECOND, Target
from bench.rivals import COMPILED, LOOP, Recurrence

OURS = {"dien_ops": rivals.ours}
FROM_A_GRAPH = "dien_ops, graph"
LOOP_FROM_A_GRAPH = f"{LOOP}, graph"
GRAPHS = FROM_A_GRAPH, LOOP_FROM_A_GRAPH  # their memory is taken before the call
CUDNN = {torch.float32: "nn.GRU", torch.bfloat16: "nn.GRU, float16"}  # the rival that targets are against
COMPILE_SECONDS = 60.0

LATENCY = Recurrence(16, 1000, 8, 8, device="cuda")
USER = Recurrence(1, 50, 36, 108, attention=True, targets=200, device="cuda")
# The shape of published DIEN benchmarks (B1024 T100 H128) first: what a short run cannot reach stands last.
SHAPES = [
    Recurrence(*sizes, device="cuda")
    for sizes in (
        (1024, 100, 128, 128),
        (128, 100, 36, 36),
        (256, 50, 36, 108),
        (1024, 100, 64, 64),
        (4096, 50, 128, 128),
        (512, 100, 256, 256),
    )
]


def rows(*problems: Recurrence):
    return [
        pytest.param(replace(p, dtype=dtype), id=f"{p.name} {str(dtype).removeprefix('torch.')}")
        for dtype in CUDNN
        for p in problems
    ]


compiled_loop = WithinSeconds(rivals.compiled_loop, COMPILE_SECONDS)


def measure(bench, p: Recurrence, others, targets) -> None:
    graph = {FROM_A_GRAPH: rivals.from_a_graph(rivals.ours)}
    bench.measure(p, OURS, graph | others, targets, without_memory=GRAPHS, steps=p.steps)


def measure_gru(bench, p: Recurrence, targets=()) -> None:
    others = {"nn.GRU": rivals.nn_gru}
    if p.dtype == torch.bfloat16:
        others[CUDNN[p.dtype]] = rivals.in_dtype(rivals.nn_gru, torch.float16)
    measure(bench, p, others, targets)


def measure_augru(bench, p: Recurrence, targets=()) -> None:
    p = replace(p, attention=True)
    cudnn = rivals.nn_gru if p.dtype == torch.float32 else rivals.in_dtype(rivals.nn_gru, torch.float16)
    others = {
        LOOP: rivals.python_loop,
        LOOP_FROM_A_GRAPH: rivals.from_a_graph(rivals.python_loop),
        COMPILED: compiled_loop,
        without(CUDNN[p.dtype]): rivals.without_attention(cudnn),
    }
    measure(bench, p, others, targets)


def without(cudnn: str) -> str:
    return f"{cudnn}, no attention"


@pytest.mark.parametrize("train", [False, True], ids=["forward", "forward and backward"])
def test_gru_latency_of_a_step(bench, train):
    """GRU, B16 T1000 I8 H8: the time of a step that has next to nothing to do is this chip's latency of a step."""
    measure(bench, replace(LATENCY, train=train), {"nn.GRU": rivals.nn_gru}, [])


@pytest.mark.parametrize("p", rows(*SHAPES))
def test_gru_training(bench, p):
    """GRU, forward and backward."""
    measure_gru(bench, replace(p, train=True), [Target(CUDNN[p.dtype], 1.0)])


@pytest.mark.parametrize("p", rows(*SHAPES))
def test_augru_training(bench, p):
    """AUGRU, forward and backward."""
    measure_augru(bench, replace(p, train=True), [Target(without(CUDNN[p.dtype]), 1.0)])


@pytest.mark.parametrize("p", rows(USER))
def test_augru_of_many_targets(bench, p):
    """AUGRU, forward: 200 targets of one user (rivals: 200 copies of the history)."""
    others = {
        LOOP: rivals.python_loop,
        LOOP_FROM_A_GRAPH: rivals.from_a_graph(rivals.python_loop),
        "dien_ops on copies": rivals.ours_on_copies,
    }
    measure(bench, p, others, [Target(PER_SECOND, 1000)])


@pytest.mark.parametrize("p", rows(*SHAPES))
def test_gru_forward(bench, p):
    """GRU, forward."""
    measure_gru(bench, p)


@pytest.mark.parametrize("p", rows(*SHAPES))
def test_augru_forward(bench, p):
    """AUGRU, forward."""
    measure_augru(bench, p)
