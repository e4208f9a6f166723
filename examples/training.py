# SPDX-License-Identifier: Apache-2.0
"""Trains a model epoch by epoch, keeps the best one, and scores held-out examples."""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np
import torch
from tqdm import tqdm

import dien_ops
from examples.data.protocol import Batch, Examples, Protocol
from examples.metrics import auc
from examples.models import BaseModel

# What the random draws of a run are for: each purpose has a stream of its own.
TRAINING_STREAM, VALIDATION_STREAM, TEST_STREAM, SPEED_STREAM = range(4)

HELD_OUT_NEGATIVES = 20  # sampled beside each held-out behaviour
SCORING_BATCH = 256
COUNTING_BATCH = 4096
LOSS_EVERY = 20  # steps that make one point of the loss curve


@dataclass(frozen=True)
class Settings:
    """How every model is trained, the same for all."""

    epochs: int = 4
    batch_size: int = 128
    negatives: int = 2  # per positive
    lr: float = 1e-2  # at the first step; falls linearly to zero at the last
    l2: float = 0.01  # lambda of DIN eq. 7


@dataclass
class TrainingRun:
    """What training leaves behind beside the model, whose weights are those of the best epoch."""

    loss_steps: list[int] = field(default_factory=list)
    losses: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))  # each term, at loss_steps
    epoch_steps: list[int] = field(default_factory=list)
    validation_auc: list[float] = field(default_factory=list)  # at epoch_steps
    best_epoch: int = 0  # counted from 1
    samples_per_s: float = 0.0  # samples are (history, target) pairs; forward, backward and update


class Trainer:
    """A model with its optimizers: mini-batch aware Adam for the item tables, plain Adam for all else."""

    def __init__(
        self, model: BaseModel, settings: Settings, tables_optimizer: torch.optim.Optimizer | None = None
    ) -> None:
        self.model, self.settings = model, settings
        dense = [parameter for name, parameter in model.named_parameters() if not name.startswith("items.")]
        if tables_optimizer is None:
            tables_optimizer = dien_ops.optim.MBAAdam(model.items.parameters(), lr=settings.lr, l2=settings.l2)
        self.optimizers = (tables_optimizer, torch.optim.Adam(dense, lr=settings.lr, fused=True))

    def step(self, batch: Batch, progress: float = 0.0) -> dict[str, float]:
        """One update; `progress` (0..1) is how much of the training is over. Returns the loss terms."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()
            for group in optimizer.param_groups:
                group["lr"] = self.settings.lr * (1 - progress)
        losses = self.model.losses(batch)
        torch.stack(list(losses.values())).sum().backward()
        for optimizer in self.optimizers:
            optimizer.step()
        return {name: loss.item() for name, loss in losses.items()}


def fit(name: str, model: BaseModel, protocol: Protocol, settings: Settings) -> TrainingRun:
    """Trains for `settings.epochs`; after each, the validation AUC tells whether the model is the best so far."""
    model.items.count_(protocol.batches(protocol.train, COUNTING_BATCH, negatives=0, stream=(TRAINING_STREAM,)))
    run, trainer, best = TrainingRun(), Trainer(model, settings), {}
    seconds, samples = 0.0, 0
    recent: dict[str, list[float]] = defaultdict(list)
    steps = settings.epochs * -(-len(protocol.train) // settings.batch_size)
    with tqdm(total=steps, desc=f"{name}: training", unit="step", mininterval=0.5) as bar:
        for epoch in range(settings.epochs):
            model.train()
            stream = (TRAINING_STREAM, epoch)
            for batch in protocol.batches(
                protocol.train, settings.batch_size, settings.negatives, stream, shuffle=True
            ):
                begin = time.perf_counter()
                losses = trainer.step(batch, progress=bar.n / steps)
                seconds += time.perf_counter() - begin
                samples += batch.targets.numel()
                bar.update()
                for term, loss in losses.items():
                    recent[term].append(loss)
                if bar.n % LOSS_EVERY == 0 or bar.n == steps:
                    run.loss_steps.append(bar.n)
                    for term, values in recent.items():
                        run.losses[term].append(float(np.mean(values)))
                    recent.clear()
            positives, negatives = score(model, protocol, protocol.validation, (VALIDATION_STREAM,))
            run.validation_auc.append(auc(positives, negatives.ravel()))
            run.epoch_steps.append(bar.n)
            bar.set_postfix(validation_auc=f"{run.validation_auc[-1]:.4f}")
            if run.validation_auc[-1] == max(run.validation_auc):
                run.best_epoch = epoch + 1
                best = {key: value.clone() for key, value in model.state_dict().items()}
    model.load_state_dict(best)
    run.samples_per_s = samples / seconds
    return run


@torch.inference_mode()
def score(
    model: BaseModel, protocol: Protocol, examples: Examples, stream: tuple[int, ...], label: str | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The model's scores of the positives [N] and of the negatives sampled beside them [N, HELD_OUT_NEGATIVES].

    The same stream brings the same negatives, whatever the model. With a `label`, a progress bar shows.
    """
    model.eval()
    batches = protocol.batches(examples, SCORING_BATCH, HELD_OUT_NEGATIVES, stream)
    total = -(-len(examples) // SCORING_BATCH)
    shown = tqdm(batches, total=total, desc=label, unit="batch", mininterval=0.5, disable=label is None)
    scores = np.concatenate([model(batch).numpy() for batch in shown])
    return scores[:, 0], scores[:, 1:]
