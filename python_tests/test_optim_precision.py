# SPDX-License-Identifier: Apache-2.0
"""The MBA optimizers with 16-bit tables, and with torch.amp.GradScaler."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from dien_ops import optim
from dien_ops._optimizer import _mixed
from embedding_cases import BIT16, bits
from helpers import assert_close
from optim_cases import EVERY_OPTIMIZER, batches, give_gradient, make, states, table, train

EVERY_16_BIT = pytest.mark.parametrize("dtype", BIT16, ids=str)

# ------------------------------------------------------------------------------------------------------ 16-bit tables


@EVERY_OPTIMIZER
@EVERY_16_BIT
def test_the_state_of_16_bit_tables_is_float32(name, dtype):
    embedding = table(dtype=dtype)
    optimizer = make(name, embedding.parameters())
    train(optimizer, embedding, batches(3))
    assert {x.dtype for x in states(optimizer)} <= {torch.float32, torch.int64}
    assert optimizer.state[embedding.weight]["updates"] == 3
    loaded = make(name, table(dtype=dtype).parameters())
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert bits(states(loaded)) == bits(states(optimizer))  # the float32 was not cast to 16 bits on its way


def small_steps(optimizer: torch.optim.Optimizer, weights: list[nn.Parameter], steps: int) -> list[Tensor]:
    """Steps of a 16th of a unit in the last place below 1, each weight starting at 1; returns where they arrive."""
    unit = torch.finfo(weights[0].dtype).eps / 2
    with torch.no_grad():
        for weight in weights:
            weight.fill_(1.0)
    for _ in range(steps):
        for weight in weights:
            rows = torch.full(weight.shape, unit / 16, dtype=weight.dtype)
            give_gradient(weight, torch.arange(weight.shape[0]), rows)
        optimizer.step()
    return [weight.detach().clone() for weight in weights]


@EVERY_16_BIT
def test_small_steps_add_up_with_a_seed_and_are_lost_without(dtype):
    def arrive(seed: int | None) -> list[Tensor]:
        weights = [table(64, 16, dtype).weight for _ in range(2)]
        return small_steps(optim.MBASGD(weights, lr=1.0, l2=0.0, seed=seed), weights, 200)

    unit = torch.finfo(dtype).eps / 2
    assert all(bool((x == 1).all()) for x in arrive(None))
    found = arrive(0)
    allowed = 5 * unit * math.sqrt(200 * 15 / 256 / 1024)  # standard deviations of the mean of 1024 numbers
    assert all(abs(x.double().mean().item() - (1 - 200 * unit / 16)) < allowed for x in found)
    assert bits(found) == bits(arrive(0)) and bits(found) != bits(arrive(1))
    assert not torch.equal(found[0], found[1])  # each parameter has noise of its own


@EVERY_16_BIT
def test_each_update_has_noise_of_its_own(dtype):
    weight = table(64, 16, dtype).weight
    optimizer = optim.MBASGD([weight], lr=1.0, l2=0.0)
    moved = [small_steps(optimizer, [weight], 1)[0] != 1 for _ in range(32)]
    counts = torch.stack(moved).sum(0)
    assert 0 < counts.max() < 12 and abs(counts.double().mean().item() - 2) < 5 * math.sqrt(32 * 15 / 256 / 1024)


def test_the_mix_of_a_seed_sends_neighbours_far_apart():
    """All different, and each bit is set in half of them; SplitMix64's first number after 0 is as published."""
    assert _mixed(0) == 0xE220A8397B1DCDAF - 2**64
    seeds = [_mixed(seed, number, update) for seed in range(8) for number in range(8) for update in range(64)]
    assert len(set(seeds)) == len(seeds) == 4096 and all(-(2**63) <= x < 2**63 for x in seeds)
    for bit in range(64):
        assert abs(sum(x >> bit & 1 for x in seeds) - 2048) < 5 * 32


def test_the_number_of_a_parameter_counts_over_all_groups():
    """So two groups with the same seed have different noise, and adding a gradient to one changes no other."""
    weights = [table(64, 16, torch.bfloat16).weight for _ in range(2)]
    in_two_groups = optim.MBASGD([{"params": [w]} for w in weights], lr=1.0, l2=0.0)
    found = small_steps(in_two_groups, weights, 3)
    assert not torch.equal(found[0], found[1])
    alone = optim.MBASGD([{"params": [weights[0]]}, {"params": [table(5).weight]}], lr=1.0, l2=0.0)
    assert torch.equal(small_steps(alone, weights[:1], 3)[0], found[0])


# --------------------------------------------------------------------------------------------------------- GradScaler


def scaler_of(embedding: nn.Module, scale: float = 1024.0) -> torch.amp.GradScaler:
    return torch.amp.GradScaler(embedding.weight.device.type, init_scale=scale, growth_interval=1000)


def scaled_step(scaler, optimizer, embedding, ids: Tensor, factor: float = 1.0, unscale: bool = False) -> None:
    optimizer.zero_grad()
    loss = (embedding(ids).float() * factor * torch.arange(1, 4)).square().sum()
    scaler.scale(loss).backward()
    if unscale:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()


@EVERY_OPTIMIZER
@pytest.mark.parametrize("unscale", [False, True], ids=["step", "unscale_ and step"])
@pytest.mark.parametrize("decay", ["mini_batch_aware", "decoupled"])
def test_a_scaled_step_is_the_step(name, unscale, decay):
    scaled, plain = table(dtype=torch.float32), table(dtype=torch.float32)
    plain.load_state_dict(scaled.state_dict())
    optimizers = [make(name, t.parameters(), decay=decay) for t in (scaled, plain)]
    scaler = scaler_of(scaled)
    for ids in batches(5):
        scaled_step(scaler, optimizers[0], scaled, ids, unscale=unscale)
        optimizers[1].zero_grad()
        (plain(ids) * torch.arange(1, 4)).square().sum().backward()
        optimizers[1].step()
    assert_close([scaled.weight, *states(optimizers[0])], [plain.weight, *states(optimizers[1])], 1e-6)
    assert not hasattr(optimizers[0], "found_inf") and not hasattr(optimizers[0], "grad_scale")


@EVERY_OPTIMIZER
@pytest.mark.parametrize("nonfinite", ["propagate", "skip", "error"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_step_with_an_infinite_gradient_changes_nothing_and_the_scale_shrinks(name, dtype, nonfinite):
    tables = [table(dtype=dtype), table(dtype=dtype)]
    optimizer, scaler = make(name, [t.weight for t in tables], nonfinite=nonfinite), scaler_of(tables[0])

    def step(ids: Tensor, factor: float) -> list[bytes]:
        optimizer.zero_grad()
        scaler.scale(tables[0](ids).float().sum() * factor + tables[1](ids).float().sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        return bits([*(t.weight for t in tables), *states(optimizer)])

    for ids in batches(2):
        before = step(ids, 1.0)
    assert scaler.get_scale() == 1024
    assert step(ids, math.inf) == before
    assert scaler.get_scale() == 512
    assert all(x != y for x, y in zip(step(ids, 1.0), before, strict=True))
    assert scaler.get_scale() == 512


def test_unscaling_before_finds_what_is_infinite():
    embedding = table(dtype=torch.float32)
    optimizer, scaler = make("adam", embedding.parameters()), scaler_of(embedding)
    before = bits([embedding.weight])
    scaled_step(scaler, optimizer, embedding, torch.tensor([1, 2, 1]), factor=math.inf, unscale=True)
    assert bits([embedding.weight]) == before and scaler.get_scale() == 512


def test_float16_gradients_that_would_vanish_come_through_scaled():
    """2^-26 is below the smallest float16, times 2^12 it is not."""
    embedding = table(dtype=torch.float16)
    with torch.no_grad():
        embedding.weight.zero_()
    optimizer = optim.MBASGD(embedding.parameters(), lr=2.0**20, l2=0.0, seed=None)
    scaler = scaler_of(embedding, scale=2.0**12)
    loss = (embedding(torch.tensor([1])).float() * 2**-26).sum()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    assert embedding.weight[1].tolist() == [-(2.0**-6)] * 3


def test_a_lazy_table_owes_nothing_for_a_step_that_the_scaler_left_out():
    scaled, plain = table(dtype=torch.float32), table(dtype=torch.float32)
    plain.load_state_dict(scaled.state_dict())
    optimizers = [optim.MBASGD(t.parameters(), lr=0.1, l2=0.5, decay="lazy") for t in (scaled, plain)]
    scaler = scaler_of(scaled)
    for i, ids in enumerate(batches(6)):
        left_out = i % 3 == 1
        scaled_step(scaler, optimizers[0], scaled, ids, factor=math.inf if left_out else 1.0)
        if not left_out:
            optimizers[1].zero_grad()
            (plain(ids) * torch.arange(1, 4)).square().sum().backward()
            optimizers[1].step()
    for optimizer in optimizers:
        optimizer.catch_up_()
    assert_close([scaled.weight], [plain.weight], 1e-6)
    first, second = (o.state[t.weight]["log_decay"] for o, t in zip(optimizers, (scaled, plain), strict=True))
    assert first == second


def test_a_scaler_steps_an_optimizer_whose_tables_have_no_gradient():
    used, unused = table(dtype=torch.float32), table(dtype=torch.float32)
    optimizer, scaler = make("adam", unused.parameters()), scaler_of(used)
    before = bits([unused.weight])
    scaler.scale(used(torch.tensor([1])).sum()).backward()
    scaler.step(optimizer)
    assert bits([unused.weight]) == before
