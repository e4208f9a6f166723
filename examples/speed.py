# SPDX-License-Identifier: Apache-2.0
"""How fast DIEN trains with the kernels, against its twin in plain PyTorch: the same steps, one beside the other."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from itertools import islice

from torch import Tensor
from tqdm import tqdm

from examples.data.protocol import Protocol
from examples.models import DIEN, Vocabulary, reference_layers
from examples.training import SPEED_STREAM, Settings, Trainer

STEPS = 20
LOSS_TOLERANCE = 1e-5  # relative; float32 sums of some ten thousand terms in two orders differ by about 1e-6


@dataclass(frozen=True)
class Comparison:
    samples_per_s: float  # (history, target) pairs; forward, backward and update
    reference_samples_per_s: float
    loss_difference: float  # relative, before the first update

    @property
    def speedup(self) -> float:
        return self.samples_per_s / self.reference_samples_per_s


def compare_with_reference(
    weights: dict[str, Tensor], vocabulary: Vocabulary, protocol: Protocol, settings: Settings
) -> Comparison:
    """Trains two DIENs of the same weights, one of kernels and one of plain PyTorch, for a few interleaved steps.

    Raises:
        RuntimeError: they disagree about the loss.
    """
    ours = DIEN(vocabulary)
    twin = DIEN(vocabulary, layers=reference_layers)
    for model in (ours, twin):
        model.load_state_dict(weights)
    trainers = (
        Trainer(ours, settings),
        Trainer(twin, settings, reference_layers.RowAdam(twin.items, settings.lr, settings.l2)),
    )
    stream = (SPEED_STREAM,)
    drawn = list(islice(protocol.batches(protocol.train, settings.batch_size, settings.negatives, stream, True), STEPS))
    batches = [batch for batch in drawn if len(batch.history) == len(drawn[0].history)]
    seconds: tuple[list[float], list[float]] = ([], [])
    for number, batch in enumerate(tqdm(batches, desc="dien: speed against plain PyTorch", unit="step")):
        totals = []
        for trainer, spent in zip(trainers, seconds, strict=True):
            begin = time.perf_counter()
            totals.append(sum(trainer.step(batch).values()))
            spent.append(time.perf_counter() - begin)
        if number == 0:  # later on the weights drift apart, as roundings do in training
            difference = abs(totals[0] - totals[1]) / abs(totals[1])
            if not difference <= LOSS_TOLERANCE:
                raise RuntimeError(f"the kernels give the loss {totals[0]}, plain PyTorch {totals[1]}")
    samples = batches[0].targets.numel()
    ours_s, twin_s = (statistics.median(spent[1:] or spent) for spent in seconds)  # the first step warms up
    return Comparison(samples / ours_s, samples / twin_s, difference)
