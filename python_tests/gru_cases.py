# SPDX-License-Identifier: Apache-2.0
"""What the tests of the recurrent column share: calls of the operators, nn.GRU's twin, and checks that run in several places."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

import dien_ops
from dien_ops import functional, reference
from helpers import assert_close, gradients, leaf, spread_lengths

D = torch.float64
DEEP = {"num_layers": 2, "bidirectional": True}
GATES = ["none", "paper", "authors", "replace", "input"]
RESETS = pytest.mark.parametrize("reset_after", [True, False], ids=["after", "before"])
LAYOUTS = pytest.mark.parametrize("batch_first", [True, False], ids=["batch_first", "time_first"])


class Case:
    """Arguments of one call, as leaves; call() runs a module's (functional's or reference's) form of the operator."""

    def __init__(
        self, gate="paper", batch=3, steps=5, features=3, hidden=5, targets=None, *, batch_first=True, reset_after=True,
        lengths=True, hx=True, bias=True, reverse=False, dtype=torch.float64,
    ):  # fmt: skip
        self.gate = gate
        self.options = dict(batch_first=batch_first, reset_after=reset_after)
        self.options["lengths"] = spread_lengths(batch, steps) if lengths else None
        rows = [batch] if targets is None else [batch, targets]
        self.input = leaf(*([batch, steps] if batch_first else [steps, batch]), features, dtype=dtype)
        self.attention = None
        if gate == "none":
            self.options["reverse"] = reverse
        else:
            self.attention = leaf(*([*rows, steps] if batch_first else [steps, *rows]), low=0, dtype=dtype)
        self.hx = leaf(*rows, hidden, dtype=dtype) if hx else None
        scale = max(hidden, 1) ** -0.5
        self.weights: list[Tensor | None] = [
            leaf(3 * hidden, n, low=-scale, high=scale, dtype=dtype) for n in (features, hidden)
        ]
        self.weights += [leaf(3 * hidden, dtype=dtype) if bias else None for _ in range(2)]

    @property
    def tensors(self) -> list[Tensor | None]:
        return [self.input, self.attention, self.hx, *self.weights]

    def with_tensors(self, tensors: list[Tensor | None]) -> Case:
        other = object.__new__(Case)
        other.gate, other.options = self.gate, self.options
        other.input, other.attention, other.hx, *other.weights = tensors
        return other

    def to(self, dtype: torch.dtype) -> Case:
        return self.with_tensors(
            [x.detach().to(dtype).requires_grad_() if x is not None else None for x in self.tensors]
        )

    def call(self, module) -> tuple[Tensor, Tensor]:
        if self.gate == "none":
            return module.gru(self.input, *self.weights, self.hx, **self.options)
        return module.attentional_gru(
            self.input, self.attention, *self.weights, self.hx, gate=self.gate, **self.options
        )

    def results(self, module) -> list[Tensor]:
        """Outputs and all gradients."""
        outputs = self.call(module)
        return [*outputs, *gradients(outputs, self.tensors)]

    def as_function(self):
        """f(*present tensors) -> outputs, for gradcheck."""
        present = [i for i, x in enumerate(self.tensors) if x is not None]

        def f(*tensors: Tensor) -> tuple[Tensor, Tensor]:
            filled = list(self.tensors)
            for i, x in zip(present, tensors, strict=True):
                filled[i] = x
            return self.with_tensors(filled).call(functional)

        return f, [self.tensors[i] for i in present]


def cells():
    """Every gate, with and without several targets; the GRU in both directions."""
    yield from [{"gate": "none"}, {"gate": "none", "reverse": True}]
    yield from ({"gate": gate, "targets": targets} for gate in GATES[1:] for targets in (None, 4))


CELLS = pytest.mark.parametrize("cell", list(cells()), ids=lambda c: "-".join(map(str, c.values())))


def twins(*sizes, dtype=D, **options) -> tuple[nn.GRU, dien_ops.GRU]:
    theirs = nn.GRU(*sizes, **options, dtype=dtype)
    ours = dien_ops.GRU(*sizes, **options, dtype=dtype)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


# ------------------------------------------------------------------------------------------------------------- checks

PARTIAL_VECTORS = range(17, 33)


def check_all_cells() -> None:
    for cell in cells():
        case = Case(**cell, batch=12, hidden=21)
        assert_close(case.results(functional), case.results(reference))


def check_all_partial_vectors() -> None:
    for hidden in PARTIAL_VECTORS:
        case = Case("authors", batch=9, hidden=hidden, features=hidden, dtype=torch.float32)
        assert_close(case.results(functional), case.results(reference), 2e-6)  # seen: 6e-7; a lost lane is off by 1


def check_all_16_bit_numbers(sizes=PARTIAL_VECTORS) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        every = torch.arange(-32768, 32768).to(torch.int16).view(dtype).reshape(-1, 32)
        for hidden in sizes:
            hx = every[:, :hidden]
            weights = [torch.zeros(3 * hidden, n, dtype=dtype) for n in (1, hidden)]
            x = torch.zeros(1, len(hx), 1, dtype=dtype)
            zeros = torch.zeros(len(hx), dtype=torch.int64)
            _, same = functional.gru(x, *weights, hx=hx, lengths=zeros)
            assert torch.equal(same.nan_to_num(), hx.nan_to_num()) and torch.equal(same.isnan(), hx.isnan())
            # AGRU with n = 0 is h' = (1 - a) h: a product that float32 holds exactly, rounded once; some overflow
            finite = hx.isfinite()
            for a in (0.75, 0.625, -0.5):
                score = torch.full((1, len(hx)), a, dtype=dtype)
                _, scaled = functional.attentional_gru(x, score, *weights, hx=hx, gate="replace")
                assert torch.equal(scaled[finite], ((1 - a) * hx.float()).to(dtype)[finite])


def check_saturation_and_nan(formats=((torch.float32, 1e-6), (torch.float64, 1e-14))) -> None:
    """One gate's pre-activation at a time, its bias, is large, infinite or NaN."""
    values = [0.0, 1e-4, 0.5, 1.0, 9.0, 20.0, 87.0, 89.0, 104.0, 708.0, 710.0, 1e4, math.inf]
    values += [-v for v in values] + [math.nan]
    for dtype, tolerance in formats:
        for gate, value in itertools.product(range(3), values):
            bias = torch.zeros(3, 5, dtype=dtype)
            bias[gate] = value
            weights = [torch.zeros(15, n, dtype=dtype) for n in (3, 5)] + [bias.flatten(), torch.ones(15, dtype=dtype)]
            hx = torch.full((2, 5), 0.25, dtype=dtype)
            actual, expected = (
                m.gru(torch.zeros(1, 2, 3, dtype=dtype), *weights, hx)[1] for m in (functional, reference)
            )
            assert torch.equal(actual.isnan(), expected.isnan()), (gate, value)
            assert_close([actual.nan_to_num()], [expected.nan_to_num()], tolerance)
