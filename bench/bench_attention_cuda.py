# SPDX-License-Identifier: Apache-2.0
"""Softmax attention over states and the auxiliary loss on a GPU, beside their equations in eager torch and through
torch.compile.

float32 rows may round the factors of products to tf32, ours as the rivals'. Both are bound by memory, so that the share
of the copy's rate is what matters.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bench import composed
from bench.composed import EAGER
from bench.results import Target
from bench.rivals_attention import Auxiliary, Bilinear

OURS = {"dien_ops": composed.ours}
RIVALS = composed.on_gpu()
DTYPES = torch.float32, torch.bfloat16

# The shape of published DIEN benchmarks first: what a short run cannot reach stands last.
ATTENTION = [
    Bilinear(1024, 100, 128, 128, device="cuda"),
    Bilinear(1024, 100, 128, 128, uniform_lengths=True, device="cuda"),
    Bilinear(128, 100, 36, 36, device="cuda"),
    Bilinear(4096, 50, 108, 36, device="cuda"),
]
SEVERAL = [Bilinear(1024, 100, 128, 128, targets=8, device="cuda")]
SERVING = [Bilinear(1, 50, 108, 36, targets=200, device="cuda"), Bilinear(64, 100, 128, 36, targets=200, device="cuda")]
PAIRS = [
    Auxiliary(1024, 100, 128, device="cuda"),
    Auxiliary(1024, 100, 128, uniform_lengths=True, device="cuda"),
    Auxiliary(128, 100, 36, device="cuda"),
    Auxiliary(4096, 50, 108, device="cuda"),
]


def padded(p) -> str:
    return ", uniform lengths" if p.uniform_lengths else ""


def rows(problems):
    return [
        pytest.param(replace(p, dtype=dtype), id=f"{p.name}{padded(p)} {str(dtype).removeprefix('torch.')}")
        for dtype in DTYPES
        for p in problems
    ]


def measure(bench, p, times: float) -> None:
    bench.measure(p, OURS, RIVALS, [Target(EAGER, times)], without_memory=composed.WITHOUT_MEMORY_ON_GPU)


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
