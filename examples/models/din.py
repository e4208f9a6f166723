# SPDX-License-Identifier: Apache-2.0
"""Deep Interest Network (Zhou et al., KDD 2018)."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

import dien_ops
from examples.models.base import BaseModel
from examples.models.blocks import RecencyEmbedding, Vocabulary


class DIN(BaseModel):
    """Weighs each behaviour by how much it has to do with the target (DIN eq. 3).

    A sum does not know the order of what is summed, so each behaviour also carries how many behaviours ago it was.
    """

    interests = 1

    def __init__(
        self,
        vocabulary: Vocabulary,
        *,
        dim: int = 18,
        mlp: tuple[int, ...] = (200, 80),
        layers: ModuleType = dien_ops,
    ) -> None:
        super().__init__(vocabulary, dim=dim, mlp=mlp, layers=layers)
        self.recency = RecencyEmbedding(vocabulary.max_history, self.item_dim)
        self.activation_unit = layers.LocalActivationUnit(self.item_dim)

    def interest(self, behaviours: Tensor, lengths: Tensor, targets: Tensor) -> list[Tensor]:
        return [self.activation_unit(targets, self.recency(behaviours, lengths), lengths=lengths)]
