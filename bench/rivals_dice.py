# SPDX-License-Identifier: Apache-2.0
"""The Dice column's work, and how public libraries write it in torch's operators; who does it: ``composed.py``, and
F.batch_norm, which has the statistics in one operator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.composed import Composed, contestant
from bench.harness import Contestant, Unavailable

BATCH_NORM = "F.batch_norm"  # as tables call it
EPS = 1e-8


@dataclass(frozen=True)
class Activation(Composed):
    """Dice over [N, C], or with ``steps`` over [B, T, C]."""

    rows: int  # N, or B
    channels: int
    steps: int | None = None
    batch_statistics: bool = True  # else the moving averages

    @property
    def name(self) -> str:
        if self.steps is None:
            return f"N{self.rows} C{self.channels}"
        return f"B{self.rows} T{self.steps} C{self.channels}"

    @property
    def rows_and_steps(self) -> tuple[int, int]:
        return self.rows, self.steps or 1

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        rows = (self.rows,) if self.steps is None else (self.rows, self.steps)
        return [(*rows, self.channels), *[(self.channels,)] * 3]  # input, alpha, the averages of mean and variance

    def leaves(self, dtype: torch.dtype | None = None) -> list[Tensor]:
        """Averages get no gradient, and a variance is not negative."""
        s, alpha, mean, var = super().leaves(dtype)
        return [s, alpha, mean.detach(), var.detach().abs().clamp(min=0.5)]

    @property
    def bytes(self) -> float:
        """The fewest that must be moved without room to keep the input between two passes over it: with the batch's
        statistics the input is read for these and for the output, then input and gradient for the sums over the batch
        and for the input's gradient. Padding is written and not read."""
        batch, steps = self.rows_and_steps
        passes = 2 if self.batch_statistics else 1
        tensors = passes * self.valid_steps + batch * steps
        if self.train:
            tensors += 2 * passes * self.valid_steps + batch * steps
        return float(tensors * self.channels * self.dtype.itemsize)

    def ours(self, module: Any, lengths: Tensor | None, *leaves: Tensor) -> Tensor:
        s, alpha, *averages = leaves
        given = () if self.batch_statistics else averages
        result: Tensor = module.dice(s, alpha, *given, training=self.batch_statistics, eps=EPS, lengths=lengths)
        return result

    def composed(self, lengths: Tensor | None, *leaves: Tensor) -> Tensor:
        """The equation, written down."""
        s, alpha, mean, var = leaves
        valid = None
        if lengths is not None:
            valid = (torch.arange(s.size(1), device=s.device) < lengths.unsqueeze(1)).unsqueeze(-1)
        if self.batch_statistics and valid is None:
            axes = tuple(range(s.dim() - 1))
            mean, var = s.mean(axes), s.var(axes, correction=0)
        elif self.batch_statistics:
            count = valid.sum()
            mean = torch.where(valid, s, 0).sum((0, 1)) / count
            var = torch.where(valid, s - mean, 0).square().sum((0, 1)) / count
        p = torch.sigmoid((s - mean) / (var.sqrt() + EPS))
        f = p * s + (1 - p) * alpha * s
        return f if valid is None else torch.where(valid, f, 0)

    def with_batch_norm(self, lengths: Tensor | None, *leaves: Tensor) -> Tensor:
        """As public libraries build it. EPS is below the root, which makes no difference that counts here."""
        if lengths is not None:
            raise Unavailable("padding would count in its statistics")
        s, alpha, *averages = leaves
        given = (None, None) if self.batch_statistics else averages
        x = F.batch_norm(s.flatten(0, -2), *given, training=self.batch_statistics, eps=EPS)
        p = torch.sigmoid(x.view_as(s))
        return p * s + alpha * (1 - p) * s


def batch_norm(p: Activation) -> Contestant:
    return contestant(p, p.with_batch_norm)
