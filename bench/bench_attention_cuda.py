# SPDX-License-Identifier: Apache-2.0
"""Softmax attention over states and the auxiliary loss on a GPU, beside the same composed of torch's operators.

float32 rows may round the factors of products to tf32, ours as the rivals'. Both are bound by memory, so that the share
of the copy's rate is what matters.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bench import rivals
from bench.results import Target
from bench.rivals_attention_cuda import COMPILED, COMPOSED, Attention, Compiler, Pairs, composed, ours

OURS = {"dien_ops": ours}
FROM_A_GRAPH = "dien_ops, graph"
COMPOSED_FROM_A_GRAPH = f"{COMPOSED}, graph"
GRAPHS = FROM_A_GRAPH, COMPOSED_FROM_A_GRAPH  # their memory is taken before the call
DTYPES = torch.float32, torch.bfloat16

compiled = Compiler(seconds=60.0)

# The shape of published DIEN benchmarks first: what a short run cannot reach stands last.
ATTENTION = [
    Attention(1024, 100, 128, target_size=128),
    Attention(1024, 100, 128, target_size=128, uniform_lengths=True),
    Attention(128, 100, 36),
    Attention(4096, 50, 108),
]
SEVERAL = [Attention(1024, 100, 128, target_size=128, targets=8)]
SERVING = [Attention(1, 50, 108, targets=200), Attention(64, 100, 128, targets=200)]
PAIRS = [
    Pairs(1024, 100, 128),
    Pairs(1024, 100, 128, uniform_lengths=True),
    Pairs(128, 100, 36),
    Pairs(4096, 50, 108),
]


def rows(problems):
    return [
        pytest.param(replace(p, dtype=dtype), id=f"{p.name} {str(dtype).removeprefix('torch.')}")
        for dtype in DTYPES
        for p in problems
    ]


def measure(bench, p, times: float) -> None:
    others = {
        FROM_A_GRAPH: rivals.from_a_graph(ours),
        COMPOSED: composed,
        COMPOSED_FROM_A_GRAPH: rivals.from_a_graph(composed),
        COMPILED: compiled,
    }
    bench.measure(p, OURS, others, [Target(COMPOSED, times)], without_memory=GRAPHS)


@pytest.mark.parametrize("p", rows(ATTENTION + SEVERAL))
def test_attention_training(bench, p):
    """Softmax attention over states, forward and backward."""
    measure(bench, replace(p, train=True), 1.5)


@pytest.mark.parametrize("p", rows(PAIRS))
def test_auxiliary_loss_training(bench, p):
    """Auxiliary loss, forward and backward."""
    measure(bench, replace(p, train=True), 1.5)


@pytest.mark.parametrize("p", rows(SERVING + ATTENTION))
def test_attention_forward(bench, p):
    """Softmax attention over states, forward."""
    measure(bench, p, 1.0)


@pytest.mark.parametrize("p", rows(PAIRS))
def test_auxiliary_loss_forward(bench, p):
    """Auxiliary loss, forward."""
    measure(bench, p, 1.0)
