# SPDX-License-Identifier: Apache-2.0
"""The papers' measures, exact (ties count half), and how sure they are."""

from __future__ import annotations

import numpy as np


def auc(positives: np.ndarray, negatives: np.ndarray) -> float:
    """The chance that a positive's score is above a negative's; a tie counts half."""
    return float(_wins(positives, np.sort(negatives)).sum() / (len(positives) * len(negatives)))


def auc_with_standard_error(positives: np.ndarray, negatives: np.ndarray) -> tuple[float, float]:
    """The AUC over all users together, and its standard error.

    Predictions for one user hang together, so the user is the unit that is resampled: the standard error is that of the
    jackknife which leaves out one user at a time.

    Args:
        positives: [U, P] scores of each user's positives.
        negatives: [U, P, n] scores of the negatives sampled beside them.
    """
    replicates = leave_one_user_out(positives, negatives)
    return auc(positives.ravel(), negatives.ravel()), jackknife_error(replicates)


def leave_one_user_out(positives: np.ndarray, negatives: np.ndarray) -> np.ndarray:
    """[U]: the AUC without each of the users.

    Counts won pairs once and takes out those in which the user had a part, instead of computing U AUCs.
    """
    users = len(positives)
    negatives = negatives.reshape(users, -1)
    by_positive = _wins(positives.ravel(), np.sort(negatives, axis=None)).reshape(users, -1).sum(1)
    lost_to = _wins(negatives.ravel(), np.sort(positives, axis=None)).reshape(users, -1)
    by_negative = (positives.size - lost_to).sum(1)
    own = np.array([_wins(p, np.sort(n)).sum() for p, n in zip(positives, negatives, strict=True)])
    left = by_positive.sum() - by_positive - by_negative + own
    return left / ((positives.size - positives.shape[1]) * (negatives.size - negatives.shape[1]))


def jackknife_error(replicates: np.ndarray) -> float:
    """The jackknife's standard error from its leave-one-out values."""
    count = len(replicates)
    return float(np.sqrt((count - 1) / count * np.square(replicates - replicates.mean()).sum()))


def gauc(positives: np.ndarray, negatives: np.ndarray) -> float:
    """DIN eq. 10: the AUC of each user alone, averaged with the user's impressions as weights.

    Takes [U, P] and [U, P, n] as above, or lists of arrays where users have different numbers of impressions.
    """
    each = [(auc(np.ravel(p), np.ravel(n)), np.size(p) + np.size(n)) for p, n in zip(positives, negatives, strict=True)]
    return sum(value * impressions for value, impressions in each) / sum(impressions for _, impressions in each)


def relaimpr(auc_model: float, auc_base: float) -> float:
    """DIN eq. 11, in percent: how much further from 0.5, the AUC of guessing, than the base model."""
    return ((auc_model - 0.5) / (auc_base - 0.5) - 1) * 100


def _wins(scores: np.ndarray, sorted_rivals: np.ndarray) -> np.ndarray:
    """For each score, how many of the rivals it beats; a tie counts half."""
    below = np.searchsorted(sorted_rivals, scores, side="left")
    return (below + np.searchsorted(sorted_rivals, scores, side="right")) / 2
