# SPDX-License-Identifier: Apache-2.0
"""16-bit tables: computed in float32, rounded once at the store, to the nearest or stochastically."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import dien_ops
from dien_ops import functional, reference
from embedding_cases import BIT16, EVERY_DECAY, EVERY_RULE, Table, bits, skewed_ids
from helpers import assert_at_most_twice_torchs_error, assert_close, run_python

EVERY_16_BIT = pytest.mark.parametrize("dtype", BIT16, ids=str)
FINEST = 2**-16  # of the probabilities: as many bits has the noise


def pattern(x: Tensor) -> Tensor:
    """The bits of 16-bit numbers, 0..65535."""
    return x.view(torch.int16).int() & 0xFFFF


def number(patterns: Tensor, dtype: torch.dtype) -> Tensor:
    return patterns.to(torch.int16).view(dtype)  # int16 keeps the low bits


def neighbours(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The 16-bit numbers next to x, towards and away from zero, and x's distance from the first in steps, 0..1."""
    nearest = x.to(dtype)
    inner = pattern(nearest) - (nearest.float().abs() > x.abs()).int()
    low, high = number(inner, dtype).double(), number(inner + 1, dtype).double()
    return low, high, (x.double() - low) / (high - low)


def stored(x: Tensor, dtype: torch.dtype, seed: int | None) -> Tensor:
    """x [rows, D], float32, as an update of a table leaves it: a weight of 0 takes a step of 2^-12 along -2^12 x, the sum
    of two 16-bit gradients."""
    weight, target = torch.zeros(x.shape, dtype=dtype), -4096 * x
    high = target.to(dtype)
    low = (target - high.float()).to(dtype)
    assert torch.equal(high.float() + low.float(), target)
    functional.mba_sgd_(weight, torch.arange(len(x)).repeat(2), torch.cat([high, low]), lr=2**-12, l2=0.0, seed=seed)
    return weight


def numbers_of_every_size(rows: int = 64, dim: int = 40) -> Tensor:
    """float32 numbers of 12 digits, most of them between two of the format; from below the smallest of float16, 2^-24."""
    exponents = torch.linspace(-25, 2, rows * dim).round().view(rows, dim)
    mantissas = torch.randint(2**11, 2**12, (rows, dim)) / 2**11
    return torch.where(torch.rand(rows, dim) < 0.5, -1, 1) * mantissas * 2**exponents


@EVERY_16_BIT
def test_each_number_becomes_one_of_its_two_neighbours_and_on_average_itself(dtype):
    """Over 400 seeds. The bound is Bernstein's, for all numbers together: exceeded once in a million such tests."""
    x, seeds = numbers_of_every_size(), 400
    low, high, fraction = neighbours(x, dtype)
    ups = torch.zeros_like(fraction)
    for seed in range(seeds):
        found = stored(x, dtype, (seed - seeds // 2) * 2**54 + seed).double()
        assert bool(((found == low) | (found == high)).all())
        ups += (found == high) & (high != low)
    t = math.log(2 * x.numel() / 1e-6)
    allowed = t / (3 * seeds) + ((t / (3 * seeds)) ** 2 + 2 * t * fraction * (1 - fraction) / seeds).sqrt()
    assert bool(((ups / seeds - fraction).abs() <= allowed + FINEST).all())
    total = ((ups / seeds - fraction).sum() / (fraction * (1 - fraction) / seeds).sum().sqrt()).item()
    assert abs(total) < 5  # standard deviations of the sum over all numbers: no direction is favoured
    assert bool((fraction > 0).any() and (fraction == 0).any())


@EVERY_16_BIT
def test_the_noise_of_different_places_is_independent(dtype):
    """One seed: halves go up half of the time, and no more often together with a neighbour in the row or the column."""
    x = torch.full((512, 24), 1 + torch.finfo(dtype).eps / 2)
    up = (stored(x, dtype, seed=5) > 1).double()
    for together in (up, up[1:] * up[:-1] * 2, up[:, 1:] * up[:, :-1] * 2, up[:, 8:] * up[:, :-8] * 2):
        assert abs(together.mean().item() - 0.5) < 5 / math.sqrt(together.numel())


@EVERY_16_BIT
def test_numbers_of_the_format_stay_as_they_are(dtype):
    every = torch.arange(-32768, 32768, dtype=torch.int64).to(torch.int16).view(dtype)
    weight = every[every.isfinite()].view(-1, 8).clone()
    before = bits([weight])
    ids = torch.arange(len(weight))
    for seed in (0, 1, -(2**63), 2**63 - 1):
        functional.mba_sgd_(weight, ids, torch.zeros_like(weight), lr=1.0, l2=0.0, seed=seed)
        assert bits([weight]) == before


@EVERY_16_BIT
def test_too_large_is_infinite_and_nan_stays(dtype):
    largest = torch.finfo(dtype).max
    weight = torch.tensor([[largest, -largest, largest, 1.0]], dtype=dtype)
    grad = torch.tensor([[-largest, largest, 0.0, math.nan]], dtype=dtype)
    functional.mba_sgd_(weight, torch.tensor([0]), grad, lr=1.0, l2=0.0, seed=1)
    assert weight[0, :3].tolist() == [math.inf, -math.inf, largest] and weight[0, 3].isnan()


def test_between_the_largest_float16_and_infinity_it_is_the_nearest():
    grad = torch.tensor([[-1.0, -15.0, -16.0, 15.0, 16.0]], dtype=torch.float16)
    for seed in range(20):
        weight = torch.tensor([[65504.0, 65504.0, 65504.0, -65504.0, -65504.0]], dtype=torch.float16)
        functional.mba_sgd_(weight, torch.tensor([0]), grad, lr=1.0, l2=0.0, seed=seed)
        assert weight[0].tolist() == [65504, 65504, math.inf, -65504, -math.inf]


@EVERY_RULE
@EVERY_16_BIT
def test_the_same_seed_gives_the_same_bits_and_another_seed_others(rule, dtype):
    table, ids, grad = Table(rule, 50, 24, dtype), skewed_ids(90, 50), torch.randn(90, 24).to(dtype)
    first, again, other = (bits(table.copy().update(functional, ids, grad, seed=seed)) for seed in (7, 7, 8))
    assert first == again
    assert first[0] != other[0] and first[1:] == other[1:]  # the state is float32, and rounded by nobody


@EVERY_RULE
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_seed_does_nothing_to_wider_numbers(rule, dtype):
    table, ids, grad = Table(rule, 50, 24, dtype), skewed_ids(90, 50), torch.randn(90, 24).to(dtype)
    assert bits(table.copy().update(functional, ids, grad, seed=7)) == bits(table.update(functional, ids, grad))


@EVERY_16_BIT
def test_small_updates_add_up_that_the_nearest_loses_for_ever(dtype):
    """1024 steps of a 16th of a unit in the last place below 1."""
    step, steps, rows, dim = torch.finfo(dtype).eps / 2 / 16, 1024, 64, 16
    ids, grad = torch.arange(rows), torch.full((rows, dim), step, dtype=dtype)
    found = {}
    for kind in ("nearest", "stochastic"):
        weight = torch.ones(rows, dim, dtype=dtype)
        for seed in range(steps):
            functional.mba_sgd_(weight, ids, grad, lr=1.0, l2=0.0, seed=seed if kind == "stochastic" else None)
        found[kind] = weight.double()
    assert bool((found["nearest"] == 1).all())
    # a step is 16 units with probability 1/16: five standard deviations of the mean of 1024 numbers
    allowed = 5 * 16 * step * math.sqrt(steps * 15 / 256 / (rows * dim))
    assert abs(found["stochastic"].mean().item() - (1 - steps * step)) < allowed


@EVERY_RULE
@EVERY_16_BIT
def test_the_seed_decides_between_the_two_neighbours_only(rule, dtype):
    """Of the float32 result that is the same for all seeds, and the nearest is one of the two."""
    table, ids, grad = Table(rule, 50, 24, dtype), skewed_ids(90, 50), torch.randn(90, 24).to(dtype)
    nearest = table.copy().update(functional, ids, grad)[0]
    for seed in range(20):
        found = table.copy().update(functional, ids, grad, seed=seed)[0]
        assert int((pattern(found) - pattern(nearest)).abs().max()) <= 1


@EVERY_RULE
@EVERY_DECAY
@EVERY_16_BIT
def test_to_the_nearest_it_is_as_good_as_torchs(rule, decay, dtype):
    def draw():
        exact = Table(rule, rows=50, dim=20)
        ids, grad = torch.randint(50, (300,)), torch.randn(300, 20).to(dtype)
        ours, theirs = exact.copy(dtype), exact.copy(dtype)
        exact.weight = ours.weight.double()
        found = [(ours, functional, grad), (theirs, reference, grad), (exact, reference, grad.double())]
        return tuple(t.update(module, ids, g, decay=decay, l2=0.5)[:2] for t, module, g in found)

    assert_at_most_twice_torchs_error(draw() for _ in range(3))


@EVERY_16_BIT
def test_many_rounded_steps_are_unbiased(dtype):
    """100 steps of SGD with decay: the mean of 32 runs is nearer to float64 than one step of the format."""
    table, runs, steps = Table("sgd", rows=8, dim=24, dtype=dtype), 32, 100
    tables, exact = [table.copy() for _ in range(runs)], table.copy(torch.float64)
    for step in range(steps):
        ids, grad = skewed_ids(12, 8), torch.randn(12, 24).to(dtype)
        exact.update(reference, ids, grad.double(), lr=0.01)
        for run, one in enumerate(tables):
            one.update(functional, ids, grad, lr=0.01, seed=1000 * run + step)
    mean = torch.stack([one.weight.double() for one in tables]).mean(0)
    unit = torch.finfo(dtype).eps * exact.weight.abs().max()
    # a step's variance is at most unit^2 / 4: five standard deviations of the mean over runs, and all 192 numbers within
    assert_close([mean], [exact.weight], float(5.5 * unit * math.sqrt(steps / 4 / runs)))
    assert abs(float((mean - exact.weight).mean())) < float(5 * unit * math.sqrt(steps / 4 / runs / mean.numel()))


# ----------------------------------------------------------------------------------------------- the noise itself


def philox(counter: list[Tensor], key: int) -> list[Tensor]:
    """Philox4x32-10 of Salmon, Moraes, Dror, Shaw (SC 2011), words in int64."""
    keys = [key & 0xFFFFFFFF, key >> 32 & 0xFFFFFFFF]
    for _ in range(10):
        products = [multiply(counter[0], 0xD2511F53), multiply(counter[2], 0xCD9E8D57)]
        (high0, low0), (high1, low1) = products
        counter = [high1 ^ counter[1] ^ keys[0], low1, high0 ^ counter[3] ^ keys[1], low0]
        keys = [(keys[0] + 0x9E3779B9) & 0xFFFFFFFF, (keys[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return counter


def multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """The high and the low word of a product of two words, in pieces that fit into int64."""
    low, high = (a & 0xFFFF) * b, (a >> 16) * b
    middle = high + (low >> 16)
    return middle >> 16, (middle & 0xFFFF) << 16 | low & 0xFFFF


@pytest.mark.parametrize(
    "counter, key, expected",
    [
        ([0] * 4, 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, 2**64 - 1, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], 0x299F31D0A4093822, "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_this_philox_is_that_of_its_authors(counter, key, expected):
    """The known answers of Random123."""
    assert " ".join(f"{int(word):08x}" for word in philox([torch.tensor(w) for w in counter], key)) == expected


@EVERY_16_BIT
@pytest.mark.parametrize("seed", [0, 12345678901234567, -3])
def test_the_noise_is_philox_of_the_seed_and_the_place_in_the_table(seed, dtype):
    """So CPU and CUDA round alike, whatever else is in the batch, and in which order."""
    rows, dim = 300, 21
    x = torch.randn(rows, dim).clamp(-3, 3)
    finest = 2**10 if dtype == torch.bfloat16 else 2**14
    x = (x * finest).round() / finest
    place = torch.randperm(rows)[:200]
    found = torch.zeros(rows, dim, dtype=dtype)
    high = x.to(dtype)
    low = (x - high.float()).to(dtype)
    grad = -torch.cat([high[place], low[place]])
    functional.mba_sgd_(found, place.repeat(2), grad, lr=1.0, l2=0.0, seed=seed)

    row, d = torch.arange(rows).unsqueeze(1).expand(rows, dim), torch.arange(dim).expand(rows, dim)
    zero = torch.zeros_like(row)
    words = torch.stack(philox([row, zero, d // 8, zero], seed % 2**64))
    word = words.gather(0, (d % 8 // 2).unsqueeze(0))[0]
    noise = torch.where(d % 2 == 0, word & 0xFFFF, word >> 16)
    exact = high.float() + low.float()
    word = exact.view(torch.int32).long()
    if dtype == torch.bfloat16:
        rounded = number((word + noise) >> 16, dtype)
    else:  # an exponent that is 112 smaller, 13 digits fewer
        magnitude = ((word & 0x7FFFFFFF) - (112 << 23) + (noise >> 3)) >> 13
        rounded = number(torch.where(exact == 0, 0, magnitude | (word >> 16 & 0x8000)), dtype)
    assert torch.equal(found[place], rounded[place])


# ------------------------------------------------------------------------------------------- other instruction sets


def printed(code: str, capability: str) -> str:
    """What code prints where the kernels are those of an instruction set."""
    if capability not in dien_ops._C.cpu_capabilities:
        pytest.skip(f"{capability} is not part of this build")
    done = run_python(code, DIEN_OPS_CPU_CAPABILITY=capability, PYTHONPATH="python_tests")
    if "not supported by this processor" in done.stderr:
        pytest.skip(f"this processor has no {capability}")
    assert done.returncode == 0, done.stderr
    return done.stdout


ROUNDED = """
import hashlib, torch
from dien_ops import functional
torch.manual_seed(0)
for dtype in (torch.bfloat16, torch.float16):
    for rows, dim in ((70, 1), (300, 21), (40, 64), (5, 600)):
        weight, ids = torch.zeros(rows, dim, dtype=dtype), torch.randperm(rows).repeat(2)
        grad = torch.cat([torch.randn(rows, dim), torch.randn(rows, dim) / 999]).to(dtype)
        functional.mba_sgd_(weight, ids, grad, lr=1.0, l2=0.0, seed=12345678901234567)
        found = weight.view(torch.uint8).numpy().tobytes()
        print(hashlib.sha256(found).hexdigest())
"""


@pytest.mark.cpu_kernels
@pytest.mark.parametrize("capability", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_rounds_alike(capability):
    """Here, where nothing before the rounding depends on the instruction set."""
    assert printed(ROUNDED, capability) == run_python(ROUNDED).stdout != ""


SEVERAL_STEPS = """
import torch
from dien_ops import functional, reference
from embedding_cases import RULES, Table, skewed_ids
from helpers import assert_close
torch.manual_seed(0)
for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-4), (torch.bfloat16, 6e-2), (torch.float16, 1e-2)):
    for rule in RULES:
        for dim in (1, 3, 8, 17, 37):
            table = Table(rule, rows=40, dim=dim, dtype=dtype)
            ours, theirs = table.copy(), table.copy(torch.float64)
            for nonfinite in ("propagate", "skip"):
                ids, grad = skewed_ids(900, 40), (torch.randn(900, dim) / 9).to(dtype)
                options = {"l2": 0.3, "lr": 0.01, "counts": torch.arange(40) + 1}
                ours.update(functional, ids, grad, nonfinite=nonfinite, **options)
                theirs.update(reference, ids, grad.double(), **options)
            assert_close([x.double() for x in ours.tensors], [x.double() for x in theirs.tensors], tolerance)
            before = ours.weight.clone()
            grad[-1, -1] = torch.inf
            ours.update(functional, ids, grad, nonfinite="skip")
            assert torch.equal(ours.weight, before)
"""


@pytest.mark.cpu_kernels
@pytest.mark.parametrize("capability", ["baseline", "avx2"])
def test_other_instruction_sets_compute_the_same(capability):
    assert printed(SEVERAL_STEPS, capability) == ""
