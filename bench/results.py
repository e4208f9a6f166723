# SPDX-License-Identifier: Apache-2.0
"""What a benchmark leaves behind, and what follows from it: times, ratios, shares of the ceiling, verdicts.

A row is one piece of work, done by several contestants in turns. The harness writes rows into the JSON of
pytest-benchmark (``extra_info``); the report reads them back.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from decimal import Decimal
from pathlib import Path
from statistics import median
from typing import Any

NOT_SELECTED = "not selected"  # the reason why a row that the command line left out was not run
CEILING = "mm"  # the contestant that is a large matrix product: the matrix rate within reach
COPY = "copy"  # the contestant that is a large copy: the memory rate within reach
FLAT = "flat"  # what a target is against where the row's contestants are ours at different sizes: fastest over slowest
PER_SECOND = "per second"  # what a target is against that is about ours alone: calls in a second


def percentile(values: list[float], percent: float) -> float:
    """By linear interpolation between the two nearest values."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def three_digits(value: float) -> str:
    """Rounded to three digits, and without an exponent: 0.0123, 1.5, 1230."""
    return f"{Decimal(f'{value:.3g}'):f}"


@dataclass(frozen=True)
class Timing:
    """One contestant's samples. The samples of all contestants in the same round have the same index."""

    seconds: list[float]  # of one call
    work: float = 1.0  # units of work in one call, such as valid steps; the unit is the row's
    flops: float | None = None  # of one call
    bytes: float | None = None  # the fewest that one call reads and writes
    error: float | None = None  # largest difference from float64, relative to the largest value of each result
    peak_bytes: int | None = None  # memory of one call at its highest, above what was there before
    note: str = ""


@dataclass(frozen=True)
class Target:
    """``at_least`` times as fast as the rival ``against``, that share of the CEILING's or the COPY's rate, FLAT to that
    share (the fastest contestant's time over the slowest's), or so often PER_SECOND; with ``of_memory``, that many
    times less of it than the rival."""

    against: str
    at_least: float
    of_memory: bool = False

    def in_words(self, value: float) -> str:
        if self.of_memory:
            return f"{three_digits(value)}x less memory than {self.against}"
        if self.against in (CEILING, COPY):
            return f"{value:.2f} of {self.against}"
        if self.against == FLAT:
            return f"slowest {three_digits(1 / value)}x fastest"
        return (
            f"{three_digits(value)} {PER_SECOND}"
            if self.against == PER_SECOND
            else f"{three_digits(value)}x {self.against}"
        )

    def __str__(self) -> str:
        if self.against == FLAT:
            return f"slowest ≤ {three_digits(1 / self.at_least)}x fastest"
        return f"≥ {self.in_words(self.at_least)}"


@dataclass(frozen=True)
class Sweep:
    axis: str
    value: float


@dataclass
class Row:
    column: str  # gru, attention, dice, embedding
    section: str  # rows of one section stand in one table
    case: str
    ours: str  # the contestant that the others are compared with
    timings: dict[str, Timing] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)  # rivals that did not take part, and why
    targets: list[Target] = field(default_factory=list)
    unit: str = ""  # of work; ratios are of the time for one unit, or for one call where it is empty
    sweep: Sweep | None = None
    steps: int | None = None  # of the sequence, where the time of one of them is of interest

    @property
    def rivals(self) -> list[str]:
        return [name for name in self.timings if name not in (self.ours, CEILING, COPY)]

    def ratios(self, rival: str) -> list[float]:
        """Round by round, how many times as fast as the rival ours is."""
        ours, theirs = self.timings[self.ours], self.timings[rival]
        return [(t / theirs.work) / (o / ours.work) for o, t in zip(ours.seconds, theirs.seconds, strict=True)]

    def ratio(self, rival: str) -> float:
        """The median of the rounds' ratios: what disturbs the machine for a while disturbs both sides of a ratio."""
        return median(self.ratios(rival))

    def share_of_ceiling(self) -> float | None:
        """Our rate of floating-point operations as a share of the CEILING's, median of the rounds."""
        ours, ceiling = self.timings[self.ours], self.timings.get(CEILING)
        if ceiling is None or ours.flops is None or ceiling.flops is None:
            return None
        pairs = zip(ours.seconds, ceiling.seconds, strict=True)
        return median((ours.flops / o) / (ceiling.flops / c) for o, c in pairs)

    def share_of_copy(self) -> float | None:
        """The rate at which we read and write, if no more than we must, as a share of the COPY's; median likewise."""
        ours, copy = self.timings[self.ours], self.timings.get(COPY)
        if copy is None or ours.bytes is None or copy.bytes is None:
            return None
        return median((ours.bytes / o) / (copy.bytes / c) for o, c in zip(ours.seconds, copy.seconds, strict=True))

    def flatness(self) -> float | None:
        """The fastest contestant's time over the slowest's, 1 where all are on a par, each by its ratio to ours; None
        for a row of which none is asked."""
        if not any(target.against == FLAT for target in self.targets) or not self.timings:
            return None
        times = [1.0, *(self.ratio(rival) for rival in self.rivals)]
        return min(times) / max(times)

    def seconds_per_step(self) -> float | None:
        return median(self.timings[self.ours].seconds) / self.steps if self.steps else None

    def value_of(self, target: Target) -> float | None:
        """What was reached of a target; None where it was not measured."""
        if target.of_memory:
            peaks = [self.timings[name].peak_bytes for name in (target.against, self.ours) if name in self.timings]
            return peaks[0] / peaks[1] if len(peaks) == 2 and all(peaks) else None
        if target.against == CEILING:
            return self.share_of_ceiling()
        if target.against == COPY:
            return self.share_of_copy()
        if target.against == FLAT:
            return self.flatness()
        if target.against == PER_SECOND:
            return 1 / median(self.timings[self.ours].seconds)
        return self.ratio(target.against) if target.against in self.timings else None

    def verdict(self) -> str:
        """``reached`` if every target is; else which one is not, or was not measured, and by how much."""
        if not self.targets:
            return "no target"
        missed = []
        for target in self.targets:
            value = self.value_of(target)
            if value is None and target.of_memory and target.against in self.timings:
                missed.append("memory not measured")
            elif value is None:
                missed.append(f"{target.against} not measured: {self.absent.get(target.against, 'it took no part')}")
            elif value < target.at_least:
                missed.append(target.in_words(value))
        return "not reached: " + "; ".join(missed) if missed else "reached"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(content: dict[str, Any]) -> Row:
        return Row(
            **content
            | {
                "timings": {name: Timing(**timing) for name, timing in content["timings"].items()},
                "targets": [Target(**target) for target in content["targets"]],
                "sweep": Sweep(**content["sweep"]) if content["sweep"] else None,
            }
        )


@dataclass(frozen=True)
class NotRun:
    """A row that was asked for and is not there."""

    column: str
    section: str
    case: str
    reason: str


@dataclass(frozen=True)
class Check:
    """A stage of gpu_check.py, which came before the benchmarks of a GPU or was these."""

    name: str
    passed: bool
    said: str
    seconds: float


@dataclass(frozen=True)
class Run:
    """One JSON file: one session on one machine."""

    name: str
    machine: dict[str, Any]
    commit: str
    date: str
    rows: list[Row]
    not_run: list[NotRun]
    titles: list[tuple[str, str]]  # column and section, in the order of the bench files
    checks: list[Check] = field(default_factory=list)

    @property
    def columns(self) -> list[str]:
        return list(dict.fromkeys(column for column, _ in self.titles))

    @property
    def is_whole(self) -> bool:
        """Whether all rows were asked for, at full length."""
        return not self.machine["quick"] and all(row.reason != NOT_SELECTED for row in self.not_run)

    def sections(self, column: str) -> list[str]:
        return [section for of, section in self.titles if of == column]


def load(path: Path) -> Run:
    """Reads what ``pytest bench --benchmark-json`` wrote.

    Raises:
        ValueError: the file is no such JSON.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or "not_run" not in content or "benchmarks" not in content:
        raise ValueError(f"{path} must be the --benchmark-json of a run of bench/")
    commit = content["commit_info"]
    return Run(
        name=path.stem,
        machine=content["machine_info"],
        commit=commit["id"][:12] + (" and changes that are not committed" if commit["dirty"] else ""),
        date=content["datetime"][:10],
        rows=[Row.from_json(benchmark["extra_info"]) for benchmark in content["benchmarks"]],
        not_run=[NotRun(**entry) for entry in content["not_run"]],
        titles=[(column, section) for column, section in content["sections"]],
        checks=[Check(**check) for check in content.get("checks", [])],
    )
