# SPDX-License-Identifier: Apache-2.0
"""The base model of both papers: embedding & MLP, with a history pooled to its mean whatever the target is."""

from __future__ import annotations

from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dien_ops
from examples.data.protocol import Batch
from examples.models.blocks import MLP, ItemEmbedding, Vocabulary, mean_pool


class BaseModel(nn.Module):
    """Scores C targets for the one history of each row.

    The MLP sees the target, the mean of the history and the product of these two. A model that reads the history with
    the target in mind adds what it finds there (:meth:`interest`), and that one's product with the target. In nothing
    else do the models differ.

    Args:
        vocabulary: from the data.
        dim: the embedding size of an item's id and of its category; an item's embedding is D = 2 * dim long.
        mlp: hidden sizes of the MLP.
        layers: where the operators come from; `examples.models.reference_layers` has them in plain PyTorch.
    """

    interests = 0  # how many vectors of length D `interest` returns per target

    def __init__(
        self,
        vocabulary: Vocabulary,
        *,
        dim: int = 18,
        mlp: tuple[int, ...] = (200, 80),
        layers: ModuleType = dien_ops,
    ) -> None:
        super().__init__()
        self.item_dim = 2 * dim
        self.items = ItemEmbedding(vocabulary, dim, layers)
        self.mlp = MLP((3 + 2 * self.interests) * self.item_dim, mlp, layers)

    def forward(self, batch: Batch) -> Tensor:
        """Logits [B, C]."""
        behaviours, targets = self.items(batch.history, batch.targets)
        return self.logits(behaviours, batch.lengths, targets, self.interest(behaviours, batch.lengths, targets))

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """The terms whose sum is minimised: the mean cross-entropy over all targets (DIEN eq. 1), and a model's own."""
        return {"target": F.binary_cross_entropy_with_logits(self(batch), batch.labels)}

    def interest(self, behaviours: Tensor, lengths: Tensor, targets: Tensor) -> list[Tensor]:
        """What behaviours [B, T, D] say with regard to targets [B, C, D]: `interests` tensors [B, C, D]."""
        return []

    def logits(self, behaviours: Tensor, lengths: Tensor, targets: Tensor, interest: list[Tensor]) -> Tensor:
        """The MLP's logits [B, C]."""
        pooled = mean_pool(behaviours, lengths).unsqueeze(1).expand_as(targets)
        views = [pooled, *interest]
        return self.mlp(torch.cat([targets, *views, *(view * targets for view in views)], dim=-1))
