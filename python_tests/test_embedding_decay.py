# SPDX-License-Identifier: Apache-2.0
"""The kinds of decay of the sparse updates: by hand, against reference.py, and against dense brute force over hundreds of
steps."""

from __future__ import annotations

import io
import math

import pytest
import torch
from torch import Tensor

import dien_ops
from dien_ops import functional, optim, reference
from embedding_cases import ANY_DTYPE, EVERY_DECAY, EVERY_RULE, F64, BruteForce, Table, bits, skewed_ids
from helpers import assert_at_most_twice_torchs_error, assert_close
from optim_cases import EVERY_OPTIMIZER, give_gradient, make, table

STEPS = 200


def test_by_hand():
    weight = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], dtype=F64)
    ids, grad = torch.tensor([2, 0, 2]), torch.tensor([[1.0, 1.0], [2.0, 0.0], [3.0, -1.0]], dtype=F64)
    counts = torch.tensor([1, 0, 4])
    expected = {
        "mini_batch_aware": [[1 - 0.5 * (2 + 0.2 * 1), 2 - 0.5 * 0.2 * 2], [3, 4],
                             [5 - 0.5 * (4 + 0.05 * 5), 6 - 0.5 * 0.05 * 6]],
        "decoupled": [[1 - 0.5 * 0.2 * 1 - 0.5 * 2, 2 - 0.5 * 0.2 * 2], [3, 4],
                      [5 - 0.5 * 0.05 * 5 - 0.5 * 4, 6 - 0.5 * 0.05 * 6]],
        "difacto": [[1 - 0.5 * (2 + 0.2 * 1), 2 - 0.5 * 0.2 * 2], [3, 4],
                    [5 - 0.5 * (4 + 0.2 * 5), 6 - 0.5 * 0.2 * 6]],
    }  # fmt: skip
    for decay, values in expected.items():
        w = weight.clone()
        functional.mba_sgd_(w, ids, grad, lr=0.5, l2=0.2, counts=counts, decay=decay)
        assert_close([w], [torch.tensor(values, dtype=F64)])


def test_lazy_decay_by_hand():
    """Row 0 was touched last when the sum of logarithms was -1, row 1 never."""
    weight, decayed = torch.tensor([[1.0], [2.0], [3.0]], dtype=F64), torch.tensor([-1.0, 0.0, 0.0], dtype=F64)
    functional.mba_sgd_(
        weight, torch.tensor([0, 1, 0]), torch.tensor([[0.5], [0.25], [1.0]], dtype=F64), lr=0.1, decay="lazy",
        decayed=decayed, log_decay=-1.5,
    )  # fmt: skip
    expected = [math.exp(-0.5) * 1 - 0.1 * 1.5, math.exp(-1.5) * 2 - 0.1 * 0.25, 3.0]
    assert_close([weight, decayed], [torch.tensor(expected, dtype=F64).unsqueeze(1), torch.tensor([-1.5, -1.5, 0.0])])


@EVERY_RULE
@EVERY_DECAY
@pytest.mark.parametrize("counted", [False, True], ids=["n=1", "counts"])
def test_several_steps_are_the_references(rule, decay, counted):
    ours, theirs = (t := Table(rule, dim=13)).copy(), t
    counts = torch.randint(2, 9, (11,)) if counted else None
    for _ in range(4):
        ids, grad = skewed_ids(9, 11), torch.randn(9, 13, dtype=F64)
        options = dict(l2=0.7, counts=counts, decay=decay, padding_idx=4)
        assert_close(ours.update(functional, ids, grad, **options), theirs.update(reference, ids, grad, **options))


@EVERY_RULE
@EVERY_DECAY
def test_float32_is_as_good_as_torchs(rule, decay):
    def draw():
        exact = Table(rule, rows=50, dim=20)
        ids, grad = torch.randint(50, (300,)), torch.randn(300, 20)
        ours, theirs = exact.copy(torch.float32), exact.copy(torch.float32)
        exact.weight = ours.weight.double()
        found = [(ours, functional, grad), (theirs, reference, grad), (exact, reference, grad.double())]
        return tuple(t.update(module, ids, g, decay=decay, l2=0.5)[:2] for t, module, g in found)

    assert_at_most_twice_torchs_error(draw() for _ in range(5))


@ANY_DTYPE
def test_without_l2_all_kinds_are_the_same(dtype):
    ids, grad, first = skewed_ids(9, 11), torch.randn(9, 5).to(dtype), Table("adagrad", dtype=dtype)
    results = [bits(first.copy().update(functional, ids, grad, l2=0.0, decay=d)) for d in ("decoupled", "difacto")]
    assert results == [bits(first.update(functional, ids, grad, l2=0.0))] * 2


@EVERY_RULE
def test_without_l2_an_infinite_weight_stays_what_it_is(rule):
    table = Table(rule)
    table.weight[3] = math.inf
    table.update(functional, torch.tensor([3, 3]), torch.ones(2, 5, dtype=F64), l2=0.0)
    assert bool((table.weight[3] == math.inf).all())


# --------------------------------------------------------------------------------------- hundreds of steps, dense


def loss_of(rows: Tensor) -> Tensor:
    scale = torch.arange(1, rows.numel() + 1, dtype=rows.dtype).view(rows.shape)
    return (rows * scale.sin()).sum() + rows.square().sum()


@EVERY_OPTIMIZER
@EVERY_DECAY
@pytest.mark.parametrize("counted", [False, True], ids=["n=1", "counts"])
def test_hundreds_of_steps_are_the_dense_brute_force(name, decay, counted):
    counts = torch.randint(1, 20, (9,)) if counted else None
    embedding = table(counts=counts)
    dense = BruteForce(name, embedding.weight, 0.5, counts, decay)
    optimizer = make(name, embedding.parameters(), l2=0.5, decay=decay)
    for _ in range(STEPS):
        ids = torch.randint(9, (2, 3))
        optimizer.zero_grad()
        rows = dense.weight.clone().requires_grad_()
        loss_of(rows[ids]).backward()
        loss_of(embedding(ids)).backward()
        dense.step(ids, rows.grad)
        optimizer.step()
    torch.testing.assert_close(embedding.weight.detach(), dense.weight, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=str)
def test_lazy_decay_is_dense_sgd_with_l2_on_all_rows(dtype):
    """With a learning rate that changes, batches that are empty, and rows that wait for hundreds of steps."""
    embedding = table(30, dtype=dtype)
    dense = torch.nn.Parameter(embedding.weight.detach().clone().double())
    ours = optim.MBASGD(embedding.parameters(), lr=0.2, l2=0.3, decay="lazy")
    theirs = torch.optim.SGD([dense], lr=0.2, weight_decay=0.3)
    schedulers = [torch.optim.lr_scheduler.CosineAnnealingLR(o, 50) for o in (ours, theirs)]
    for step in range(300):
        ids = torch.randint(25, (0 if step % 7 == 3 else 6,)) if step < 250 else torch.randint(4, (6,))
        give_gradient(embedding.weight, ids, torch.randn(len(ids), 3).to(dtype))
        dense.grad = embedding.weight.grad.to_dense().double()
        for x in (ours, theirs, *schedulers):
            x.step()
        if step in (100, 299):
            assert not torch.allclose(embedding.weight.double(), dense, rtol=1e-3)  # rows that lag behind
            ours.catch_up_()
            tolerance = 1e-12 if dtype == F64 else 2e-6
            assert_close([embedding.weight.double()], [dense], tolerance)


def test_catching_up_again_changes_no_bit():
    embedding = table(30)
    optimizer = optim.MBASGD(embedding.parameters(), lr=0.2, l2=0.3, decay="lazy")
    for _ in range(3):
        give_gradient(embedding.weight, torch.randint(30, (6,)), torch.randn(6, 3, dtype=F64))
        optimizer.step()
    optimizer.catch_up_()
    before = bits([embedding.weight, optimizer.state[embedding.weight]["decayed"]])
    optimizer.catch_up_()
    assert bits([embedding.weight, optimizer.state[embedding.weight]["decayed"]]) == before


def test_catching_up_leaves_padding_and_tables_of_other_decay_alone():
    lazy, other = table(9, padding_idx=2), table(9)
    with torch.no_grad():
        lazy.weight[2] = 1.0
    groups = [{"params": lazy.parameters(), "decay": "lazy"}, {"params": other.parameters()}]
    optimizer = optim.MBASGD(groups, lr=0.2, l2=0.3)
    for embedding in (lazy, other):
        give_gradient(embedding.weight, torch.tensor([1]), torch.zeros(1, 3, dtype=F64))
    before = [x.weight.detach().clone() for x in (lazy, other)]
    optimizer.step()
    optimizer.catch_up_()
    assert_close([lazy.weight[3:]], [before[0][3:] * (1 - 0.2 * 0.3)])
    assert bits([lazy.weight[2], other.weight[2:]]) == bits([before[0][2], before[1][2:]])


def test_catching_up_leaves_a_table_alone_that_is_lazy_no_more():
    embedding = table()
    optimizer = optim.MBASGD(embedding.parameters(), lr=0.2, l2=0.3, decay="lazy")
    give_gradient(embedding.weight, torch.tensor([1]), torch.zeros(1, 3, dtype=F64))
    optimizer.step()
    optimizer.param_groups[0]["decay"] = "decoupled"
    optimizer.step()
    before = bits([embedding.weight])
    optimizer.catch_up_()
    assert bits([embedding.weight]) == before


def test_catching_up_names_the_table_whose_state_is_incomplete():
    embedding = table()
    optimizer = optim.MBASGD(embedding.parameters(), lr=0.2, l2=0.3, decay="lazy")
    give_gradient(embedding.weight, torch.tensor([1]), torch.zeros(1, 3, dtype=F64))
    optimizer.step()
    del optimizer.state[embedding.weight]["log_decay"]
    before = bits([embedding.weight])
    with pytest.raises(RuntimeError, match=r"parameter 0 of group 0 .*: the state must be .*log_decay, got decayed$"):
        optimizer.catch_up_()
    assert bits([embedding.weight]) == before


def test_catching_up_goes_over_tables_in_pieces(monkeypatch):
    monkeypatch.setattr(optim, "_ROWS_AT_ONCE", 4)
    embedding = table(30)
    before = embedding.weight.detach().clone()
    optimizer = optim.MBASGD(embedding.parameters(), lr=0.2, l2=0.3, decay="lazy")
    give_gradient(embedding.weight, torch.tensor([7]), torch.zeros(1, 3, dtype=F64))
    optimizer.step()
    optimizer.catch_up_()
    assert_close([embedding.weight], [before * (1 - 0.2 * 0.3)])


def test_catching_up_rounds_16_bit_rows_stochastically():
    """A decay of 2^-11 is lost by bfloat16's nearest; on average it is there, in each piece with noise of its own."""
    embedding = dien_ops.MBAEmbedding(4096, 16, dtype=torch.bfloat16)
    with torch.no_grad():
        embedding.weight.fill_(1.0)
    optimizer = optim.MBASGD(embedding.parameters(), lr=1.0, l2=2**-11, decay="lazy")
    give_gradient(embedding.weight, torch.tensor([0]), torch.zeros(1, 16).bfloat16())
    optimizer.step()
    optimizer.catch_up_()
    decay = 1 - embedding.weight.float().mean().item()
    # 1 - 2^-8 with probability 2^-3, else 1: five standard deviations of the mean of 2^16 numbers
    assert abs(decay - 2**-11) < 5 * 2**-8 * math.sqrt(2**-3 * (1 - 2**-3) / 2**16)
    assert optimizer.state[embedding.weight]["updates"] == 2


def test_lazy_decay_takes_no_momentum_and_no_counts_and_less_than_all():
    for options, message in (
        (dict(momentum=0.9), 'momentum must be 0 where decay is "lazy", got 0.9'),
        (dict(counts=torch.ones(9)), 'counts must be None where decay is "lazy"'),
        (dict(lr=2.0, l2=0.5), 'lr l2 must be below 1 where decay is "lazy", got 1.0'),
    ):
        with pytest.raises(ValueError, match=message):
            optim.MBASGD(table().parameters(), **{"lr": 0.1, "decay": "lazy", **options})
    with pytest.raises(ValueError, match="decay must be one of 'mini_batch_aware', 'decoupled', 'difacto', got 'lazy'"):
        optim.MBAAdam(table().parameters(), lr=0.1, decay="lazy")


def test_lazy_decay_is_of_all_rows_alike_whatever_the_tables_counts():
    counted, plain = table(counts=torch.full((9,), 100)), table()
    plain.load_state_dict({"weight": counted.weight})
    for embedding in (counted, plain):
        optimizer = optim.MBASGD(embedding.parameters(), lr=0.2, l2=0.3, decay="lazy")
        give_gradient(embedding.weight, torch.tensor([1]), torch.zeros(1, 3, dtype=F64))
        optimizer.step()
        optimizer.catch_up_()
    assert bits([counted.weight]) == bits([plain.weight])


def saved(state: dict) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return file


def test_a_lazy_state_goes_on_with_the_same_bits():
    """float64 of `decayed` and log_decay survives a state_dict of a float32 table."""
    first, second = table(dtype=torch.float32), table(dtype=torch.float32)
    optimizers = [optim.MBASGD(x.parameters(), lr=0.2, l2=0.3, decay="lazy") for x in (first, second)]

    def train(embedding, optimizer, seed):
        generator = torch.Generator(embedding.weight.device).manual_seed(seed)
        for _ in range(9):
            ids = torch.randint(9, (3,), generator=generator)
            give_gradient(embedding.weight, ids, torch.randn(3, 3, generator=generator))
            optimizer.step()

    train(first, optimizers[0], 1)
    second.load_state_dict(first.state_dict())
    optimizers[1].load_state_dict(torch.load(saved(optimizers[0].state_dict())))
    for embedding, optimizer in zip((first, second), optimizers, strict=True):
        train(embedding, optimizer, 2)
        optimizer.catch_up_()
    states = [optimizer.state[x.weight] for optimizer, x in zip(optimizers, (first, second), strict=True)]
    assert states[1]["decayed"].dtype == F64 and states[0]["log_decay"] == states[1]["log_decay"]
    assert bits([first.weight, states[0]["decayed"]]) == bits([second.weight, states[1]["decayed"]])
