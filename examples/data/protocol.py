# SPDX-License-Identifier: Apache-2.0
"""The task: from what a user did before, tell the next item from sampled ones.

An example is one behaviour to be predicted, with the up to `max_history` behaviours right before it as history. Of each
user's behaviours the last `holdout` are the test, the `validation` before those choose the epoch, and all earlier ones
that have a history are for training. So no test label is trained on and no history reaches past its own example; a test
history does hold the user's earlier held-out behaviours, each being the past by then.

The positive of an example is the behaviour itself. Its negatives are drawn uniformly from the items that the user has
not met up to and including that behaviour: never the positive, and nothing that would be recognised as seen before.
What the user turns to later is not looked at, so a negative may be a later behaviour, as in life.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from examples.data.behaviours import PADDING, BehaviourLog


@dataclass(frozen=True)
class Examples:
    """N behaviours to be predicted: `log.sequences[user][position]`."""

    user: np.ndarray  # int64 [N]
    position: np.ndarray  # int64 [N], >= 1

    def __len__(self) -> int:
        return len(self.user)


@dataclass(frozen=True)
class Batch:
    """B examples with C targets each, the positive first."""

    history: Tensor  # int64 [B, T] item ids, oldest first, 0 behind the length
    lengths: Tensor  # int64 [B], 1..T
    targets: Tensor  # int64 [B, C] item ids
    unclicked: Tensor  # int64 [B, T] a sampled item beside each behaviour of the history, for DIEN's auxiliary loss

    @property
    def labels(self) -> Tensor:
        """float32 [B, C]: one for the positive, zero for the others."""
        return (torch.arange(self.targets.size(1)) == 0).float().expand(self.targets.shape)


class Protocol:
    """Splits a log into examples and turns these into batches.

    Args:
        log: the behaviours.
        max_history, holdout, validation: see the head of this module. A user with fewer than `holdout + validation + 2`
            behaviours is only trained on (and counted in `users_without_test`).
        seed: of every random draw; draws for training, validation and test are independent of each other.
    """

    def __init__(
        self, log: BehaviourLog, *, max_history: int = 50, holdout: int = 10, validation: int = 2, seed: int = 0
    ) -> None:
        self.log, self.max_history, self.seed = log, max_history, seed
        lengths = np.array([len(sequence) for sequence in log.sequences])
        tested = lengths >= holdout + validation + 2
        self.users_without_test = int((~tested).sum())
        test_start = np.where(tested, lengths - holdout, lengths)
        validation_start = np.where(tested, test_start - validation, lengths)
        self.train = _range_examples(np.ones_like(lengths), validation_start)
        self.validation = _range_examples(validation_start, test_start)
        self.test = _range_examples(test_start, lengths)

        self._items = np.concatenate(log.sequences)  # all users' behaviours, one after the other
        self._start = np.concatenate([[0], np.cumsum(lengths)[:-1]])
        # (user, item) pairs in sorted order, with the position of each pair's first occurrence
        owner = np.repeat(np.arange(len(lengths)), lengths)
        pairs, first = np.unique(owner * (log.num_items + 1) + self._items, return_index=True)
        self._met_pairs, self._met_at = pairs, first - self._start[owner[first]]
        if np.bincount(owner[first]).max() >= log.num_items:
            raise ValueError(f"a user has met all {log.num_items} items, so there is no negative left to draw")

    def histories(self, examples: Examples) -> tuple[np.ndarray, np.ndarray]:
        """The histories, int64 [N, T] with padding behind, and their lengths [N]; T is the longest of them."""
        lengths = np.minimum(examples.position, self.max_history)
        steps = np.arange(lengths.max(initial=1))
        valid = steps < lengths[:, None]
        oldest = self._start[examples.user] + examples.position - lengths
        source = np.where(valid, oldest[:, None] + steps, 0)
        return np.where(valid, self._items[source], PADDING), lengths

    def positives(self, examples: Examples) -> np.ndarray:
        return self._items[self._start[examples.user] + examples.position]

    def negatives(self, examples: Examples, count: int, rng: np.random.Generator) -> np.ndarray:
        """int64 [N, count]: uniform over the items that the user has not met up to and including the example."""
        user, position = examples.user[:, None], examples.position[:, None]
        drawn = rng.integers(1, self.log.num_items + 1, (len(examples), count))
        while True:
            pairs = user * (self.log.num_items + 1) + drawn
            at = np.minimum(np.searchsorted(self._met_pairs, pairs), len(self._met_pairs) - 1)
            met = (self._met_pairs[at] == pairs) & (self._met_at[at] <= position)
            if not met.any():
                return drawn
            drawn[met] = rng.integers(1, self.log.num_items + 1, int(met.sum()))

    def batches(
        self, examples: Examples, batch_size: int, negatives: int, stream: tuple[int, ...], shuffle: bool = False
    ) -> Iterator[Batch]:
        """Yields the examples in batches; `stream` names the random draws, so that the same stream repeats them."""
        rng = np.random.default_rng([self.seed, *stream])
        order = rng.permutation(len(examples)) if shuffle else np.arange(len(examples))
        for begin in range(0, len(order), batch_size):
            chosen = order[begin : begin + batch_size]
            yield self._batch(Examples(examples.user[chosen], examples.position[chosen]), negatives, rng)

    def _batch(self, examples: Examples, negatives: int, rng: np.random.Generator) -> Batch:
        history, lengths = self.histories(examples)
        sampled = self.negatives(examples, negatives, rng)
        # One of the N - 1 other items: a draw at or above the behaviour's own id moves up by one.
        other = rng.integers(1, self.log.num_items, history.shape)
        other += other >= history
        return Batch(
            history=torch.from_numpy(history),
            lengths=torch.from_numpy(lengths),
            targets=torch.from_numpy(np.column_stack([self.positives(examples), sampled])),
            unclicked=torch.from_numpy(np.where(history == PADDING, PADDING, other)),
        )


def _range_examples(begin: np.ndarray, end: np.ndarray) -> Examples:
    """The positions begin[u]..end[u]-1 of every user u."""
    sizes = np.maximum(end - begin, 0)
    user = np.repeat(np.arange(len(sizes)), sizes)
    within = np.arange(len(user)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return Examples(user.astype(np.int64), (begin[user] + within).astype(np.int64))
