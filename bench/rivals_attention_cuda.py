# SPDX-License-Identifier: Apache-2.0
"""Who can do the work of softmax attention over states and of the auxiliary loss on a GPU: ours, the equations composed
of torch's operators as public code writes them, and torch.compile of these.

All are given the same tensors. All give the scores or the loss, and in training the gradients of the inputs and of the
weight for one given gradient of the result.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import rivals
from bench.harness import Contestant, Unavailable
from dien_ops import functional, reference

COMPOSED, COMPILED = "torch's operators", "torch.compile of them"  # as tables call them


@dataclass(frozen=True)
class Problem:
    """What both have in common: B sequences of T states of H numbers; lengths are uniform in 1..T, or all are T."""

    batch: int
    steps: int
    hidden_size: int
    train: bool = False
    dtype: torch.dtype = torch.float32
    uniform_lengths: bool = False
    device: str = "cuda"

    @property
    def lengths_on_cpu(self) -> Tensor:
        """[B]. None is 0: the composed softmax has no answer to that."""
        if not self.uniform_lengths:
            return torch.full((self.batch,), self.steps, device="cpu")
        generator = torch.Generator("cpu").manual_seed(2)
        return torch.randint(1, self.steps + 1, (self.batch,), generator=generator, device="cpu")

    @property
    def lengths(self) -> Tensor | None:
        """Those, or None where all are T."""
        return self.lengths_on_cpu.to(self.device) if self.uniform_lengths else None

    @property
    def states(self) -> int:
        """Numbers in the valid steps of one [B, T, H]."""
        return int(self.lengths_on_cpu.sum()) * self.hidden_size

    def inputs(self, dtype: torch.dtype | None) -> list[Tensor]:
        """The same numbers each time, rounded to the problem's dtype; they require grad in training."""
        generator = torch.Generator(self.device).manual_seed(1)

        def uniform(*shape: int) -> Tensor:
            values = torch.empty(shape, device=self.device).uniform_(-1, 1, generator=generator)
            return values.to(self.dtype).to(dtype or self.dtype).requires_grad_(self.train)

        return [uniform(*shape) for shape in self.shapes]

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        raise NotImplementedError

    def run(self, module: Any, inputs: list[Tensor], lengths: Tensor | None) -> Tensor:
        """The operator of a module: dien_ops.functional, dien_ops.reference or Composed."""
        raise NotImplementedError


@dataclass(frozen=True)
class Attention(Problem):
    target_size: int = 36
    targets: int | None = None

    @property
    def name(self) -> str:
        targets = "" if self.targets is None else f" C{self.targets}"
        lengths = ", uniform lengths" if self.uniform_lengths else ""
        return f"B{self.batch}{targets} T{self.steps} H{self.hidden_size} A{self.target_size}{lengths}"

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        rows = [self.batch] if self.targets is None else [self.batch, self.targets]
        sizes = self.hidden_size, self.target_size
        return [(self.batch, self.steps, sizes[0]), (*rows, sizes[1]), sizes]

    def run(self, module: Any, inputs: list[Tensor], lengths: Tensor | None) -> Tensor:
        scores: Tensor = module.bilinear_attention(*inputs, lengths=lengths)
        return scores

    @property
    def bytes(self) -> float:
        """The fewest that must be moved: states, targets and weight read, scores written; in training states and weight
        are read again, scores and their gradient too, and the gradients of all are written."""
        rows = self.batch * (self.targets or 1)
        small = rows * self.target_size + self.hidden_size * self.target_size
        forward = self.states + small + rows * self.steps
        backward = self.states + small + 2 * rows * self.steps + self.batch * self.steps * self.hidden_size + small
        return float(self.dtype.itemsize * (forward + backward if self.train else forward))


@dataclass(frozen=True)
class Pairs(Problem):
    @property
    def name(self) -> str:
        return f"B{self.batch} T{self.steps} H{self.hidden_size}{', uniform lengths' if self.uniform_lengths else ''}"

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        return [(self.batch, self.steps, self.hidden_size)] * 3

    def run(self, module: Any, inputs: list[Tensor], lengths: Tensor | None) -> Tensor:
        loss: Tensor = module.auxiliary_loss(*inputs, lengths=lengths)
        return loss

    @property
    def bytes(self) -> float:
        """The fewest that must be moved: three tensors read; in training read again, and three written."""
        whole = self.batch * self.steps * self.hidden_size
        return 3.0 * self.dtype.itemsize * (2 * self.states + whole if self.train else self.states)


# ------------------------------------------------------------------------------------------------------- contestants


@lru_cache(maxsize=2)
def exact(p: Problem) -> list[Tensor]:
    """The reference equations in float64."""
    return [x.detach() for x in call_of(p, reference, torch.float64)()]


def call_of(p: Problem, module: Any, dtype: torch.dtype | None = None) -> Callable[[], list[Tensor]]:
    inputs, lengths = p.inputs(dtype), p.lengths
    with torch.no_grad():
        result = p.run(reference, inputs, lengths)
    generator = torch.Generator(p.device).manual_seed(3)
    grad = torch.empty(result.shape, device=p.device).uniform_(0.5, 1, generator=generator).to(p.dtype).to(result.dtype)
    return rivals._compute(lambda: p.run(module, inputs, lengths), inputs, grad, p.train)


def contestant(p: Any, module: Any, **more: Any) -> Contestant:
    return Contestant(call_of(p, module), exact=lambda: exact(p), bytes=p.bytes, **more)


def ours(p: Problem) -> Contestant:
    return contestant(p, functional)


class Composed:
    """The operators as public code writes them."""

    @staticmethod
    def bilinear_attention(states: Tensor, target: Tensor, weight: Tensor, *, lengths: Tensor | None) -> Tensor:
        several = target if target.dim() == 3 else target.unsqueeze(1)
        logits = F.linear(several, weight) @ states.transpose(1, 2)
        if lengths is not None:
            valid = torch.arange(states.size(1), device=states.device) < lengths.unsqueeze(1)
            logits = logits.masked_fill(~valid.unsqueeze(1), -torch.inf)
        scores = torch.softmax(logits, -1)
        return scores if target.dim() == 3 else scores.squeeze(1)

    @staticmethod
    def auxiliary_loss(states: Tensor, positives: Tensor, negatives: Tensor, *, lengths: Tensor | None) -> Tensor:
        h = states[:, :-1]
        clicked, sampled = ((h * items[:, 1:]).sum(-1) for items in (positives, negatives))
        losses = F.softplus(-clicked) + F.softplus(sampled)
        if lengths is not None:
            valid = torch.arange(1, states.size(1), device=states.device) < lengths.unsqueeze(1)
            losses = torch.where(valid, losses, 0.0)
        return losses.sum() / states.size(0)


def composed(p: Problem) -> Contestant:
    return contestant(p, Composed)


class Compiler:
    """Contestants of torch.compile, as long as one more compilation fits into `seconds` for all rows."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.took: list[float] = []  # by each compilation

    def __call__(self, p: Problem) -> Contestant:
        if sum(self.took) + max(self.took, default=0.0) > self.seconds:
            raise Unavailable(f"left out: {len(self.took)} compilations took {sum(self.took):.0f} s")
        begin = time.perf_counter()
        try:
            return self.compiled(p)
        finally:
            self.took.append(time.perf_counter() - begin)

    @staticmethod
    def compiled(p: Problem) -> Contestant:
        torch.compiler.reset()
        with torch.compiler.config.patch(
            force_disable_caches=True
        ):  # else the note would tell of an earlier run's work

            class Compiled:
                bilinear_attention = staticmethod(
                    torch.compile(Composed.bilinear_attention, fullgraph=True, dynamic=False)
                )
                auxiliary_loss = staticmethod(torch.compile(Composed.auxiliary_loss, fullgraph=True, dynamic=False))

            made = contestant(p, Compiled)
            begin = time.perf_counter()
            try:
                made.call()
            except Exception as failure:
                raise Unavailable(f"torch.compile failed: {str(failure).splitlines()[0]}") from failure
        return replace(made, note=f"compiled in {time.perf_counter() - begin:.0f} s")
