# SPDX-License-Identifier: Apache-2.0
"""The attention column's work, and how public libraries write it in torch's operators; who does it: ``composed.py``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.composed import Composed


def valid_steps(lengths: Tensor, steps: int) -> Tensor:
    """[B, T]: the mask that public libraries make."""
    return torch.arange(steps, device=lengths.device) < lengths.unsqueeze(1)


def masked_softmax(logits: Tensor, lengths: Tensor | None) -> Tensor:
    """Over the last axis of [B, C, T]; 0 where there is nothing."""
    if lengths is None:
        return logits.softmax(-1)
    valid = valid_steps(lengths, logits.shape[-1]).unsqueeze(1)
    scores = logits.masked_fill(~valid, torch.finfo(logits.dtype).min).softmax(-1)
    return torch.where(valid, scores, 0.0)


# ----------------------------------------------------------------------------------------------- local activation unit


def dice_of_the_batch(s: Tensor, alpha: Tensor, eps: float = 1e-8) -> Tensor:
    axes = tuple(range(s.dim() - 1))
    var, mean = torch.var_mean(s, axes, correction=0)
    p = torch.sigmoid((s - mean) / (var.sqrt() + eps))
    return p * s + (1 - p) * alpha * s


@dataclass(frozen=True)
class Unit(Composed):
    """DIN's unit over [B, T, D]; with targets, over C of them for each sequence."""

    batch: int = 1024
    steps: int = 50
    embedding_dim: int = 36
    hidden_sizes: tuple[int, ...] = (80, 40)
    activation: str = "sigmoid"
    softmax: bool = False
    targets: int | None = None

    @property
    def name(self) -> str:
        sizes = "-".join(map(str, (*self.hidden_sizes, 1)))
        targets = "" if self.targets is None else f" C{self.targets}"
        return f"B{self.batch}{targets} T{self.steps} D{self.embedding_dim} {sizes} {self.activation}"

    @property
    def rows_and_steps(self) -> tuple[int, int]:
        return self.batch, self.steps

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        D = self.embedding_dim
        widths = [4 * D, *self.hidden_sizes, 1]
        query = (self.batch, D) if self.targets is None else (self.batch, self.targets, D)
        alphas = [] if self.activation == "sigmoid" else [(h,) for h in self.hidden_sizes]
        return [
            query,
            (self.batch, self.steps, D),
            *((o, i) for i, o in pairwise(widths)),
            *((o,) for o in widths[1:]),
            *alphas,
        ]

    def leaves(self, dtype: torch.dtype | None = None) -> list[Tensor]:
        """Weights as nn.Linear's, else deep layers would saturate."""
        leaves = super().leaves(dtype)
        weights, biases, _ = self._split(leaves[2:])
        with torch.no_grad():
            for weight in weights:
                weight.mul_(weight.shape[1] ** -0.5)
        if self.softmax:  # it takes no notice of the output's bias, whose gradient would be nothing but rounding
            biases[-1].requires_grad_(False)
        return leaves

    @property
    def flops(self) -> float:
        """Of the split form, whose first layer is a D x H1 product of each step."""
        widths = [self.embedding_dim, *self.hidden_sizes, 1]
        return 2.0 * self.valid_steps * (self.targets or 1) * sum(i * o for i, o in pairwise(widths))

    def _split(self, parameters: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]:
        n = len(self.hidden_sizes) + 1
        return parameters[:n], parameters[n : 2 * n], parameters[2 * n :]

    def ours(self, module: Any, lengths: Tensor | None, *leaves: Tensor) -> Tensor:
        query, keys, *parameters = leaves
        weights, biases, alphas = self._split(parameters)
        result: Tensor = module.local_activation_unit(
            query,
            keys,
            weights,
            biases,
            alphas=alphas,
            activation=self.activation,
            softmax=self.softmax,
            lengths=lengths,
        )
        return result

    def composed(self, lengths: Tensor | None, *leaves: Tensor) -> Tensor:
        query, keys, *parameters = leaves
        weights, biases, alphas = self._split(parameters)
        queries = query if query.dim() == 3 else query.unsqueeze(1)
        q, k = torch.broadcast_tensors(queries.unsqueeze(2), keys.unsqueeze(1))  # [B, C, T, D]
        hidden = torch.cat([q, k, q - k, q * k], dim=-1)
        for i in range(len(self.hidden_sizes)):
            hidden = F.linear(hidden, weights[i], biases[i])
            if self.activation == "sigmoid":
                hidden = torch.sigmoid(hidden)
            elif self.activation == "prelu":
                hidden = F.prelu(hidden.flatten(0, 2), alphas[i]).view_as(hidden)
            else:
                hidden = dice_of_the_batch(hidden, alphas[i])
        logits = F.linear(hidden, weights[-1], biases[-1]).squeeze(-1)  # [B, C, T]
        if self.softmax:
            scores = masked_softmax(logits, lengths)
        elif lengths is not None:
            scores = torch.where(valid_steps(lengths, self.steps).unsqueeze(1), logits, 0.0)
        else:
            scores = logits
        pooled = torch.matmul(scores, keys)
        return pooled if query.dim() == 3 else pooled.squeeze(1)


# --------------------------------------------------------------------------------------------------- bilinear attention


@dataclass(frozen=True)
class Bilinear(Composed):
    """DIEN's attention over states [B, T, H]; with targets, of C of them for each sequence."""

    batch: int = 1024
    steps: int = 100
    hidden_size: int = 64
    target_size: int = 64
    targets: int | None = None

    @property
    def name(self) -> str:
        targets = "" if self.targets is None else f" C{self.targets}"
        return f"B{self.batch}{targets} T{self.steps} H{self.hidden_size} A{self.target_size}"

    @property
    def rows_and_steps(self) -> tuple[int, int]:
        return self.batch, self.steps

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        target = (self.batch,) if self.targets is None else (self.batch, self.targets)
        states = (self.batch, self.steps, self.hidden_size)
        return [states, (*target, self.target_size), (self.hidden_size, self.target_size)]

    @property
    def bytes(self) -> float:
        """The valid states and all scores; in training also the states again, their gradient and the scores'."""
        states = self.valid_steps * self.hidden_size
        scores = self.batch * (self.targets or 1) * self.steps
        return float(self.dtype.itemsize * (3 * states + 3 * scores if self.train else states + scores))

    def ours(self, module: Any, lengths: Tensor | None, *leaves: Tensor) -> Tensor:
        result: Tensor = module.bilinear_attention(*leaves, lengths=lengths)
        return result

    def composed(self, lengths: Tensor | None, *leaves: Tensor) -> Tensor:
        states, target, weight = leaves
        targets = target if target.dim() == 3 else target.unsqueeze(1)
        logits = torch.matmul(F.linear(targets, weight), states.mT)  # [B, C, T]
        scores = masked_softmax(logits, lengths)
        return scores if target.dim() == 3 else scores.squeeze(1)


# ------------------------------------------------------------------------------------------------------- auxiliary loss


@dataclass(frozen=True)
class Auxiliary(Composed):
    """DIEN's auxiliary loss with the inner product over [B, T, H]."""

    batch: int = 1024
    steps: int = 100
    hidden_size: int = 64

    @property
    def name(self) -> str:
        return f"B{self.batch} T{self.steps} H{self.hidden_size}"

    @property
    def rows_and_steps(self) -> tuple[int, int]:
        return self.batch, self.steps

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        return [(self.batch, self.steps, self.hidden_size)] * 3

    @property
    def bytes(self) -> float:
        """The three sequences; in training read again, and their gradients written."""
        once = 3 * self.valid_steps * self.hidden_size
        return float(self.dtype.itemsize * (3 * once if self.train else once))

    def ours(self, module: Any, lengths: Tensor | None, *leaves: Tensor) -> Tensor:
        result: Tensor = module.auxiliary_loss(*leaves, lengths=lengths)
        return result

    def composed(self, lengths: Tensor | None, *leaves: Tensor) -> Tensor:
        states, positives, negatives = leaves
        h = states[:, :-1]
        clicked, sampled = ((h * items[:, 1:]).sum(-1) for items in (positives, negatives))
        losses = F.softplus(-clicked) + F.softplus(sampled)
        if lengths is not None:
            losses = torch.where(valid_steps(lengths, self.steps)[:, 1:], losses, 0.0)
        return losses.sum() / self.batch
