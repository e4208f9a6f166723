# SPDX-License-Identifier: Apache-2.0
"""Who can do the Dice column's work: ours and its rivals.

Each is given the same tensors. All give the output, and with ``backward`` the gradients of input and alpha for a given
gradient of the output. Compiling is not timed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import compiling
from bench.harness import Contestant, Unavailable
from bench.rivals import compute
from dien_ops import functional, reference

EAGER, BATCH_NORM, COMPILED = "eager", "F.batch_norm", "torch.compile"  # as tables call them
EPS = 1e-8


@dataclass(frozen=True)
class Activation:
    """Dice over [N, C], or with ``steps`` over [B, T, C] with lengths that are uniform in 0..T."""

    rows: int  # N, or B
    channels: int
    steps: int | None = None
    training: bool = True  # the batch's statistics
    backward: bool = False
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    @property
    def name(self) -> str:
        if self.steps is None:
            return f"N{self.rows} C{self.channels}"
        return f"B{self.rows} T{self.steps} C{self.channels}"

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.rows, self.channels) if self.steps is None else (self.rows, self.steps, self.channels)

    @property
    def lengths(self) -> Tensor | None:
        if self.steps is None:
            return None
        lengths = torch.randint(0, self.steps + 1, (self.rows,), generator=torch.Generator().manual_seed(2))
        return lengths.to(self.device)

    @property
    def bytes(self) -> float:
        """The fewest that must be moved without room to keep the input between two passes over it: with the batch's
        statistics the input is read for these and for the output, then input and gradient for the sums over the batch
        and for the input's gradient. Padding is written and not read."""
        rows = self.rows * (self.steps or 1)
        valid = rows if self.lengths is None else int(self.lengths.sum())
        passes = 2 if self.training else 1
        tensors = passes * valid + rows
        if self.backward:
            tensors += 2 * passes * valid + rows
        return float(tensors * self.channels * self.dtype.itemsize)


@dataclass(frozen=True)
class Tensors:
    input: Tensor
    alpha: Tensor  # [C]
    mean: Tensor  # [C], the moving averages
    var: Tensor
    lengths: Tensor | None
    grad_output: Tensor


def tensors(p: Activation, dtype: torch.dtype | None = None) -> Tensors:
    """The same numbers each time, rounded to the problem's dtype; leaves that require grad with ``backward``."""
    generator = torch.Generator(p.device).manual_seed(1)

    def normal(*shape: int) -> Tensor:
        values = torch.randn(shape, device=p.device, generator=generator)
        return values.to(p.dtype).to(dtype or p.dtype)

    s, grad, alpha = normal(*p.shape), normal(*p.shape), normal(p.channels)
    mean, var = normal(p.channels), normal(p.channels).square() + 0.5
    return Tensors(s.requires_grad_(p.backward), alpha.requires_grad_(p.backward), mean, var, p.lengths, grad)


def _dice(module: Any, p: Activation, t: Tensors) -> Tensor:
    averages = () if p.training else (t.mean, t.var)
    return module.dice(t.input, t.alpha, *averages, training=p.training, eps=EPS, lengths=t.lengths)


@lru_cache(maxsize=2)
def exact(p: Activation) -> list[Tensor]:
    """The reference equations in float64."""
    t = tensors(p, torch.float64)
    return [
        x.detach() for x in compute(lambda: _dice(reference, p, t), [t.input, t.alpha], t.grad_output, p.backward)()
    ]


def _contestant(p: Activation, call: Callable[[], Any], **more: Any) -> Contestant:
    return Contestant(call, exact=lambda: exact(p), bytes=p.bytes, **more)


def ours(p: Activation) -> Contestant:
    t = tensors(p)
    return _contestant(p, compute(lambda: _dice(functional, p, t), [t.input, t.alpha], t.grad_output, p.backward))


def in_dtype(factory: Callable[[Activation], Contestant], dtype: torch.dtype) -> Callable[[Activation], Contestant]:
    return lambda p: factory(replace(p, dtype=dtype))


# ------------------------------------------------------------------------------------------------- in torch's operators


def composed(s: Tensor, alpha: Tensor, mean: Tensor, var: Tensor, lengths: Tensor | None, training: bool) -> Tensor:
    """The equation, written down."""
    valid = None
    if lengths is not None:
        valid = (torch.arange(s.size(1), device=s.device) < lengths.unsqueeze(1)).unsqueeze(-1)
    if training and valid is None:
        mean, var = s.mean(0), s.var(0, correction=0)
    elif training:
        count = valid.sum()
        mean = torch.where(valid, s, 0).sum((0, 1)) / count
        var = torch.where(valid, s - mean, 0).square().sum((0, 1)) / count
    p = torch.sigmoid((s - mean) / (var.sqrt() + EPS))
    f = p * s + (1 - p) * alpha * s
    return f if valid is None else torch.where(valid, f, 0)


def with_batch_norm(
    s: Tensor, alpha: Tensor, mean: Tensor, var: Tensor, lengths: Tensor | None, training: bool
) -> Tensor:
    """As public libraries build it. EPS is below the root, which makes no difference that counts here."""
    if lengths is not None:
        raise Unavailable("padding would count in its statistics")
    averages = (None, None) if training else (mean, var)
    p = torch.sigmoid(F.batch_norm(s, *averages, training=training, eps=EPS))
    return p * s + alpha * (1 - p) * s


def _torchs(p: Activation, f: Callable[..., Tensor]) -> Contestant:
    t = tensors(p)
    arguments: Sequence[Any] = (t.input, t.alpha, t.mean, t.var, t.lengths, p.training)
    return _contestant(p, compute(lambda: f(*arguments), [t.input, t.alpha], t.grad_output, p.backward))


def eager(p: Activation) -> Contestant:
    return _torchs(p, composed)


def batch_norm(p: Activation) -> Contestant:
    return _torchs(p, with_batch_norm)


def compiled(p: Activation) -> Contestant:
    return compiling.compiled(lambda: _torchs(p, torch.compile(composed, fullgraph=True, dynamic=False)))
