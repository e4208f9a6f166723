# SPDX-License-Identifier: Apache-2.0
"""Work that torch can do with operators of its own: who does it. Ours, the same equations out of torch's operators, as
public libraries write them, and these through torch.compile.

All give the same results, and in training the gradients of inputs and parameters for one given gradient of the first
result. Compiling is not timed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from bench import compiling
from bench.harness import Contestant, Factory
from bench.rivals import compute, from_a_graph
from dien_ops import functional, reference

EAGER, COMPILED = "eager", "torch.compile"  # as tables call them


@dataclass(frozen=True, kw_only=True)
class Composed(ABC):
    """A piece of work that torch can do with operators of its own."""

    train: bool = False
    dtype: torch.dtype = torch.float32
    uniform_lengths: bool = False  # in 0..T; else all are T
    device: str = "cpu"

    @property
    @abstractmethod
    def name(self) -> str:
        """With its sizes, as tables call it."""

    @property
    @abstractmethod
    def rows_and_steps(self) -> tuple[int, int]:
        """B, T"""

    @property
    @abstractmethod
    def shapes(self) -> list[tuple[int, ...]]:
        """Of the inputs, then the parameters, which are uniform in -1..1."""

    @abstractmethod
    def ours(self, module: Any, lengths: Tensor | None, *leaves: Tensor) -> Tensor:
        """Through dien_ops.functional or dien_ops.reference."""

    @abstractmethod
    def composed(self, lengths: Tensor | None, *leaves: Tensor) -> Tensor:
        """In torch's operators."""

    @property
    def flops(self) -> float | None:
        """Of the forward's matrix products, two to a multiplication and addition; None where there are none."""
        return None

    @property
    def bytes(self) -> float | None:
        """The fewest that must be moved, where that is what bounds the work."""
        return None

    @property
    def lengths(self) -> Tensor | None:
        """[B], on the CPU."""
        if not self.uniform_lengths:
            return None
        batch, steps = self.rows_and_steps
        return torch.randint(0, steps + 1, (batch,), generator=torch.Generator().manual_seed(2))

    @property
    def valid_steps(self) -> int:
        batch, steps = self.rows_and_steps
        return batch * steps if self.lengths is None else int(self.lengths.sum())

    def leaves(self, dtype: torch.dtype | None = None) -> list[Tensor]:
        """The same numbers each time, rounded to the problem's dtype."""
        generator = torch.Generator(self.device).manual_seed(1)
        drawn = (torch.empty(x, device=self.device).uniform_(-1, 1, generator=generator) for x in self.shapes)
        return [x.to(self.dtype).to(dtype or self.dtype).requires_grad_(self.train) for x in drawn]

    def call(self, forward: Callable[..., Tensor], dtype: torch.dtype | None = None) -> Callable[[], list[Tensor]]:
        leaves, lengths = self.leaves(dtype), self.lengths
        lengths = lengths if lengths is None else lengths.to(self.device)
        with torch.no_grad():
            shape = self.composed(lengths, *leaves).shape
        generator = torch.Generator(self.device).manual_seed(3)
        grad = torch.empty(shape, device=self.device).uniform_(-1, 1, generator=generator).to(self.dtype)
        differentiated = [x for x in leaves if x.requires_grad]
        return compute(lambda: forward(lengths, *leaves), differentiated, grad.to(dtype or self.dtype), self.train)


@lru_cache(maxsize=2)
def exact(p: Composed) -> Sequence[Tensor]:
    """The reference equations in float64."""
    results = p.call(lambda lengths, *leaves: p.ours(reference, lengths, *leaves), torch.float64)()
    return [x.detach() for x in results]


def contestant(p: Composed, forward: Callable[..., Tensor], **more: Any) -> Contestant:
    flops = None if p.flops is None else p.flops * (3 if p.train else 1)
    return Contestant(p.call(forward), exact=lambda: exact(p), flops=flops, bytes=p.bytes, **more)


def ours(p: Composed) -> Contestant:
    return contestant(p, lambda lengths, *leaves: p.ours(functional, lengths, *leaves))


def eager(p: Composed) -> Contestant:
    return contestant(p, p.composed)


def compiled(p: Composed) -> Contestant:
    return compiling.compiled(lambda: contestant(p, torch.compile(p.composed, fullgraph=True, dynamic=False)))


# On a GPU; "graph" is the same kernels without the host's work between them.
OURS_FROM_A_GRAPH, EAGER_FROM_A_GRAPH = "dien_ops, graph", f"{EAGER}, graph"
COMPILE_SECONDS = 60.0


def on_gpu() -> dict[str, Factory]:
    return {
        OURS_FROM_A_GRAPH: from_a_graph(ours),
        EAGER: eager,
        EAGER_FROM_A_GRAPH: from_a_graph(eager),
        COMPILED: compiling.WithinSeconds(compiled, COMPILE_SECONDS),
    }


# Whose memory is not that of a call: a graph's is taken before it.
WITHOUT_MEMORY_ON_GPU = (OURS_FROM_A_GRAPH, EAGER_FROM_A_GRAPH, COMPILED)
