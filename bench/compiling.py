# SPDX-License-Identifier: Apache-2.0
"""Contestants of torch.compile."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from bench.harness import Contestant, Factory, Unavailable


def compiled(make: Callable[[], Contestant], note: str = "") -> Contestant:
    """What ``make`` makes, which calls torch.compile, after a first call. The compilation is in the note.

    Raises:
        Unavailable: it fails.
    """
    torch.compiler.reset()
    with torch.compiler.config.patch(force_disable_caches=True):  # else the note would tell of an earlier run's work
        contestant = make()
        begin = time.perf_counter()
        try:
            contestant.call()
        except Exception as failure:
            raise Unavailable(f"torch.compile failed: {str(failure).splitlines()[0]}") from failure
        took = time.perf_counter() - begin
    return replace(contestant, note=f"compiled in {took:.0f} s{note}")


class WithinSeconds:
    """A factory of such contestants, as long as one more compilation fits into the seconds for all of them."""

    def __init__(self, factory: Factory, seconds: float) -> None:
        self.factory, self.seconds = factory, seconds
        self.took: list[float] = []  # by each compilation

    def __call__(self, problem: Any) -> Contestant:
        if sum(self.took) + max(self.took, default=0.0) > self.seconds:
            raise Unavailable(f"left out: {len(self.took)} compilations took {sum(self.took):.0f} s")
        begin = time.perf_counter()
        try:
            return self.factory(problem)
        finally:
            self.took.append(time.perf_counter() - begin)
