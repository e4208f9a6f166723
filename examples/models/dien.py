# SPDX-License-Identifier: Apache-2.0
"""Deep Interest Evolution Network (Zhou et al., AAAI 2019)."""

from __future__ import annotations

from types import ModuleType

import torch.nn.functional as F
from torch import Tensor

import dien_ops
from examples.data.protocol import Batch
from examples.models.base import BaseModel
from examples.models.blocks import Vocabulary


class DIEN(BaseModel):
    """Follows how interest evolves towards each target.

    A GRU extracts an interest state from each behaviour (eq. 2-5), supervised by the behaviour that follows (eq. 6);
    attention tells how much each state has to do with the target (eq. 8); an AUGRU, whose update gate the attention
    scales, lets the related states move the final interest most (eq. 11-12).

    Args:
        auxiliary_weight: alpha of eq. 7. The auxiliary loss is a sum over up to T - 1 behaviours, so a small alpha.
    """

    interests = 1

    def __init__(
        self,
        vocabulary: Vocabulary,
        *,
        dim: int = 18,
        mlp: tuple[int, ...] = (200, 80),
        auxiliary_weight: float = 0.02,
        layers: ModuleType = dien_ops,
    ) -> None:
        super().__init__(vocabulary, dim=dim, mlp=mlp, layers=layers)
        hidden = self.item_dim  # the auxiliary loss takes inner products of states and behaviours
        self.extractor = layers.GRU(self.item_dim, hidden, batch_first=True)
        self.attention = layers.BilinearAttention(hidden, self.item_dim)
        self.evolution = layers.AUGRU(hidden, hidden, batch_first=True)
        self.auxiliary_loss = layers.AuxiliaryLoss()
        self.auxiliary_weight = auxiliary_weight

    def interest(self, behaviours: Tensor, lengths: Tensor, targets: Tensor) -> list[Tensor]:
        return self.evolved(self.extracted(behaviours, lengths), lengths, targets)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """L_target and alpha L_aux (DIEN eq. 7)."""
        behaviours, unclicked, targets = self.items(batch.history, batch.unclicked, batch.targets)
        states = self.extracted(behaviours, batch.lengths)
        logits = self.logits(behaviours, batch.lengths, targets, self.evolved(states, batch.lengths, targets))
        auxiliary = self.auxiliary_loss(states, behaviours, unclicked, lengths=batch.lengths)
        return {
            "target": F.binary_cross_entropy_with_logits(logits, batch.labels),
            "auxiliary": self.auxiliary_weight * auxiliary,
        }

    def extracted(self, behaviours: Tensor, lengths: Tensor) -> Tensor:
        """The interest state [B, T, H] after each behaviour: once per history, however many targets there are."""
        states, _ = self.extractor(behaviours, lengths=lengths)
        return states

    def evolved(self, states: Tensor, lengths: Tensor, targets: Tensor) -> list[Tensor]:
        """The final interest [B, C, H] to which the states lead with each target in mind."""
        scores = self.attention(states, targets, lengths=lengths)
        _, final = self.evolution(states, scores, lengths=lengths)
        return [final.squeeze(0)]
