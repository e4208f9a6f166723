# SPDX-License-Identifier: Apache-2.0
"""Who can do the attention column's work: ours, and the same equations out of torch's own operators, as public
libraries write them; these as they are and through torch.compile.

All give the same results, and in training the gradients of inputs and parameters for one given gradient of the first
result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import compiling
from bench.harness import Contestant, Factory
from bench.rivals import compute, from_a_graph
from dien_ops import functional, reference

EAGER, COMPILED = "eager", "torch.compile"  # as tables call them


@dataclass(frozen=True, kw_only=True)
class Composed:
    """A piece of work that torch can do with operators of its own."""

    train: bool = False
    dtype: torch.dtype = torch.float32
    uniform_lengths: bool = False  # in 0..T; else all are T
    device: str = "cpu"

    @property
    def rows_and_steps(self) -> tuple[int, int]:  # B, T
        raise NotImplementedError

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Of the inputs, then the parameters, which are uniform in -1..1."""
        raise NotImplementedError

    def ours(self, module: Any, lengths: Tensor | None, *leaves: Tensor) -> Tensor:
        """Through dien_ops.functional or dien_ops.reference."""
        raise NotImplementedError

    def composed(self, lengths: Tensor | None, *leaves: Tensor) -> Tensor:
        raise NotImplementedError

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
            shape = forward(lengths, *leaves).shape
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


def valid_steps(lengths: Tensor, steps: int) -> Tensor:
    """[B, T]: the mask that public libraries make."""
    return torch.arange(steps, device=lengths.device) < lengths.unsqueeze(1)


def masked_softmax(logits: Tensor, lengths: Tensor | None) -> Tensor:
    """Over the last axis of [B, C, T]; 0 where there is nothing."""
    if lengths is None:
        return logits.softmax(-1)
    valid = valid_steps(lengths, logits.shape[-1]).unsqueeze(1)
    scores = logits.masked_fill(~valid, torch.finfo(logits.dtype).min).softmax(-1)
    return torch.where(valid, scores, 0.0)


# ----------------------------------------------------------------------------------------------- local activation unit


def dice_of_the_batch(s: Tensor, alpha: Tensor, eps: float = 1e-8) -> Tensor:
    axes = tuple(range(s.dim() - 1))
    var, mean = torch.var_mean(s, axes, correction=0)
    p = torch.sigmoid((s - mean) / (var.sqrt() + eps))
    return p * s + (1 - p) * alpha * s


@dataclass(frozen=True)
class Unit(Composed):
    """DIN's unit over [B, T, D]; with targets, over C of them for each sequence."""

    batch: int = 1024
    steps: int = 50
    embedding_dim: int = 36
    hidden_sizes: tuple[int, ...] = (80, 40)
    activation: str = "sigmoid"
    softmax: bool = False
    targets: int | None = None

    @property
    def name(self) -> str:
        sizes = "-".join(map(str, (*self.hidden_sizes, 1)))
        targets = "" if self.targets is None else f" C{self.targets}"
        return f"B{self.batch}{targets} T{self.steps} D{self.embedding_dim} {sizes} {self.activation}"

    @property
    def rows_and_steps(self) -> tuple[int, int]:
        return self.batch, self.steps

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        D = self.embedding_dim
        widths = [4 * D, *self.hidden_sizes, 1]
        query = (self.batch, D) if self.targets is None else (self.batch, self.targets, D)
        alphas = [] if self.activation == "sigmoid" else [(h,) for h in self.hidden_sizes]
        return [
            query,
            (self.batch, self.steps, D),
            *((o, i) for i, o in pairwise(widths)),
            *((o,) for o in widths[1:]),
            *alphas,
        ]

    def leaves(self, dtype: torch.dtype | None = None) -> list[Tensor]:
        """Weights as nn.Linear's, else deep layers would saturate."""
        leaves = super().leaves(dtype)
        weights, biases, _ = self._split(leaves[2:])
        with torch.no_grad():
            for weight in weights:
                weight.mul_(weight.shape[1] ** -0.5)
        if self.softmax:  # it takes no notice of the output's bias, whose gradient would be nothing but rounding
            biases[-1].requires_grad_(False)
        return leaves

    @property
    def flops(self) -> float:
        """Of the split form, whose first layer is a D x H1 product of each step."""
        widths = [self.embedding_dim, *self.hidden_sizes, 1]
        return 2.0 * self.valid_steps * (self.targets or 1) * sum(i * o for i, o in pairwise(widths))

    def _split(self, parameters: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]:
        n = len(self.hidden_sizes) + 1
        return parameters[:n], parameters[n : 2 * n], parameters[2 * n :]

    def ours(self, module: Any, lengths: Tensor | None, *leaves: Tensor) -> Tensor:
        query, keys, *parameters = leaves
        weights, biases, alphas = self._split(parameters)
        result: Tensor = module.local_activation_unit(
            query,
            keys,
            weights,
            biases,
            alphas=alphas,
            activation=self.activation,
            softmax=self.softmax,
            lengths=lengths,
        )
        return result

    def composed(self, lengths: Tensor | None, *leaves: Tensor) -> Tensor:
        query, keys, *parameters = leaves
        weights, biases, alphas = self._split(parameters)
        queries = query if query.dim() == 3 else query.unsqueeze(1)
        q, k = torch.broadcast_tensors(queries.unsqueeze(2), keys.unsqueeze(1))  # [B, C, T, D]
        hidden = torch.cat([q, k, q - k, q * k], dim=-1)
        for i in range(len(self.hidden_sizes)):
            hidden = F.linear(hidden, weights[i], biases[i])
            if self.activation == "sigmoid":
                hidden = torch.sigmoid(hidden)
            elif self.activation == "prelu":
                hidden = F.prelu(hidden.flatten(0, 2), alphas[i]).view_as(hidden)
            else:
                hidden = dice_of_the_batch(hidden, alphas[i])
        logits = F.linear(hidden, weights[-1], biases[-1]).squeeze(-1)  # [B, C, T]
        if self.softmax:
            scores = masked_softmax(logits, lengths)
        elif lengths is not None:
            scores = torch.where(valid_steps(lengths, self.steps).unsqueeze(1), logits, 0.0)
        else:
            scores = logits
        pooled = torch.matmul(scores, keys)
        return pooled if query.dim() == 3 else pooled.squeeze(1)


# --------------------------------------------------------------------------------------------------- bilinear attention


@dataclass(frozen=True)
class Bilinear(Composed):
    """DIEN's attention over states [B, T, H]; with targets, of C of them for each sequence."""

    batch: int = 1024
    steps: int = 100
    hidden_size: int = 64
    target_size: int = 64
    targets: int | None = None

    @property
    def name(self) -> str:
        targets = "" if self.targets is None else f" C{self.targets}"
        return f"B{self.batch}{targets} T{self.steps} H{self.hidden_size} A{self.target_size}"

    @property
    def rows_and_steps(self) -> tuple[int, int]:
        return self.batch, self.steps

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        target = (self.batch,) if self.targets is None else (self.batch, self.targets)
        states = (self.batch, self.steps, self.hidden_size)
        return [states, (*target, self.target_size), (self.hidden_size, self.target_size)]

    @property
    def bytes(self) -> float:
        """The valid states and all scores; in training also the states again, their gradient and the scores'."""
        states = self.valid_steps * self.hidden_size
        scores = self.batch * (self.targets or 1) * self.steps
        return float(self.dtype.itemsize * (3 * states + 3 * scores if self.train else states + scores))

    def ours(self, module: Any, lengths: Tensor | None, *leaves: Tensor) -> Tensor:
        result: Tensor = module.bilinear_attention(*leaves, lengths=lengths)
        return result

    def composed(self, lengths: Tensor | None, *leaves: Tensor) -> Tensor:
        states, target, weight = leaves
        targets = target if target.dim() == 3 else target.unsqueeze(1)
        logits = torch.matmul(F.linear(targets, weight), states.mT)  # [B, C, T]
        scores = masked_softmax(logits, lengths)
        return scores if target.dim() == 3 else scores.squeeze(1)


# ------------------------------------------------------------------------------------------------------- auxiliary loss


@dataclass(frozen=True)
class Auxiliary(Composed):
    """DIEN's auxiliary loss with the inner product over [B, T, H]."""

    batch: int = 1024
    steps: int = 100
    hidden_size: int = 64

    @property
    def name(self) -> str:
        return f"B{self.batch} T{self.steps} H{self.hidden_size}"

    @property
    def rows_and_steps(self) -> tuple[int, int]:
        return self.batch, self.steps

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        return [(self.batch, self.steps, self.hidden_size)] * 3

    @property
    def bytes(self) -> float:
        """The three sequences; in training read again, and their gradients written."""
        once = 3 * self.valid_steps * self.hidden_size
        return float(self.dtype.itemsize * (3 * once if self.train else once))

    def ours(self, module: Any, lengths: Tensor | None, *leaves: Tensor) -> Tensor:
        result: Tensor = module.auxiliary_loss(*leaves, lengths=lengths)
        return result

    def composed(self, lengths: Tensor | None, *leaves: Tensor) -> Tensor:
        states, positives, negatives = leaves
        h = states[:, :-1]
        clicked, sampled = ((h * items[:, 1:]).sum(-1) for items in (positives, negatives))
        losses = F.softplus(-clicked) + F.softplus(sampled)
        if lengths is not None:
            losses = torch.where(valid_steps(lengths, self.steps)[:, 1:], losses, 0.0)
        return losses.sum() / self.batch
