# SPDX-License-Identifier: Apache-2.0
"""Small cases of the embedding column for gpu_small.py: every rule, kind of decay, precision and kind of size once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

import dien_ops
from bench.small_cases import check_finite
from dien_ops import optim

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
OPTIMIZERS = {
    "sgd": (optim.MBASGD, {}),
    "momentum": (optim.MBASGD, {"momentum": 0.9}),
    "adagrad": (optim.MBAAdagrad, {}),
    "rowwise_adagrad": (optim.MBARowwiseAdagrad, {}),
    "adam": (optim.MBAAdam, {}),
}
# num_embeddings, D and N of the tables of one call: rows that are no vector's multiple, a long run of one id, no ids
TABLES = ((11, 5, 9), (3000, 33, 2100), (70, 1, 500), (40, 64, 0), (1, 8, 300))


@dataclass(frozen=True)
class Case:
    rule: str
    dtype: torch.dtype
    decay: str = "mini_batch_aware"
    nonfinite: str = "propagate"
    check_ids: bool = True
    scaled: bool = False


def cases() -> Iterator[Case]:
    """In every precision every rule, with what else there is spread over them."""
    for dtype in DTYPES:
        for rule in OPTIMIZERS:
            yield Case(rule, dtype)
            yield Case(rule, dtype, decay="decoupled", nonfinite="skip", check_ids=False, scaled=True)
        yield Case("sgd", dtype, decay="lazy", nonfinite="error")


def run(case: Case, device: str) -> None:
    """Two steps of an optimizer with all tables. Raises FloatingPointError: a result is not finite."""
    tables = [
        dien_ops.MBAEmbedding(rows, dim, padding_idx=0, device=device, dtype=case.dtype) for rows, dim, _ in TABLES
    ]
    for table in tables[1:]:
        table.counts = torch.ones(table.num_embeddings, device=device)
    optimizer_class, options = OPTIMIZERS[case.rule]
    optimizer = optimizer_class(
        [table.weight for table in tables], lr=0.1, decay=case.decay, nonfinite=case.nonfinite,
        check_ids=case.check_ids, **options,
    )  # fmt: skip
    if case.scaled:
        optimizer.grad_scale = torch.full((), 4.0, device=device)
        optimizer.found_inf = torch.zeros((), device=device)
    for _ in range(2):
        for table, (rows, _, size) in zip(tables, TABLES, strict=True):
            ids = torch.randint(rows, (size,), device=device)
            ids[::3] = rows // 2
            _backward(table, ids)
        optimizer.step()
    if case.decay == "lazy":
        optimizer.catch_up_()
    check_finite(case, (table.weight.detach() for table in tables))


def _backward(table: nn.Embedding, ids: torch.Tensor) -> None:
    table.weight.grad = None
    table(ids).square().sum().backward()
