# SPDX-License-Identifier: Apache-2.0
"""The attention column: local activation unit, bilinear attention and auxiliary loss, beside their equations in eager
torch and through torch.compile."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench import composed
from bench.composed import COMPILED, EAGER
from bench.results import Target
from bench.rivals_attention import Auxiliary, Bilinear, Unit

OURS = {"dien_ops": composed.ours}
RIVALS = {EAGER: composed.eager, COMPILED: composed.compiled}

DIN = Unit()  # the released code's network


def rows(*problems):
    return [pytest.param(p, id=p.name) for p in problems]


def measure(bench, p, targets=(), memory=None):
    """The row; a quick run compiles nothing."""
    contestants, absent = RIVALS, {}
    if bench.quick:
        contestants, absent = {EAGER: composed.eager}, {COMPILED: "left out of a quick run"}
    bench.measure(p, OURS, contestants, targets, absent=absent, memory=memory, without_memory=[COMPILED])


def small(p):
    """The same kind of problem with next to no memory."""
    return replace(p, batch=2, steps=2)


ALL_ACTIVATIONS = [replace(DIN, activation=x) for x in ("sigmoid", "prelu", "dice")]


@pytest.mark.parametrize("p", rows(*ALL_ACTIVATIONS))
def test_unit_forward(bench, p):
    """Local activation unit, forward."""
    measure(bench, p, [Target(EAGER, 2.5)])


@pytest.mark.parametrize("p", rows(*ALL_ACTIVATIONS))
def test_unit_training(bench, p):
    """Local activation unit, forward and backward."""
    p = replace(p, train=True)
    measure(bench, p, [Target(EAGER, 2.5), Target(EAGER, 4.0, of_memory=True)], memory=small(p))


@pytest.mark.parametrize("p", rows(Unit(batch=1, targets=200, softmax=True), Unit(batch=1, softmax=True)))
def test_unit_serving(bench, p):
    """Local activation unit with softmax, forward: one user."""
    measure(bench, p)


@pytest.mark.parametrize("p", rows(DIN))
def test_unit_padding(bench, p):
    """Local activation unit, forward and backward, lengths uniform in 0..T."""
    measure(bench, replace(p, train=True, uniform_lengths=True), [Target(EAGER, 2.5)])


BILINEAR = [Bilinear(), Bilinear(128, 50, 36, 18), Bilinear(1, 50, 36, 18, targets=200)]


@pytest.mark.parametrize("p", rows(*BILINEAR))
def test_bilinear_forward(bench, p):
    """Bilinear attention, forward, lengths uniform in 0..T."""
    measure(bench, replace(p, uniform_lengths=True))


@pytest.mark.parametrize("p", rows(*BILINEAR[:2]))
def test_bilinear_training(bench, p):
    """Bilinear attention, forward and backward, lengths uniform in 0..T."""
    p = replace(p, train=True, uniform_lengths=True)
    measure(bench, p, memory=small(p))


@pytest.mark.parametrize("p", rows(Auxiliary(), Auxiliary(128, 50, 36)))
def test_auxiliary_training(bench, p):
    """Auxiliary loss with the inner product, forward and backward, lengths uniform in 0..T."""
    p = replace(p, train=True, uniform_lengths=True)
    measure(bench, p, memory=small(p))
