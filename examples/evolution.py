# SPDX-License-Identifier: Apache-2.0
"""Looks inside a trained DIEN: how one history's interest evolves towards different targets (DIEN section 4.6)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from examples.data.behaviours import BehaviourLog
from examples.data.protocol import Examples, Protocol
from examples.models import DIEN

BEHAVIOURS = 10  # the history that is looked at: short enough to be read, as the eight behaviours of the paper's figure


@dataclass(frozen=True)
class Target:
    """One candidate for the next behaviour; item 0 is the paper's "none": all attention scores are 1 / T."""

    role: str
    item: int


@dataclass(frozen=True)
class Evolution:
    """What a history of T behaviours leads to for each of C targets."""

    history: np.ndarray  # int64 [T] items, oldest first
    targets: list[Target]  # C of them, the last one "none"
    attention: np.ndarray  # [C, T], each row sums to 1
    states: np.ndarray  # [C, T, H], the AUGRU's state after each behaviour


def choose_case(log: BehaviourLog, protocol: Protocol) -> tuple[np.ndarray, list[Target]]:
    """Chooses a history and targets from the test by what the data says alone, never by what a model makes of it.

    Of the test examples whose positive shares its category with the behaviour right before it, but not with the oldest
    one shown, the one with the most categories in its history is taken, the first of equals. Beside the positive stand
    two well-known items that the user never meets: one of the oldest behaviour's category, and one of the category that
    the user has turned to least.
    """
    far_enough = protocol.test.position >= BEHAVIOURS
    test = Examples(protocol.test.user[far_enough], protocol.test.position[far_enough])
    shown = np.stack([log.sequences[u][p - BEHAVIOURS : p] for u, p in zip(test.user, test.position, strict=True)])
    positives, categories = protocol.positives(test), log.item_category[shown]
    diversity = 1 + (np.diff(np.sort(categories, axis=1), axis=1) > 0).sum(1)
    wanted = (log.item_category[positives] == categories[:, -1]) & (categories[:, 0] != categories[:, -1])
    chosen = int(np.argmax(diversity + log.num_categories * wanted))  # where nothing is as wanted: the most diverse

    user, position = test.user[chosen], test.position[chosen]
    popularity = np.bincount(protocol.positives(protocol.train), minlength=log.num_items + 1)
    known = np.flatnonzero(popularity >= np.median(popularity[popularity > 0]))
    known = known[~np.isin(known, log.sequences[user])]
    known = known[np.argsort(-popularity[known], kind="stable")]
    category = log.item_category[known]
    turned_to = np.bincount(log.item_category[log.sequences[user][:position]], minlength=log.num_categories + 1)
    return shown[chosen], [
        Target("next behaviour, related to the last", int(positives[chosen])),
        Target("of the oldest one's category", int(known[np.argmax(category == categories[chosen, 0])])),
        Target("unrelated, of the least visited category", int(known[np.argmin(turned_to[category])])),
        Target("none", 0),
    ]


@torch.inference_mode()
def evolve(model: DIEN, history: np.ndarray, targets: list[Target]) -> Evolution:
    """Runs DIEN's interest layers over the history for all targets at once, the last one being "none"."""
    model.eval()
    lengths = torch.tensor([len(history)])
    candidates = torch.tensor([[target.item for target in targets[:-1]]])
    behaviours, embedded = model.items(torch.from_numpy(history)[None], candidates)
    interests = model.extracted(behaviours, lengths)
    attention = model.attention(interests, embedded, lengths=lengths)
    equal = torch.full_like(attention[:, :1], 1 / len(history))
    attention = torch.cat([attention, equal], dim=1)
    states, _ = model.evolution(interests, attention, lengths=lengths)
    return Evolution(history, targets, attention[0].numpy(), states[0].numpy())
