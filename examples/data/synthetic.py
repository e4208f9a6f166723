# SPDX-License-Identifier: Apache-2.0
"""Behaviours with planted interest drift, for which the right answer is known.

Each user is interested in one category at a time. Before every behaviour the interest moves on with probability DRIFT,
always to the successor on a fixed ring of categories; the behaviour is then of the category of interest (with
probability NOISE: of any category), and is an item of it that the user has not met yet. A history of 50 behaviours so
holds most categories, and what comes next depends on the last ones alone: a model that pools behaviours without regard
to their order cannot know it, a model of how interest evolves can. The true probabilities are the best
scores there are.
"""

from __future__ import annotations

import numpy as np

from examples.data.behaviours import BehaviourLog

DRIFT = 0.2
NOISE = 0.1


def generate_synthetic(
    num_users: int = 1000, items_per_category: int = 150, num_categories: int = 12, mean_length: int = 80, seed: int = 0
) -> BehaviourLog:
    """Generates sequences of 0.5 to 1.5 times `mean_length` behaviours; the same seed gives the same data."""
    longest = mean_length * 3 // 2
    if longest > items_per_category:
        raise ValueError(
            f"items_per_category must be at least 1.5 * mean_length = {longest}, so that no user runs out of unmet "
            f"items, got {items_per_category}"
        )
    rng = np.random.default_rng([seed, 1])
    item_ids = 1 + rng.permutation(num_categories * items_per_category).reshape(num_categories, items_per_category)
    item_category = np.zeros(item_ids.size + 1, dtype=np.int64)
    item_category[item_ids] = 1 + np.arange(num_categories)[:, None]
    sequences, interests = [], []
    for _ in range(num_users):
        length = int(rng.integers(mean_length // 2, longest + 1))
        moves = np.cumsum(rng.random(length) < DRIFT)
        interest = (rng.integers(num_categories) + moves) % num_categories
        category = np.where(rng.random(length) < NOISE, rng.integers(num_categories, size=length), interest)
        unmet = rng.permuted(item_ids, axis=1)
        taken = np.array([(category[:t] == category[t]).sum() for t in range(length)])
        sequences.append(unmet[category, taken])
        interests.append(1 + interest)
    return BehaviourLog(
        "synthetic",
        sequences,
        item_category,
        ["(padding)"] + [f"item {i}" for i in range(1, item_ids.size + 1)],
        ["(padding)"] + [f"category {k}" for k in range(1, num_categories + 1)],
        interests=interests,
    )


def oracle_scores(log: BehaviourLog, users: np.ndarray, positions: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """The true probability of each target, given the user's true interest right before and all items met so far.

    Args:
        users, positions: int64 [N]; the behaviour `log.sequences[user][position]` is to be predicted, position >= 1.
        targets: int64 [N, C] item ids that the user has not met before that position.

    Returns:
        float64 [N, C].
    """
    assert log.interests is not None, "only generated data has an oracle"
    sizes = np.bincount(log.item_category[1:], minlength=log.num_categories + 1)
    scores = np.empty(targets.shape)
    for row, (user, position) in enumerate(zip(users, positions, strict=True)):
        met = np.bincount(log.item_category[log.sequences[user][:position]], minlength=len(sizes))
        before = log.interests[user][position - 1]
        category_chance = np.full(len(sizes), NOISE / log.num_categories)
        category_chance[before] += (1 - NOISE) * (1 - DRIFT)
        category_chance[1 + before % log.num_categories] += (1 - NOISE) * DRIFT
        category = log.item_category[targets[row]]
        scores[row] = (category_chance / np.maximum(sizes - met, 1))[category]
    return scores
