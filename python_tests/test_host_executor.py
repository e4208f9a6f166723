# SPDX-License-Identifier: Apache-2.0
"""The executor that runs CUDA kernels on the CPU: it finds mistakes, and only those. The kernels are in csrc/cuda/host.

What it has in common with a GPU, the results of the primitives, is tested in test_cuda_primitives.py.
"""

from __future__ import annotations

import itertools
import math
import random
import re
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pytest
import torch

from helpers import THREAD_ORDERS, assert_close

pytestmark = pytest.mark.usefixtures("host_executor")


def ops():
    return torch.ops.dien_ops_executor


def primitives():
    return torch.ops.dien_ops_test


def report(run, *arguments) -> list[str]:
    """The lines of what the executor found."""
    try:
        run(*arguments)
    except RuntimeError as error:
        return str(error).splitlines()
    return []


# Recurrent kernels, right and wrong


def recurrent_arguments(batch=35, steps=5, hidden=32):  # the last block has fewer rows than warps
    return torch.randn(steps, batch, hidden), torch.randn(hidden, hidden) / hidden**0.5


def test_a_right_kernel_is_clean_and_agrees_with_float64(order):
    for batch, steps, hidden in [(35, 5, 32), (16, 1, 8), (1, 2, 64), (3, 12, 40)]:
        x, u = recurrent_arguments(batch, steps, hidden)
        h = h0 = torch.randn(batch, hidden)
        y, h_n = ops().recurrent(x, u, h0, "none")
        states = []
        for x_t in x.double():
            h = torch.tanh(x_t + h.double() @ u.double().T)
            states.append(h)
        # tf32 keeps 10 bits: each of the products is off by 2^-10 at most, in practice by far less than their sum
        assert_close([y.double(), h_n.double()], [torch.stack(states), h], tolerance=2e-3)
        assert float((y.double() - torch.stack(states)).abs().max()) > 1e-6  # it does round


def test_results_do_not_depend_on_the_order_of_threads(set_executor):
    x, u = recurrent_arguments()
    results = []
    for order in THREAD_ORDERS:
        for seed in range(3):
            set_executor(order=order, seed=seed)
            results.append(ops().recurrent(x, u, None, "none")[0])
    assert all(torch.equal(result, results[0]) for result in results)


def test_results_do_not_depend_on_the_checks(set_executor):
    x, u = recurrent_arguments()
    checked = ops().recurrent(x, u, None, "none")
    set_executor(check=False)
    assert_close(ops().recurrent(x, u, None, "none"), checked, tolerance=0)


BUGS = {
    "missing_step_barrier": ["race: ", " 'h' "],
    "single_buffered_state": ["race: ", " 'h' "],
    "prefetch_before_barrier": ["race: ", "copy", " 'x' "],
    "wait_after_barrier": ["race: ", "copy/read 'x' "],
    "missing_wait": ["race: pending copy/read 'x' "],
    "missing_syncwarp": ["race: ", " 'out' "],
    "out_of_range_shared": ["out of range: read 'h' ", " of 1024 numbers "],
    "unwritten_shared": ["unwritten: read 'h' "],
    "divergent_barrier": ["divergence: ", " waits in sync_block ", ", thread ", " waits in sync_block "],
    "unrounded_operands": ["unrounded: a = ", " of mma_m16n8k8_tf32 "],
    "out_of_range_global": ["out of range: write 'y' ", " of 5600 numbers "],
    "race_between_blocks": ["race: write/write 'h_n' ", " (block ", " and thread ", " (block "],
    "race_over_global": ["race: write/write 'h_n' ", " and thread ", " (block "],
    "exited_thread": ["divergence: ", " has left the kernel", " (block 2)"],
    "absent_buffer": ["out of range: read 'h0' ", " of 0 numbers "],
    "misaligned_vector": ["misaligned: read 'out' 16 bytes at number "],
}


def says(line: str, parts: list[str]) -> bool:
    """Whether the line starts with the first part and holds the others after it, in this order."""
    if not line.startswith(parts[0]):
        return False
    at = 0
    for part in parts:
        at = line.find(part, at)
        if at < 0:
            return False
        at += len(part)
    return True


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_reported_in_every_order(bug, order, set_executor):
    x, u = recurrent_arguments()
    for seed in range(4):
        set_executor(order=order, seed=seed)
        found = report(ops().recurrent, x, u, None, bug)
        assert found[:1] == ["kernel recurrent:"], found
        assert any(says(line, BUGS[bug]) and "test_kernels.cu:" in line for line in found), found


def test_a_launch_after_a_failed_one_is_clean(order):
    x, u = recurrent_arguments()
    for bug in BUGS:
        assert report(ops().recurrent, x, u, None, bug)
        assert not report(ops().recurrent, x, u, None, "none")


def test_a_race_is_reported_once_for_each_pair_of_places():
    x, u = recurrent_arguments(steps=50)
    found = report(ops().recurrent, x, u, None, "missing_syncwarp")
    assert len(found) == len(set(found)) <= 4


# The rule by which races are found, against its definition


READ, WRITE, READ_GLOBAL, WRITE_GLOBAL, WRITE_HALF, SYNC_WARP, SYNC_BLOCK, COPY, WAIT = range(9)
COPY_UNCOMMITTED, WAIT_FOR_ALL_BUT_ONE, LONE_SYNC_WARP, LONE_SYNC_BLOCK, LEAVE = range(9, 14)
Step = tuple[int, int, int, int]  # block, thread, action, number
NUMBERS, THREADS, BLOCKS = 8, 64, 2


class Touch(NamedTuple):
    """An access to a number in the course of steps begin..end; a copy that nobody waits for has no end."""

    begin: int
    end: float
    block: int
    thread: int
    number: tuple[str, int, int]
    writes: bool


def touches(steps: list[Step]) -> list[Touch]:
    result = []

    def touch(begin: int, end: float, memory: str, halves: range, writes: bool) -> None:
        block, thread, _, _ = steps[begin]
        where = block if memory == "shared" else 0
        result.extend(Touch(begin, end, block, thread, (memory, where, half), writes) for half in halves)

    for i, (block, thread, action, number) in enumerate(steps):
        whole = range(2 * number, 2 * number + 2)
        if action in (READ, WRITE):
            touch(i, i, "shared", whole, action == WRITE)
        if action in (READ_GLOBAL, WRITE_GLOBAL):
            touch(i, i, "global", whole, action == WRITE_GLOBAL)
        if action == WRITE_HALF:
            touch(i, i, "global", range(number, number + 1), True)
        if action == COPY:
            waits = [j for j in range(i, len(steps)) if steps[j][:3] == (block, thread, WAIT)]
            four = range(2 * number, 2 * number + 8)
            touch(i, i, "global", four, False)
            touch(i, min(waits, default=math.inf), "shared", four, True)
    return result


def happens_before(a: Touch, b: Touch, steps: list[Step]) -> bool:
    if a.end > b.begin or a.block != b.block:
        return False
    between = [(thread, action) for block, thread, action, _ in steps[int(a.end) : b.begin] if block == a.block]
    return (
        a.thread == b.thread
        or any(action == SYNC_BLOCK for _, action in between)
        or any(action == SYNC_WARP and thread // 32 == a.thread // 32 == b.thread // 32 for thread, action in between)
    )


def is_right(steps: list[Step]) -> bool:
    """Accesses to one number, one of them a write, are ordered, and shared memory is written before it is read."""
    seen: list[Touch] = []
    for b in touches(steps):
        before = [a for a in seen if a.number == b.number]
        if any((a.writes or b.writes) and not happens_before(a, b, steps) for a in before):
            return False
        if b.number[0] == "shared" and not b.writes and not any(a.writes for a in before):
            return False
        seen.append(b)
    return True


def random_steps(draw: random.Random) -> list[Step]:
    """A few kinds of actions on few numbers by few threads, so that they meet, some after what makes them right."""
    kinds = [*draw.choices(range(WAIT + 1), k=3), draw.choice([SYNC_WARP, SYNC_BLOCK])]
    threads = draw.choice([[0, 1], [0, 32], [0, 1, 32]])
    blocks = draw.choice([[0], [0, 0, 0, 1]])
    steps = []
    if draw.random() < 0.7:
        steps += [(block, 0, WRITE, number) for block in range(BLOCKS) for number in (0, 5)]
        steps += [(block, 0, SYNC_BLOCK, 0) for block in range(BLOCKS)]
    for _ in range(draw.randrange(2, 12)):
        action, block, thread = draw.choice(kinds), draw.choice(blocks), draw.choice(threads)
        steps.append((block, thread, action, draw.choice({COPY: [0, 4], WRITE_HALF: [1, 10, 11]}.get(action, [0, 5]))))
        if action == COPY:
            after = draw.choice([[], [WAIT], [WAIT, SYNC_BLOCK], [SYNC_BLOCK, WAIT]])
            steps += [(block, thread, action, 0) for action in after]
    return steps


def test_steps_are_reported_if_and_only_if_they_race(order, set_executor):
    draw = random.Random(order)
    counts = {True: 0, False: 0}
    for seed in range(4000):
        set_executor(order=order, seed=seed)
        steps = random_steps(draw)
        found = report(ops().perform, torch.tensor(steps), torch.zeros(NUMBERS), BLOCKS, THREADS)
        right = is_right(steps)
        assert bool(found) != right, (steps, found)
        counts[right] += 1
    assert min(counts.values()) > 1000, counts


@pytest.mark.parametrize("warp", [0, 32])
def test_a_write_races_with_the_one_read_of_three_that_no_barrier_orders(warp, order, set_executor):
    other = 32 - warp
    reads = [(0, thread, READ_GLOBAL, 0) for thread in (warp, other, warp + 1)]
    for seed in range(30):
        set_executor(order=order, seed=seed)
        ordered, racing = ([*reads, (0, warp, sync, 0), (0, warp, WRITE_GLOBAL, 0)] for sync in (SYNC_BLOCK, SYNC_WARP))
        assert not report(ops().perform, torch.tensor(ordered), torch.zeros(NUMBERS), 1, THREADS)
        assert report(ops().perform, torch.tensor(racing), torch.zeros(NUMBERS), 1, THREADS)


@pytest.mark.parametrize(
    "steps, line",
    [
        ([(0, 3, WRITE, 1), (0, 40, WRITE, 1)], ["race: write/write 'shared' ", "thread ", " and thread ", " (block 0)"]),
        ([(0, 3, READ, 1)], ["unwritten: read 'shared' ", ", thread 3 (block 0)"]),
        ([(0, 3, READ, 8)], ["out of range: read 'shared' [8, 9) of 8 numbers ", ", thread 3 (block 0)"]),
        ([(0, 3, WRITE_GLOBAL, -1)], ["out of range: write 'numbers' [-1, 0) of 8 numbers ", ", thread 3 (block 0)"]),
        ([(0, 3, COPY, 1)], ["misaligned: read 'numbers' 16 bytes at number 1 ", ", thread 3 (block 0)"]),
        ([(0, 3, COPY, 8)], ["out of range: read 'numbers' [8, 12) of 8 numbers ", ", thread 3 (block 0)"]),
        ([(1, 3, WRITE_GLOBAL, 1), (0, 3, READ_GLOBAL, 1)], ["race: ", " 'numbers' ", "thread 3 (block ", " and thread 3 (block "]),
    ],
)  # fmt: skip
def test_a_report_says_what_where_and_who(steps, line, order):
    found = report(ops().perform, torch.tensor(steps), torch.zeros(NUMBERS), BLOCKS, THREADS)
    assert found[0] == "kernel perform:" and len(found) == 2
    assert says(found[1], line), found


@pytest.mark.parametrize(
    "steps, who",
    [
        ([(0, 3, LONE_SYNC_WARP, 0)], ["thread 3 waits in sync_warp ", " has left the kernel"]),
        ([(0, 3, LONE_SYNC_BLOCK, 0)], ["thread 3 waits in sync_block ", " has left the kernel"]),
        ([(0, 3, LONE_SYNC_WARP, 0), (0, 0, SYNC_BLOCK, 0)], ["thread 3 waits in sync_warp ", " waits in sync_block "]),
        ([(0, 3, LONE_SYNC_WARP, 0), (0, 0, SYNC_WARP, 0)], ["thread 3 waits in sync_warp ", " waits in sync_warp "]),
        (
            [(0, 3, LONE_SYNC_BLOCK, 0), (0, 0, SYNC_BLOCK, 0)],
            ["thread 3 waits in sync_block ", " waits in sync_block "],
        ),
        ([(0, 3, LEAVE, 0), (0, 0, SYNC_BLOCK, 0)], ["thread 3 has left the kernel", " waits in sync_block "]),
        ([(0, 3, LEAVE, 0), (0, 0, SYNC_WARP, 0)], ["thread 3 has left the kernel", " waits in sync_warp "]),
    ],
)
def test_threads_that_wait_in_vain_are_reported(steps, who, order, set_executor):
    for seed in range(4):
        set_executor(order=order, seed=seed)
        found = report(ops().perform, torch.tensor(steps), torch.zeros(NUMBERS), BLOCKS, THREADS)
        assert len(found) == 2 and says(found[1], ["divergence: thread ", ", thread "]), found
        first, second = found[1].split(", ")
        assert (who[0] in first and who[1] in second) or (who[0] in second and who[1] in first), found


def test_a_thread_may_leave_when_nobody_waits_for_it_any_more(order):
    steps = torch.tensor([(0, 0, SYNC_BLOCK, 0), (0, 3, LEAVE, 0), (0, 5, WRITE, 0), (0, 40, SYNC_WARP, 0)])
    ops().perform(steps, torch.zeros(NUMBERS), BLOCKS, THREADS)


def test_a_vector_must_end_in_range():
    found = report(ops().perform, torch.tensor([(0, 3, COPY, 4)]), torch.zeros(6), 1, 32)
    assert says(found[1], ["out of range: read 'numbers' [4, 8) of 6 numbers "])


@pytest.mark.parametrize(
    "steps, is_there",
    [
        ([COPY, COPY_UNCOMMITTED, WAIT_FOR_ALL_BUT_ONE], [False, False]),
        ([COPY, COPY_UNCOMMITTED, WAIT], [True, False]),
        ([COPY, COPY, WAIT_FOR_ALL_BUT_ONE], [True, False]),
        ([COPY, COPY, WAIT], [True, True]),
    ],
)
def test_a_wait_is_for_the_groups_that_it_names(steps, is_there, order):
    actions = [(0, 3, action, 4 * i) for i, action in enumerate(steps)]
    for number, right in zip((0, 4), is_there, strict=True):
        found = report(ops().perform, torch.tensor([*actions, (0, 3, READ, number)]), torch.zeros(12), 1, 32)
        assert not found if right else says(found[1], ["race: pending copy/read 'shared' "])


def test_a_copy_that_nobody_waits_for_has_happened_or_not(set_executor):
    set_executor(check=False)
    x, u = recurrent_arguments(steps=1)
    late = ops().recurrent(x, u, None, "missing_wait")[0].isnan().double().mean()
    assert 0.3 < late < 0.7


def test_memory_out_of_range_is_not_touched():
    numbers = torch.zeros(3 * NUMBERS)
    steps = torch.tensor([(0, 0, WRITE_GLOBAL, k) for k in range(-NUMBERS, 2 * NUMBERS)])
    assert report(ops().perform, steps, numbers[NUMBERS : 2 * NUMBERS], 1, 32)
    assert numbers.tolist() == [0.0] * NUMBERS + [1.0] * NUMBERS + [0.0] * NUMBERS


def test_without_checks_races_are_not_looked_for_but_bounds_are(set_executor):
    set_executor(check=False)
    race = torch.tensor([(0, 3, WRITE, 1), (0, 40, WRITE, 1)])
    assert not report(ops().perform, race, torch.zeros(NUMBERS), 1, THREADS)
    assert report(ops().perform, torch.tensor([(0, 3, READ, 8)]), torch.zeros(NUMBERS), 1, THREADS)


# Orders of threads


def turns(blocks=1, threads=128):
    return ops().turns(blocks, threads).tolist()


def test_threads_run_in_the_order_asked_for(set_executor):
    set_executor(order="in_order", check=False)
    assert turns(blocks=2) == list(range(256))
    set_executor(order="reverse", check=False)
    assert turns(blocks=2) == list(range(255, -1, -1))
    set_executor(order="skewed", check=False)
    warps = [thread // 32 for thread in turns()]
    assert warps == sorted(warps, key=warps.index) and sorted(warps[::32]) == [0, 1, 2, 3]
    set_executor(order="shuffled", check=False)
    order = turns()
    assert sorted(order) == list(range(128)) and len({abs(a - b) for a, b in itertools.pairwise(order)}) > 20


@pytest.mark.parametrize("kind", ["shuffled", "skewed"])
def test_a_seed_fixes_the_order_and_another_seed_gives_another(kind, set_executor):
    drawn = []
    for seed in (1, 1, 2):
        set_executor(order=kind, seed=seed, check=False)
        drawn.append(turns(blocks=4, threads=256))
    assert drawn[0] == drawn[1] != drawn[2]


# Launch


def test_an_arena_holds_what_the_launch_asked_for():
    ops().take(100, 400)
    ops().take(97, 400)  # 388 bytes, of which the next piece would begin at 400
    message = "shared memory: 'taken' ends at byte 400, the launch asked for 388, thread "
    with pytest.raises(RuntimeError, match=re.escape(message)):
        ops().take(97, 388)


def test_what_a_kernel_requires_reaches_the_caller(order):
    primitives().require_not_negative(torch.arange(1000))
    numbers = torch.arange(1000)
    numbers[777] = -5
    message = "numbers must not be negative: got -5, half of it is -2.5, at row 777, thread 9 (block 12)"
    with pytest.raises(RuntimeError, match=re.escape(message)):
        primitives().require_not_negative(numbers)
    primitives().require_not_negative(torch.arange(1000))


def test_launches_from_several_threads_do_not_mix():
    x, u = recurrent_arguments()
    expected = ops().recurrent(x, u, None, "none")
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: ops().recurrent(x, u, None, "none"), range(20)))
        failed = list(pool.map(lambda bug: report(ops().recurrent, x, u, None, bug), BUGS))
    for result in results:
        assert_close(result, expected, tolerance=0)
    assert all(failed)


# Mistakes in the use of a primitive


def test_vectors_must_be_aligned():
    x = torch.randn(9)[1:]
    assert says(report(primitives().move, x, 4, 1)[1], ["misaligned: read 'in' 16 bytes at number "])
    assert torch.equal(primitives().move(x, 1, 1), x)


@pytest.mark.parametrize("of_part", [True, False])
def test_a_part_of_a_buffer_ends_where_the_buffer_does(of_part):
    x = torch.randn(100)
    for offset, count in ((0, 101), (-1, 1), (101, 0), (50, 51), (3, -1)):
        message = f"out of range: part of 'in' [{offset}, {offset + count}) of 100 numbers primitives.cu:"
        with pytest.raises(RuntimeError, match=re.escape(message)):
            primitives().part(x, x, 100, offset, count, of_part)


def test_unrounded_operands_are_reported():
    a, b, d = torch.full((16, 8), 1.0 + 2**-10), torch.ones(8, 8), torch.zeros(16, 8)
    assert not report(primitives().mma, a, b, d)
    for operand, name in ((a, "a"), (b, "b")):
        before = operand[3, 4].clone()
        operand[3, 4] = 1.0 + 2**-23
        assert says(report(primitives().mma, a, b, d)[1], [f"unrounded: {name} = 1.000000 of mma_m16n8k8_tf32 "])
        operand[3, 4] = before
