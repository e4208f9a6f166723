# SPDX-License-Identifier: Apache-2.0
"""What the tests of the MBA optimizers share."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import dien_ops
from dien_ops import optim

OPTIMIZERS = {
    "sgd": (optim.MBASGD, dict(lr=0.1)),
    "momentum": (optim.MBASGD, dict(lr=0.1, momentum=0.9)),
    "adagrad": (optim.MBAAdagrad, dict(lr=0.1, initial_accumulator_value=0.1)),
    "rowwise_adagrad": (optim.MBARowwiseAdagrad, dict(lr=0.1)),
    "adam": (optim.MBAAdam, dict(lr=0.1, betas=(0.8, 0.99))),
}
EVERY_OPTIMIZER = pytest.mark.parametrize("name", OPTIMIZERS)


def make(name: str, params, **options):
    cls, defaults = OPTIMIZERS[name]
    return cls(params, **{**defaults, **options})


def table(rows: int = 9, dim: int = 3, dtype: torch.dtype = torch.float64, **options) -> dien_ops.MBAEmbedding:
    return dien_ops.MBAEmbedding(rows, dim, dtype=dtype, **options)


def loss_of(embedding: nn.Module, ids: Tensor) -> Tensor:
    rows = embedding(ids)
    scale = torch.arange(1, rows.numel() + 1, dtype=rows.dtype).view(rows.shape)
    return (rows * scale.sin()).sum() + rows.square().sum()


def train(optimizer, embedding: nn.Module, batches: list[Tensor]) -> None:
    for ids in batches:
        optimizer.zero_grad()
        loss_of(embedding, ids).backward()
        optimizer.step()


def batches(count: int = 12, rows: int = 9) -> list[Tensor]:
    return [torch.randint(rows, (2, 3)) for _ in range(count)]


def give_gradient(weight: nn.Parameter, ids: Tensor, rows: Tensor) -> None:
    """A sparse gradient of these rows, as a lookup of the ids would give it."""
    weight.grad = torch.sparse_coo_tensor(ids.unsqueeze(0), rows, weight.shape, check_invariants=True)


def states(optimizer) -> list[Tensor]:
    """All tensors of its state."""
    return [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
