# SPDX-License-Identifier: Apache-2.0
"""What every data set is turned into: each user's behaviours, oldest first, and what is known of the items."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

PADDING = 0  # item 0 and category 0 fill the histories up; real ids start at 1


@dataclass
class RejectedLines:
    """Input lines that could not be used: all are counted, the first few are kept to be shown."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, where: str, why: str) -> None:
        self.count += 1
        if len(self.first) < 5:
            self.first.append(f"{where}: {why}")


@dataclass(frozen=True)
class BehaviourLog:
    """Behaviour sequences of U users over N items of K categories.

    Attributes:
        name: what `--dataset` calls it.
        sequences: per user, int64 [n_u] item ids in 1..N, oldest first.
        item_category: int64 [N + 1], the category (1..K) of each item; entry 0 is the padding's, 0.
        item_names: N + 1 names to show; entry 0 is the padding's.
        category_names: K + 1 names to show.
        rejected: the lines of the source files that could not be used.
        interests: where the data was generated, per user the category that the user was truly interested in at each
            behaviour (int64 [n_u]); None for real data.
    """

    name: str
    sequences: list[np.ndarray]
    item_category: np.ndarray
    item_names: list[str]
    category_names: list[str]
    rejected: RejectedLines = field(default_factory=RejectedLines)
    interests: list[np.ndarray] | None = None

    @property
    def num_items(self) -> int:
        return len(self.item_category) - 1

    @property
    def num_categories(self) -> int:
        return len(self.category_names) - 1

    @property
    def num_behaviours(self) -> int:
        return sum(len(sequence) for sequence in self.sequences)

    def first_users(self, count: int) -> BehaviourLog:
        """The same log with the first `count` users only."""
        interests = None if self.interests is None else self.interests[:count]
        return replace(self, sequences=self.sequences[:count], interests=interests)
