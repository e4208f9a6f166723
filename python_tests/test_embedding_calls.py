# SPDX-License-Identifier: Apache-2.0
"""One call of an operator: several tables, and what leaves a table, or all of them, as they are."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dien_ops import functional, reference
from embedding_cases import (
    ANY_DTYPE,
    EVERY_RULE,
    F64,
    STATES,
    Table,
    bits,
    call_operator,
    skewed_ids,
)
from helpers import assert_close, captured, waiting_is_an_error, with_threads

# ------------------------------------------------------------------------------------------------ several tables

SHAPES = [(11, 5), (3000, 1), (1, 64), (40, 19), (0, 4), (7, 0), (500, 8)]  # [num_embeddings, D]
SIZES = [9, 700, 30, 0, 0, 5, 64]  # of their mini-batches


def many_tables(rule: str, dtype: torch.dtype) -> tuple[list[Table], list[tuple[Tensor, Tensor]]]:
    tables = [Table(rule, *shape, dtype) for shape in SHAPES]
    batches = []
    for i, ((rows, dim), size) in enumerate(zip(SHAPES, SIZES, strict=True)):
        ids = skewed_ids(size, rows) if rows else torch.zeros(0, dtype=torch.int64)
        batches.append((ids.int() if i % 2 else ids, torch.randn(size, dim).to(dtype)))
    return tables, batches


@EVERY_RULE
@ANY_DTYPE
@pytest.mark.parametrize("decay", ["mini_batch_aware", "decoupled"])
@pytest.mark.parametrize("counted", [False, True], ids=["n=1", "counts"])
def test_several_tables_in_one_call_are_as_many_calls_bit_for_bit(rule, dtype, decay, counted):
    """Of any sizes, empty ones too; ids of both types, counts of every type."""
    tables, batches = many_tables(rule, dtype)
    types = [torch.int32, torch.int64, torch.float32, torch.float64]
    counts = [torch.randint(1, 9, (rows,)).to(types[i % 4]) for i, (rows, _) in enumerate(SHAPES)] if counted else []
    padding_idx = [5, -1, -1, 0, -1, 3, 499]
    seeds = [2**i for i in range(len(tables))]
    apart = [table.copy() for table in tables]
    call_operator(tables, batches, counts=counts, padding_idx=padding_idx, seeds=seeds, decay=decay)
    for i, table in enumerate(apart):
        options = dict(counts=counts[i : i + 1], padding_idx=padding_idx[i : i + 1], seeds=seeds[i : i + 1])
        call_operator([table], batches[i : i + 1], **options, decay=decay)
    assert [bits(table.tensors) for table in tables] == [bits(table.tensors) for table in apart]
    assert len({bits(table.tensors)[0] for table in tables}) > 4


def test_several_lazy_tables_in_one_call_are_as_many_calls_bit_for_bit():
    tables, batches = many_tables("sgd", torch.float32)
    decayed = [-torch.rand(rows, dtype=F64) for rows, _ in SHAPES]
    log_decays = [-1.0 - i for i in range(len(SHAPES))]
    apart, apart_decayed = [table.copy() for table in tables], [d.clone() for d in decayed]

    def call(weights, decayed, ids, grads, log_decays):
        options = (None, None, "lazy", "propagate", True, 0.1, 0.0, 0.0)
        padding_idx = [-1] * len(weights)
        torch.ops.dien_ops.mba_sgd_(weights, [], decayed, ids, grads, [], padding_idx, [], log_decays, *options)

    ids, grads = (list(x) for x in zip(*batches, strict=True))
    call([t.weight for t in tables], decayed, ids, grads, log_decays)
    for lists in zip([t.weight for t in apart], apart_decayed, ids, grads, log_decays, strict=True):
        call(*([x] for x in lists))
    found, expected = [*(t.weight for t in tables), *decayed], [*(t.weight for t in apart), *apart_decayed]
    assert bits(found) == bits(expected)


@EVERY_RULE
@pytest.mark.cpu_kernels
def test_the_number_of_threads_does_not_change_a_bit_of_any_table(rule):
    tables, batches = many_tables(rule, torch.float32)
    results = []
    for threads in (1, 2, 3):
        copies = [table.copy() for table in tables]
        with_threads(threads, lambda copies=copies: call_operator(copies, batches) or [])
        results.append([bits(table.tensors) for table in copies])
    assert results[0] == results[1] == results[2]


@EVERY_RULE
@pytest.mark.parametrize("size", [1, 31, 33, 1024, 5000])
def test_mini_batches_in_which_a_third_is_one_id_are_the_references(rule, size):
    ours, theirs = (table := Table(rule, rows=200, dim=6)).copy(), table
    ids, grad = skewed_ids(size, 200), torch.randn(size, 6, dtype=F64)
    assert_close(ours.update(functional, ids, grad), theirs.update(reference, ids, grad))


# ------------------------------------------------------------------------------------------ ids that are not there


def between_guards(table: Table, rows: int = 8) -> dict[str, Tensor]:
    """Moves each tensor of a table between rows that nobody may write; returns the memory of each."""
    memory = {}
    for name, tensor in {"weight": table.weight, **table.state}.items():
        space = torch.full((tensor.shape[0] + 2 * rows, *tensor.shape[1:]), 77, dtype=tensor.dtype)
        space[rows:-rows] = tensor
        memory[name] = space
    table.weight = memory["weight"][rows:-rows]
    table.state = {name: memory[name][rows:-rows] for name in table.state}
    return memory


OUTSIDE = [-1, 11, -8, 18, 2**31 - 1, -(2**31), 2**40, -(2**40), 2**63 - 1, -(2**63)]


@EVERY_RULE
@ANY_DTYPE
@pytest.mark.parametrize("wide", [True, False], ids=["int64", "int32"])
def test_ids_outside_are_left_out_where_they_are_not_checked(rule, dtype, wide):
    table = Table(rule, dtype=dtype)
    inside = skewed_ids(12, 11)
    outside = torch.tensor([x for x in OUTSIDE if wide or -(2**31) <= x < 2**31])
    ids = torch.cat([outside[::2], inside[:5], outside[1::2], inside[5:]])
    ids = ids if wide else ids.int()
    grad = torch.randn(len(ids), 5).to(dtype)
    kept = (ids >= 0) & (ids < 11)
    expected = table.copy().update(functional, ids[kept], grad[kept], seed=1)
    memory = between_guards(table)
    found = table.update(functional, ids, grad, seed=1, check_ids=False, counts=torch.full((11,), 1))
    assert_close([x.double() for x in found], [x.double() for x in expected], 1e-12 if dtype == F64 else 2e-2)
    for space in memory.values():
        assert bool((space[:8] == 77).all() and (space[-8:] == 77).all())


@EVERY_RULE
@pytest.mark.not_on_cuda(reason="nobody waits for the ids there")
@pytest.mark.parametrize("wrong", OUTSIDE)
def test_ids_outside_are_an_error_that_writes_nothing(rule, wrong):
    table = Table(rule)
    memory = between_guards(table)
    before = bits(memory.values())
    with pytest.raises(RuntimeError, match=f"ids must be in 0..10, got {wrong} at position 3"):
        table.update(functional, torch.tensor([0, 10, 5, wrong, 5]), torch.randn(5, 5, dtype=F64))
    assert bits(memory.values()) == before


def test_gradient_rows_of_ids_that_are_left_out_do_not_count():
    """They are as good as absent: their NaN is no reason to skip a table or to fail."""
    for nonfinite in ("propagate", "skip", "error"):
        table = Table("sgd")
        before = table.weight.clone()
        grad = torch.full((2, 5), math.nan, dtype=F64)
        grad[0] = 1
        table.update(functional, torch.tensor([3, 11]), grad, check_ids=False, nonfinite=nonfinite)
        assert bool(table.weight.isfinite().all()) and not torch.equal(table.weight, before)


# ----------------------------------------------------------------------------------- gradients that are not finite

BAD_NUMBERS = pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)


def batch_with(bad: float, dtype: torch.dtype, column: int = 4) -> tuple[Tensor, Tensor]:
    ids, grad = torch.tensor([3, 7, 3, 0]), torch.randn(4, 5).to(dtype)
    grad[2, column] = bad
    return ids, grad


@EVERY_RULE
@ANY_DTYPE
@BAD_NUMBERS
def test_what_is_not_finite_propagates(rule, dtype, bad):
    table = Table(rule, dtype=dtype)
    table.update(functional, *batch_with(bad, dtype))
    assert not table.weight[3].isfinite().all()
    assert table.weight[[0, 7]].isfinite().all()


@EVERY_RULE
@ANY_DTYPE
@BAD_NUMBERS
@pytest.mark.parametrize("column", [0, 4])
def test_a_table_with_a_gradient_that_is_not_finite_is_skipped_alone(rule, dtype, bad, column):
    tables = [Table(rule, dtype=dtype) for _ in range(3)]
    good = (skewed_ids(9, 11), torch.randn(9, 5).to(dtype))
    expected = tables[0].copy()
    call_operator([expected], [good])
    before = bits(tables[1].tensors)
    call_operator(tables, [good, batch_with(bad, dtype, column), good], nonfinite="skip")
    assert bits(tables[1].tensors) == before
    assert bits(tables[0].tensors) == bits(expected.tensors)


@EVERY_RULE
@pytest.mark.not_on_cuda(reason="nobody waits for the gradient there")
def test_a_gradient_that_is_not_finite_is_an_error_that_leaves_every_bit_of_all(rule):
    tables = [Table(rule) for _ in range(2)]
    before = [bits(table.tensors) for table in tables]
    good = (skewed_ids(9, 11), torch.randn(9, 5, dtype=F64))
    with pytest.raises(RuntimeError, match=r"table 1: grad must be finite, got nan at position 2 \(id 3\), column 4"):
        call_operator(tables, [good, batch_with(math.nan, F64)], nonfinite="error")
    assert [bits(table.tensors) for table in tables] == before


@EVERY_RULE
@pytest.mark.parametrize("nonfinite", ["propagate", "skip", "error"])
def test_gradient_rows_of_the_padding_id_do_not_count(rule, nonfinite):
    table = Table(rule)
    before = bits([t[3] for t in table.tensors])
    ids, grad = batch_with(math.nan, F64)
    moved = table.weight[7].clone()
    table.update(functional, ids, grad, nonfinite=nonfinite, padding_idx=3)
    assert bits([t[3] for t in table.tensors]) == before
    assert table.weight.isfinite().all() and not torch.equal(table.weight[7], moved)


@ANY_DTYPE
@BAD_NUMBERS
def test_what_is_not_finite_is_seen_wherever_it_stands(dtype, bad):
    table, (n, dim) = Table("sgd", dim=37, dtype=dtype), (24, 37)
    before = bits(table.tensors)
    ids = torch.arange(n) % 11
    for place in [*range(0, n * dim, 31), n * dim - 1]:
        grad = torch.ones(n, dim, dtype=dtype)
        grad.view(-1)[place] = bad
        table.update(functional, ids, grad, nonfinite="skip")
        assert bits(table.tensors) == before, place


@EVERY_RULE
@pytest.mark.parametrize("nonfinite", ["skip", "error"])
@ANY_DTYPE
def test_large_numbers_are_finite(rule, nonfinite, dtype):
    """Their sum need not be: what is looked at are the gradient's numbers."""
    table = Table(rule, dtype=dtype)
    before = bits(table.tensors)
    grad = torch.full((2, 5), torch.finfo(dtype).max, dtype=dtype)
    table.update(functional, torch.tensor([3, 3]), grad, nonfinite=nonfinite)
    assert bits(table.tensors) != before


# --------------------------------------------------------------------------------------------------------- found_inf


@EVERY_RULE
@ANY_DTYPE
@pytest.mark.parametrize("shape", [[], [1]], ids=str)
def test_where_found_inf_is_not_zero_nothing_changes_at_all(rule, dtype, shape):
    tables, batches = many_tables(rule, dtype)
    before = [bits(table.tensors) for table in tables]
    scale = torch.full(shape, 4.0)
    for found in (1.0, -1.0, math.nan):
        call_operator(tables, batches, found_inf=torch.full(shape, found), grad_scale=scale, seeds=[0] * len(tables))
        assert [bits(table.tensors) for table in tables] == before
    call_operator(tables, batches, found_inf=torch.zeros(shape), grad_scale=scale)
    assert bits(tables[0].tensors) != before[0]


@EVERY_RULE
def test_found_inf_comes_before_what_a_gradient_would_do(rule):
    table = Table(rule)
    before = bits(table.tensors)
    for nonfinite in ("propagate", "skip", "error"):
        table.update(functional, *batch_with(math.inf, F64), found_inf=torch.ones(()), nonfinite=nonfinite)
        assert bits(table.tensors) == before


def test_lazy_decay_stands_still_where_nothing_may_change():
    weight, decayed = torch.randn(11, 5, dtype=F64), torch.zeros(11, dtype=F64)
    before = bits([weight, decayed])
    options = dict(lr=0.1, decay="lazy", decayed=decayed, log_decay=-0.5)
    functional.mba_sgd_(weight, *batch_with(math.inf, F64), found_inf=torch.ones(()), **options)
    functional.mba_sgd_(weight, *batch_with(math.inf, F64), nonfinite="skip", **options)
    assert bits([weight, decayed]) == before


# ---------------------------------------------------------------------------------------------------- on a device only


def test_nothing_waits_for_the_device(on_device):
    tables = [Table(rule, dtype=torch.float32) for rule in STATES]
    ids, grad, scale, found = skewed_ids(90, 11), torch.randn(90, 5), torch.ones(()), torch.zeros(())
    with waiting_is_an_error():
        for table in tables:
            table.update(functional, ids, grad, nonfinite="skip", grad_scale=scale, found_inf=found)


@EVERY_RULE
def test_an_update_replays_from_a_cuda_graph(on_device, rule):
    table, ids, grad = Table(rule, dtype=torch.float32), skewed_ids(90, 11), torch.randn(90, 5)
    expected = table.copy()
    for _ in range(2):
        expected.update(functional, ids, grad)
    graph, _ = captured(lambda: table.update(functional, ids, grad))
    graph.replay()
    assert bits(table.tensors) == bits(expected.tensors)
