# SPDX-License-Identifier: Apache-2.0
"""How a row is measured.

Every contestant's result is first compared with float64. Then they take turns: in each round every contestant is timed
once, in an order drawn anew, so that whatever disturbs the machine for a while disturbs all of them. A sample is one
call, or as many as take MIN_SAMPLE_SECONDS; an untimed call goes before it, for after the others' turns its data may
have left the caches. The number of rounds follows from the time that a row may take.

pytest-benchmark runs the rounds: our operator's turn is what it times, its rivals have theirs in the setup and the
teardown of the same round. All samples come from one timer, the clock or a GPU's events, and go into the row's
``extra_info``.
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
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor

from bench.results import CEILING, COPY, Row, Sweep, Target, Timing

MIN_SAMPLE_SECONDS = 5e-3  # a hundred thousand times the clock's resolution, and more than a switch of tasks takes
WARM_UP_CALLS = 2
CEILING_SIZE = {"cpu": 1536, "cuda": 8192}
COPY_BYTES = 256 * 2**20  # many times the caches

# Allowed largest difference from float64, relative to the largest value of each result: room for sums of 100,000
# products in any order, and none for a wrong gate.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# On a GPU, float32 products may round their factors to tf32's 10 bits: that alone is 4e-4 after 100 steps of a GRU.
TF32_TOLERANCE = 2e-3


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
    before: Callable[[], Any] | None = None  # notes what stands there, before the call that is compared; not timed
    work: float = 1.0
    flops: float | None = None
    bytes: float | None = None
    threads: int | None = None  # None: torch's default
    note: str = ""


class Problem(Hashable, Protocol):
    """A column's description of a piece of work: hashable, and it can be pickled."""

    @property
    def device(self) -> str: ...  # cpu or cuda

    @property
    def dtype(self) -> torch.dtype: ...


def why(failure: Exception) -> str:
    """What is said of a rival that does not take part."""
    said = (str(failure) or type(failure).__name__).splitlines()[0]
    return said if isinstance(failure, (Unavailable, WrongResult)) else f"failed: {type(failure).__name__}: {said}"


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
ON_GPU = Pace(warm_up=0.05, seconds=0.5, min_rounds=7, max_rounds=40)  # fifty rows in three minutes


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
    if contestant.before is not None:
        contestant.before()
    results = contestant.read(contestant.call())
    error = largest_error(results, contestant.exact())
    tf32 = results[0].is_cuda and results[0].dtype == torch.float32
    allowed = TF32_TOLERANCE if tf32 else TOLERANCE[results[0].dtype]
    if not error <= allowed:
        raise WrongResult(f"{name} is {error:.1e} away from float64, allowed {allowed:.0e}")
    return error


# -------------------------------------------------------------------------------------------------------------- timing


# Calls it so often and returns the seconds of one call.
Timer = Callable[[Callable[[], Any], int], float]


def clock(call: Callable[[], Any], times: int) -> float:
    begin = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - begin) / times


class CudaEvents:
    """The GPU's own time from before each call to behind its last kernel; where the GPU waits for the host meanwhile,
    that counts. Before each call other data is read that fills the L2 cache twice: the call finds its inputs in memory,
    and nothing of what fills the cache has to be written back."""

    def __init__(self, device: str = "cuda") -> None:
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        self.other_data = torch.ones(2 * cache // 4, device=device)

    def __call__(self, call: Callable[[], Any], times: int) -> float:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(times)]
        for begin, end in events:
            self.other_data.sum()
            begin.record()
            call()
            end.record()
        events[-1][1].synchronize()
        return sum(begin.elapsed_time(end) for begin, end in events) / times / 1e3


@lru_cache(maxsize=2)
def timer_for(device: str) -> Timer:
    return CudaEvents() if device == "cuda" else clock


def use_threads(contestant: Contestant, default: int) -> None:
    wanted = contestant.threads or default
    if torch.get_num_threads() != wanted:
        torch.set_num_threads(wanted)


def warm_up(contestant: Contestant, seconds: float, timer: Timer) -> float:
    """Calls it for so long, and returns the seconds that a call takes in the end."""
    taken: list[float] = []
    while len(taken) < WARM_UP_CALLS or sum(taken) < seconds:
        taken.append(timer(contestant.call, 1))
    return min(taken[1:])


def calls_per_sample(seconds_per_call: float) -> int:
    return max(1, math.ceil(MIN_SAMPLE_SECONDS / seconds_per_call))


def turns(names: Sequence[str], ours: str, draw: random.Random) -> tuple[list[str], list[str]]:
    """One round's order, drawn at random: who comes before ours, and who after."""
    order = draw.sample(names, len(names))
    place = order.index(ours)
    return order[:place], order[place + 1 :]


def time_in_turns(
    benchmark: Any, contestants: dict[str, Contestant], ours: str, pace: Pace, timer: Timer = clock
) -> dict[str, list[float]]:
    """Seconds of one call of each contestant, round by round; ``benchmark`` is pytest-benchmark's fixture."""
    default_threads = torch.get_num_threads()
    calls: dict[str, int] = {}
    seconds_per_round = 0.0
    for name, contestant in contestants.items():
        use_threads(contestant, default_threads)
        seconds = warm_up(contestant, pace.warm_up, timer)
        calls[name] = calls_per_sample(seconds)
        seconds_per_round += seconds * (calls[name] + 1)

    samples: dict[str, list[float]] = {name: [] for name in contestants}
    draw = random.Random(0)
    later: list[str] = []

    def settle(name: str) -> None:
        use_threads(contestants[name], default_threads)
        contestants[name].call()

    def sample(name: str) -> None:
        samples[name].append(timer(contestants[name].call, calls[name]))

    def take(names: Sequence[str]) -> None:
        for name in names:
            settle(name)
            sample(name)

    def before_ours() -> None:
        earlier, later[:] = turns(list(contestants), ours, draw)
        take(earlier)
        settle(ours)

    gc.collect()
    gc.disable()
    try:
        benchmark.pedantic(
            lambda: sample(ours),
            setup=before_ours,
            teardown=lambda: take(later),
            rounds=pace.rounds(seconds_per_round),
        )
    finally:
        gc.enable()
        torch.set_num_threads(default_threads)
    if benchmark.stats is None:  # --benchmark-disable: the results were checked, and one round showed that all run
        return {}
    return samples


# ------------------------------------------------------------------------------------------------------------- ceiling


def matrix_product(threads: int | None = None, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Contestant:
    """The machine's matrix rate, as torch reaches it."""
    size = CEILING_SIZE[device]
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    out = torch.empty_like(a)
    return Contestant(lambda: torch.mm(a, b, out=out), flops=2.0 * size**3, threads=threads)


def large_copy(threads: int | None = None, device: str = "cpu") -> Contestant:
    """The machine's memory rate: the bytes read and written."""
    source = torch.randn(COPY_BYTES // 4, device=device)
    out = torch.empty_like(source)
    return Contestant(lambda: out.copy_(source), bytes=2.0 * COPY_BYTES, threads=threads)


def _rate(contestant: Contestant, device: str) -> float:
    """Billions of operations or bytes a second, the best of a few calls."""
    amount = contestant.flops or contestant.bytes
    assert amount is not None
    return amount / warm_up(contestant, FULL.warm_up, timer_for(device)) / 1e9


def ceilings() -> dict[str, float]:
    """GFLOP/s of the matrix product and GB/s of the copy, on one core and on all."""
    default_threads = torch.get_num_threads()
    found = {}
    for threads in sorted({1, default_threads}):
        for name, make in (("mm GFLOP/s", matrix_product), ("copy GB/s", large_copy)):
            torch.set_num_threads(threads)
            found[f"{name}, {threads} thread{'s' * (threads > 1)}"] = _rate(make(threads), "cpu")
    torch.set_num_threads(default_threads)
    return found


def ceilings_of_gpu(device: str = "cuda") -> dict[str, float]:
    """The same of a GPU; float32 products are tf32's where torch allows them."""
    products = {"tf32": torch.float32, "bfloat16": torch.bfloat16}
    found = {f"mm GFLOP/s, {name}": _rate(matrix_product(None, device, d), device) for name, d in products.items()}
    return found | {"copy GB/s": _rate(large_copy(None, device), device)}


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


def peak_on_gpu(contestant: Contestant) -> int:
    """Bytes of GPU memory that one call needs at its highest, above what stands there before it."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = contestant.call()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


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
        steps: int | None = None,
    ) -> None:
        """Checks and times ours (a name and its factory) beside its rivals on the problem, and the CEILING and the COPY
        where ours says how many operations it does and bytes it moves. The peak memory is measured too, but for the
        rivals ``without_memory``: on a GPU, and elsewhere where ``memory`` is given, a small problem of the same kind,
        and the run is not a quick one. A rival that fails or is wrong does not take part, and the row says why.

        Raises:
            WrongResult: our result is not that of float64.
            Unavailable: ours cannot take part.
        """
        (our_name,) = ours
        row = Row(self.column, self.section, self.case, our_name, absent=dict(absent or {}), targets=list(targets))
        row.unit, row.sweep, row.steps = unit, sweep, steps
        contestants: dict[str, Contestant] = {}
        errors: dict[str, float | None] = {}
        for name, factory in (ours | rivals).items():
            try:
                contestant = factory(problem)
                errors[name] = check(name, contestant)
                contestants[name] = contestant
            except Exception as failure:
                if name == our_name:
                    raise
                row.absent[name] = why(failure)
        measured = {name: f for name, f in (ours | rivals).items() if name not in without_memory}
        on_gpu = problem.device == "cuda"
        threads = contestants[our_name].threads
        if contestants[our_name].flops is not None:
            contestants[CEILING] = matrix_product(threads, problem.device, problem.dtype)
        if contestants[our_name].bytes is not None:
            contestants[COPY] = large_copy(threads, problem.device)
        pace = QUICK if self.quick else ON_GPU if on_gpu else FULL
        samples = time_in_turns(self.benchmark, contestants, our_name, pace, timer_for(problem.device))
        for name, seconds in samples.items():
            c = contestants[name]
            peak = peak_on_gpu(c) if on_gpu and name in measured else None
            row.timings[name] = Timing(seconds, c.work, c.flops, c.bytes, errors.get(name), peak, c.note)
        contestants.clear()
        if memory is not None and samples and not self.quick:
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
