# SPDX-License-Identifier: Apache-2.0
"""What the three models share: sizes, embeddings, pooling and the multi-layer perceptron (MLP)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor, nn

from examples.data.behaviours import PADDING, BehaviourLog
from examples.data.protocol import Batch, Protocol


@dataclass(frozen=True)
class Vocabulary:
    """The sizes that the data decides."""

    item_category: Tensor  # int64 [N + 1], the category of each item; item 0 and category 0 are padding
    num_categories: int
    max_history: int

    @classmethod
    def of(cls, log: BehaviourLog, protocol: Protocol) -> Vocabulary:
        return cls(torch.from_numpy(log.item_category), log.num_categories, protocol.max_history)


class ItemEmbedding(nn.Module):
    """An item's embedding is its id's beside its category's, `2 * dim` numbers."""

    item_category: Tensor

    def __init__(self, vocabulary: Vocabulary, dim: int, layers: ModuleType) -> None:
        super().__init__()
        self.register_buffer("item_category", vocabulary.item_category)
        self.ids = layers.MBAEmbedding(len(vocabulary.item_category), dim, padding_idx=PADDING)
        self.categories = layers.MBAEmbedding(vocabulary.num_categories + 1, dim, padding_idx=PADDING)
        for table in (self.ids, self.categories):
            nn.init.normal_(
                table.weight, std=0.1
            )  # of torch's N(0, 1) the products of two items would be far too large
            nn.init.zeros_(table.weight[PADDING])

    def forward(self, *items: Tensor) -> list[Tensor]:
        """Embeds several tensors of item ids [...] to [..., 2 * dim], with one lookup per table for all of them."""
        flat = torch.cat([ids.flatten() for ids in items])
        embedded = torch.cat([self.ids(flat), self.categories(self.item_category[flat])], dim=-1)
        parts = embedded.split([ids.numel() for ids in items])
        return [part.view(*ids.shape, -1) for part, ids in zip(parts, items, strict=True)]

    def count_(self, training_set: Iterable[Batch]) -> None:
        """Counts in how many training examples each item and category occurs: n_j of DIN eq. 7."""
        for batch in training_set:
            held = torch.cat([batch.history, batch.targets], dim=1)
            self.ids.count_(held)
            self.categories.count_(self.item_category[held])
        for table in (self.ids, self.categories):
            table.counts.clamp_(min=1)  # what only the sampling of negatives brings up


class RecencyEmbedding(nn.Module):
    """Adds to each behaviour [B, T, D] an embedding of how many behaviours ago it was."""

    def __init__(self, max_history: int, dim: int) -> None:
        super().__init__()
        self.table = nn.Embedding(max_history, dim)
        nn.init.zeros_(self.table.weight)

    def forward(self, behaviours: Tensor, lengths: Tensor) -> Tensor:
        ago = lengths.unsqueeze(1) - 1 - torch.arange(behaviours.size(1))
        return behaviours + self.table(ago.clamp(min=0))  # what this adds to the padding is behind the lengths


class MLP(nn.Module):
    """Fully connected layers with Dice between them (DIN section 4.3), and one logit at the end."""

    def __init__(self, input_size: int, hidden_sizes: tuple[int, ...], layers: ModuleType) -> None:
        super().__init__()
        stack: list[nn.Module] = []
        for size in hidden_sizes:
            stack += [nn.Linear(input_size, size), layers.Dice(size)]
            input_size = size
        self.stack = nn.Sequential(*stack, nn.Linear(input_size, 1))

    def forward(self, features: Tensor) -> Tensor:
        """[B, C, input_size] to logits [B, C]; Dice takes its statistics over all B * C rows."""
        return self.stack(features.flatten(0, 1)).view(features.shape[:2])


def mean_pool(behaviours: Tensor, lengths: Tensor) -> Tensor:
    """The mean of behaviours [B, T, D] over time, [B, D]; their padding is zero and so adds nothing."""
    return behaviours.sum(1) / lengths.clamp(min=1).unsqueeze(1)
