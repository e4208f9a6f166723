# SPDX-License-Identifier: Apache-2.0
"""How a row is measured.

Every contestant's result is first compared with float64. Then they take turns: in each round every contestant is timed
once, in an order drawn anew, so that whatever disturbs the machine for a while disturbs all of them. A sample is one
call, or as many as take MIN_SAMPLE_SECONDS; an untimed call goes before it, for after the others' turns its data may
have left the caches. The number of rounds follows from the time that a row may take.

pytest-benchmark times our operator; its rivals are timed by the same clock in the setup and the teardown of the same
round. All samples go into the row's ``extra_info``.
"""

from __future__ import annotations

import ctypes
import gc
import math
import os
import pickle
import random
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from bench.results import CEILING, Row, Sweep, Target, Timing

MIN_SAMPLE_SECONDS = 5e-3  # a hundred thousand times the clock's resolution, and more than a switch of tasks takes
WARM_UP_CALLS = 2
CEILING_SIZE = 1536
COPY_BYTES = 256 * 2**20  # many times the caches

# Allowed largest difference from float64, relative to the largest value of each result: room for sums of 100,000
# products in any order, and none for a wrong gate.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


class Unavailable(Exception):
    """A contestant cannot take part; the message says why."""


class WrongResult(AssertionError):
    """A contestant computes something else."""


@dataclass(frozen=True)
class Contestant:
    """Somebody who can do a row's work."""

    call: Callable[[], Any]  # what is timed
    read: Callable[[Any], Sequence[Tensor]] = list  # its result as tensors to compare, not timed
    exact: Callable[[], Sequence[Tensor]] | None = None  # what they should be, in float64
    work: float = 1.0
    flops: float | None = None
    threads: int | None = None  # None: torch's default
    note: str = ""


class Problem(Hashable, Protocol):
    """A column's description of a piece of work: hashable, and it can be pickled."""


# A factory that can be imported by its name (the memory is measured in a process of its own) and may raise Unavailable.
Factory = Callable[[Any], Contestant]


@dataclass(frozen=True)
class Pace:
    """How long a row may take. A row has at least ``min_rounds``, whatever they take."""

    warm_up: float  # seconds, for each contestant
    seconds: float
    min_rounds: int
    max_rounds: int

    def rounds(self, seconds_per_round: float) -> int:
        return max(self.min_rounds, min(self.max_rounds, int(self.seconds / seconds_per_round)))


FULL = Pace(warm_up=0.2, seconds=2.0, min_rounds=7, max_rounds=50)
QUICK = Pace(warm_up=0.03, seconds=0.2, min_rounds=3, max_rounds=9)


# ------------------------------------------------------------------------------------------------------------ checking


def largest_error(results: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Largest difference, relative to the largest exact value of the same result; infinite where one is not finite.

    Raises:
        WrongResult: number or shapes differ.
    """
    shapes = [[list(x.shape) for x in some] for some in (results, exact)]
    if shapes[0] != shapes[1]:
        raise WrongResult(f"the results have shapes {shapes[0]}, expected {shapes[1]}")
    largest = 0.0
    for result, expected in zip(results, exact, strict=True):
        scale = float(expected.abs().max()) or 1.0
        error = float((result.detach().double() - expected).abs().max()) / scale
        largest = max(largest, error if math.isfinite(error) else math.inf)
    return largest


def check(name: str, contestant: Contestant) -> float | None:
    """The error of a contestant's result; None for one that has nothing to compare with.

    Raises:
        WrongResult: it is larger than TOLERANCE.
    """
    if contestant.exact is None:
        return None
    results = contestant.read(contestant.call())
    error = largest_error(results, contestant.exact())
    allowed = TOLERANCE[results[0].dtype]
    if not error <= allowed:
        raise WrongResult(f"{name} is {error:.1e} away from float64, allowed {allowed:.0e}")
    return error


# -------------------------------------------------------------------------------------------------------------- timing


def use_threads(contestant: Contestant, default: int) -> None:
    wanted = contestant.threads or default
    if torch.get_num_threads() != wanted:
        torch.set_num_threads(wanted)


def warm_up(contestant: Contestant, seconds: float) -> float:
    """Calls it for so long, and returns the seconds that a call takes in the end."""
    taken: list[float] = []
    while len(taken) < WARM_UP_CALLS or sum(taken) < seconds:
        begin = time.perf_counter()
        contestant.call()
        taken.append(time.perf_counter() - begin)
    return min(taken[1:])


def calls_per_sample(seconds_per_call: float) -> int:
    return max(1, math.ceil(MIN_SAMPLE_SECONDS / seconds_per_call))


def turns(names: Sequence[str], ours: str, draw: random.Random) -> tuple[list[str], list[str]]:
    """One round's order, drawn at random: who comes before ours, and who after."""
    order = draw.sample(names, len(names))
    place = order.index(ours)
    return order[:place], order[place + 1 :]


def repeated(call: Callable[[], Any], times: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(times):
            call()

    return run


def time_in_turns(benchmark: Any, contestants: dict[str, Contestant], ours: str, pace: Pace) -> dict[str, list[float]]:
    """Seconds of one call of each contestant, round by round; ``benchmark`` is pytest-benchmark's fixture."""
    default_threads = torch.get_num_threads()
    calls: dict[str, int] = {}
    seconds_per_round = 0.0
    for name, contestant in contestants.items():
        use_threads(contestant, default_threads)
        seconds = warm_up(contestant, pace.warm_up)
        calls[name] = calls_per_sample(seconds)
        seconds_per_round += seconds * (calls[name] + 1)

    runs = {name: repeated(contestant.call, calls[name]) for name, contestant in contestants.items()}
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    draw = random.Random(0)
    later: list[str] = []

    def settle(name: str) -> None:
        use_threads(contestants[name], default_threads)
        contestants[name].call()

    def take(names: Sequence[str]) -> None:
        for name in names:
            settle(name)
            begin = time.perf_counter()
            runs[name]()
            samples[name].append((time.perf_counter() - begin) / calls[name])

    def before_ours() -> None:
        earlier, later[:] = turns(list(contestants), ours, draw)
        take(earlier)
        settle(ours)

    gc.collect()
    gc.disable()
    try:
        benchmark.pedantic(
            runs[ours], setup=before_ours, teardown=lambda: take(later), rounds=pace.rounds(seconds_per_round)
        )
    finally:
        gc.enable()
        torch.set_num_threads(default_threads)
    if benchmark.stats is None:  # --benchmark-disable: the results were checked, and one round showed that all run
        return {}
    samples[ours] = [seconds / calls[ours] for seconds in benchmark.stats.stats.data]
    return samples


# ------------------------------------------------------------------------------------------------------------- ceiling


def matrix_product(threads: int | None = None) -> Contestant:
    """The machine's matrix rate, as torch reaches it in float32."""
    a, b = torch.randn(2, CEILING_SIZE, CEILING_SIZE)
    out = torch.empty(CEILING_SIZE, CEILING_SIZE)
    return Contestant(lambda: torch.mm(a, b, out=out), flops=2.0 * CEILING_SIZE**3, threads=threads)


def large_copy(threads: int | None = None) -> Contestant:
    """The machine's memory rate; its work is the bytes read and written."""
    source = torch.randn(COPY_BYTES // 4)
    out = torch.empty_like(source)
    return Contestant(lambda: out.copy_(source), work=2.0 * COPY_BYTES, threads=threads)


def ceilings() -> dict[str, float]:
    """GFLOP/s of the matrix product and GB/s of the copy, on one core and on all; the best of a few."""
    default_threads = torch.get_num_threads()
    found = {}
    for threads in sorted({1, default_threads}):
        for name, make in (("mm GFLOP/s", matrix_product), ("copy GB/s", large_copy)):
            contestant = make(threads)
            torch.set_num_threads(threads)
            rate = (contestant.flops or contestant.work) / warm_up(contestant, FULL.warm_up) / 1e9
            found[f"{name}, {threads} thread{'s' * (threads > 1)}"] = rate
    torch.set_num_threads(default_threads)
    return found


# -------------------------------------------------------------------------------------------------------------- memory

# Tensors go back to the system as soon as they are freed: else the peak would depend on which holes in its heap the
# allocator happens to fill again, and vary by a third from process to process.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(32 * 1024), "MALLOC_TRIM_THRESHOLD_": "0"}
MEMORY_SECONDS = 300.0
RESET_PEAK = "5"  # what /proc/self/clear_refs wants: the peak becomes the present size


def _resident(field: str) -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field + ":"))


def peak_of_one_call(factory: Factory, problem: Problem, small: Problem) -> int:
    """Bytes of resident memory that one call needs at its highest, above what stands there before it, the inputs and
    parameters. To be run in a fresh process with ALLOCATOR's setting; the small problem is solved first, so that
    libraries are loaded and threads have started."""
    factory(small).call()
    contestant = factory(problem)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as refs:
        refs.write(RESET_PEAK)
    before = _resident("VmRSS")
    result = contestant.call()
    peak = _resident("VmHWM") - before
    del result
    return peak


def peak_bytes(factory: Factory, problem: Problem, small: Problem) -> int:
    """:func:`peak_of_one_call` in a process of its own.

    Raises:
        Unavailable: it cannot be measured here.
    """
    if not sys.platform.startswith("linux"):
        raise Unavailable("peak memory is read from /proc, which only Linux has")
    try:
        done = subprocess.run(
            [sys.executable, "-m", "bench.harness"],
            input=pickle.dumps((factory, problem, small)),
            env={**os.environ, **ALLOCATOR},
            capture_output=True,
            timeout=MEMORY_SECONDS,
        )
    except subprocess.TimeoutExpired as slow:
        raise Unavailable(f"peak memory: not done after {MEMORY_SECONDS:g} s") from slow
    if done.returncode != 0:  # a process that is killed, for want of memory say, leaves no words
        *_, last = "", *done.stderr.decode().strip().splitlines()
        raise Unavailable(f"peak memory: {last or f'its process ended with status {done.returncode}'}")
    return int(done.stdout.split()[-1])


# ----------------------------------------------------------------------------------------------------------------- row


@dataclass
class Bench:
    """What a row's test is given (the fixture ``bench``)."""

    benchmark: Any
    column: str
    section: str
    case: str
    quick: bool

    def measure(
        self,
        problem: Any,
        ours: dict[str, Factory],
        rivals: dict[str, Factory],
        targets: Sequence[Target] = (),
        *,
        absent: dict[str, str] | None = None,
        memory: Any = None,
        without_memory: Collection[str] = (),
        unit: str = "",
        sweep: Sweep | None = None,
    ) -> None:
        """Checks and times ours (a name and its factory) beside its rivals on the problem, and the CEILING where ours
        says how many operations it does. ``memory``: a small problem of the same kind; except in a quick run, the peak
        memory is measured too, but for the rivals ``without_memory``.

        Raises:
            WrongResult: a contestant's result is not that of float64.
            Unavailable: ours cannot take part.
        """
        (our_name,) = ours
        row = Row(self.column, self.section, self.case, our_name, absent=dict(absent or {}), targets=list(targets))
        row.unit, row.sweep = unit, sweep
        contestants: dict[str, Contestant] = {}
        for name, factory in (ours | rivals).items():
            try:
                contestants[name] = factory(problem)
            except Unavailable as reason:
                if name == our_name:
                    raise
                row.absent[name] = str(reason)
        if contestants[our_name].flops is not None:
            contestants[CEILING] = matrix_product(contestants[our_name].threads)
        errors = {name: check(name, contestant) for name, contestant in contestants.items()}
        samples = time_in_turns(self.benchmark, contestants, our_name, QUICK if self.quick else FULL)
        for name, seconds in samples.items():
            c = contestants[name]
            row.timings[name] = Timing(seconds, c.work, c.flops, errors[name], note=c.note)
        contestants.clear()
        if memory is not None and samples and not self.quick:
            measured = {name: f for name, f in (ours | rivals).items() if name not in without_memory}
            self._measure_memory(row, problem, memory, measured)
        self.benchmark.extra_info.update(row.to_json())

    @staticmethod
    def _measure_memory(row: Row, problem: Any, small: Any, factories: dict[str, Factory]) -> None:
        for name, factory in factories.items():
            if name in row.timings:
                timing = row.timings[name]
                try:
                    row.timings[name] = replace(timing, peak_bytes=peak_bytes(factory, problem, small))
                except Unavailable as reason:
                    row.timings[name] = replace(timing, note=f"{timing.note} {reason}".strip())


if __name__ == "__main__":
    print(peak_of_one_call(*pickle.load(sys.stdin.buffer)))
