# SPDX-License-Identifier: Apache-2.0
"""The layers of DIEN with every operator in plain PyTorch, recurrences as loops over time.

Each has the parameters of its namesake in :mod:`dien_ops` and computes with :mod:`dien_ops.reference` instead of a
kernel: `DIEN(vocabulary, layers=reference_layers)` is the twin that `examples.speed` measures against, the way in which
DIEN is usually written in PyTorch.
"""

from __future__ import annotations

import torch
from torch import Tensor

import dien_ops
from dien_ops import MBAEmbedding, reference
from examples.models.blocks import ItemEmbedding

__all__ = ["AUGRU", "GRU", "AuxiliaryLoss", "BilinearAttention", "Dice", "MBAEmbedding", "RowAdam"]


class GRU(dien_ops.GRU):
    def forward(self, input: Tensor, *, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return reference.gru(
            input,
            self.weight_ih_l0,
            self.weight_hh_l0,
            self.bias_ih_l0,
            self.bias_hh_l0,
            lengths=lengths,
            batch_first=self.batch_first,
        )


class AUGRU(dien_ops.AUGRU):
    def forward(self, input: Tensor, attention: Tensor, *, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        output, final = reference.attentional_gru(
            input,
            attention,
            self.weight_ih_l0,
            self.weight_hh_l0,
            self.bias_ih_l0,
            self.bias_hh_l0,
            gate=self.gate,
            lengths=lengths,
            batch_first=self.batch_first,
        )
        return output, final.unsqueeze(0)


class BilinearAttention(dien_ops.BilinearAttention):
    def forward(self, states: Tensor, target: Tensor, *, lengths: Tensor | None = None) -> Tensor:
        return reference.bilinear_attention(states, target, self.weight, lengths=lengths)


class AuxiliaryLoss(dien_ops.AuxiliaryLoss):
    def forward(self, states: Tensor, positives: Tensor, negatives: Tensor, *, lengths: Tensor | None = None) -> Tensor:
        return reference.auxiliary_loss(states, positives, negatives, lengths=lengths, reduction=self.reduction)


class Dice(dien_ops.Dice):
    def forward(self, input: Tensor) -> Tensor:
        return reference.dice(
            input,
            self.alpha,
            self.running_mean,
            self.running_var,
            training=self.training,
            momentum=self.momentum,
            eps=self.eps,
        )


class RowAdam(torch.optim.Optimizer):
    """What `dien_ops.optim.MBAAdam` does to the tables of an item embedding, by `reference.mba_adam_`."""

    def __init__(self, items: ItemEmbedding, lr: float, l2: float) -> None:
        tables = (items.ids, items.categories)
        super().__init__([{"params": [table.weight], "counts": table.counts} for table in tables], {"lr": lr, "l2": l2})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            (weight,) = group["params"]
            state = self.state[weight]
            if not state:
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(weight), torch.zeros_like(weight)
                state["step"] = torch.zeros(len(weight), dtype=torch.int64)
            ids, rows = weight.grad._indices()[0], weight.grad._values()
            options = {"lr": group["lr"], "l2": group["l2"], "counts": group["counts"]}
            reference.mba_adam_(weight, state["exp_avg"], state["exp_avg_sq"], state["step"], ids, rows, **options)
