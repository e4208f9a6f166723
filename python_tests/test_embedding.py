# SPDX-License-Identifier: Apache-2.0
"""The sparse updates with mini-batch aware L2 against reference.py: one table. On the CPU kernels, and with
`--host-executor` or `--device cuda` on the CUDA kernels."""

from __future__ import annotations

import pytest
import torch

from dien_ops import functional, reference
from embedding_cases import (
    ANY_DTYPE,
    COUNT_TYPES,
    EVERY_DECAY,
    EVERY_RULE,
    F64,
    STATES,
    Table,
    bits,
    function_of,
    operator_lists,
    skewed_ids,
)
from helpers import assert_at_most_twice_torchs_error, assert_close, with_threads


def test_by_hand():
    weight = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    ids, grad = torch.tensor([2, 0, 2]), torch.tensor([[1.0, 1.0], [2.0, 0.0], [3.0, -1.0]])
    functional.mba_sgd_(weight, ids, grad, lr=0.5, l2=0.2, counts=torch.tensor([1, 0, 4]))
    # row 0: 1 - 0.5 (2 + 0.2/1 * 1) and 2 - 0.5 (0 + 0.2/1 * 2)
    # row 2: 5 - 0.5 (4 + 0.2/4 * 5) and 6 - 0.5 (0 + 0.2/4 * 6)
    torch.testing.assert_close(weight, torch.tensor([[-0.1, 1.8], [3.0, 4.0], [2.875, 5.85]]))


@EVERY_RULE
@pytest.mark.parametrize("dim", [1, 3, 8, 17, 64, 129])
def test_several_steps_are_the_references(rule, dim):
    ours, theirs = (table := Table(rule, dim=dim)).copy(), table
    counts = torch.randint(1, 9, (11,))
    for _ in range(4):
        ids = skewed_ids(9, 11)
        grad = torch.randn(9, dim, dtype=F64)
        actual = ours.update(functional, ids, grad, l2=0.3, counts=counts)
        assert_close(actual, theirs.update(reference, ids, grad, l2=0.3, counts=counts))


@EVERY_RULE
@pytest.mark.parametrize("count", [0, 1, 1000])
def test_mini_batches_of_any_size_are_the_references(rule, count):
    """1000 gradient rows of one id are summed in pieces."""
    ours, theirs = (table := Table(rule)).copy(), table
    ids, grad = skewed_ids(count, 11), torch.randn(count, 5, dtype=F64)
    assert_close(ours.update(functional, ids, grad), theirs.update(reference, ids, grad))


@EVERY_RULE
@pytest.mark.parametrize("per_row", [3, 400])
def test_float32_is_as_good_as_torchs(rule, per_row):
    def draw():
        exact, count = Table(rule, rows=50, dim=20), 50 * per_row
        ids, grad = torch.randint(50, (count,)), torch.randn(count, 20)
        ours, theirs = exact.copy(torch.float32), exact.copy(torch.float32)
        exact.weight = ours.weight.double()
        return (
            ours.update(functional, ids, grad)[:2],  # the weight and the first state
            theirs.update(reference, ids, grad)[:2],
            exact.update(reference, ids, grad.double())[:2],
        )

    assert_at_most_twice_torchs_error(draw() for _ in range(5))


def test_the_sum_of_very_many_gradient_rows_loses_few_digits():
    """Added up one after the other in float32, these would be wrong in the third."""
    weight = torch.zeros(2, 1)
    functional.mba_sgd_(weight, torch.ones(2**18, dtype=torch.int64), torch.full((2**18, 1), 0.1), lr=1.0)
    assert abs(weight[1].item() / -(2**18 * 0.1) - 1) < 5e-5


def test_ids_beyond_one_digit_of_the_sort_are_the_references():
    ours, theirs = (table := Table("sgd", rows=5_000_000, dim=1)).copy(), table
    ids = skewed_ids(40_000, 5_000_000)
    ids[1::3] = torch.arange(4_999_999, 4_999_999 - len(ids[1::3]), -1)
    grad = torch.randn(40_000, 1, dtype=F64)
    assert_close(ours.update(functional, ids, grad), theirs.update(reference, ids, grad))


@EVERY_RULE
def test_rows_that_are_not_in_the_mini_batch_keep_their_bits(rule):
    table = Table(rule)
    before = [t.clone() for t in table.tensors]
    table.update(functional, torch.tensor([3, 7, 3]), torch.randn(3, 5, dtype=F64), l2=1.0)
    others = [i for i in range(11) if i not in (3, 7)]
    assert bits([t[others] for t in table.tensors]) == bits([t[others] for t in before])
    assert not torch.equal(table.weight[3], before[0][3])


def test_an_id_decays_once_per_mini_batch_however_often_it_occurs():
    weight = torch.ones(4, 2, dtype=F64)
    functional.mba_sgd_(weight, torch.tensor([1, 1, 1]), torch.zeros(3, 2, dtype=F64), lr=0.5, l2=0.2)
    torch.testing.assert_close(weight[1], torch.full((2,), 0.9, dtype=F64))


@EVERY_RULE
@pytest.mark.parametrize("dtype", COUNT_TYPES)
def test_counts_of_every_type_divide_the_decay(rule, dtype):
    ours, theirs = (table := Table(rule)).copy(), table
    counts = torch.randint(1, 9, (22,), dtype=dtype)[::2]
    ids, grad = skewed_ids(6, 11), torch.randn(6, 5, dtype=F64)
    actual = ours.update(functional, ids, grad, l2=2.0, counts=counts)
    assert_close(actual, theirs.update(reference, ids, grad, l2=2.0, counts=counts))


def test_a_count_of_zero_does_not_matter_for_an_absent_id():
    table = Table("sgd")
    counts = torch.ones(11).index_fill(0, torch.tensor([4]), 0)
    table.update(functional, torch.tensor([3, 5]), torch.randn(2, 5, dtype=F64), counts=counts)


@EVERY_RULE
@pytest.mark.parametrize("padding_idx", [0, 5, -1])
def test_the_padding_row_never_changes(rule, padding_idx):
    ours, theirs = (table := Table(rule)).copy(), table
    before = [t.clone() for t in ours.tensors]
    ids = torch.arange(11).repeat(2)
    grad = torch.randn(22, 5, dtype=F64)
    counts = torch.ones(11, dtype=torch.int64)
    counts[padding_idx] = 0
    actual = ours.update(functional, ids, grad, padding_idx=padding_idx, counts=counts)
    assert bits([t[padding_idx] for t in actual]) == bits([t[padding_idx] for t in before])
    assert_close(actual, theirs.update(reference, ids, grad, padding_idx=padding_idx, counts=counts))


@EVERY_RULE
def test_ids_and_gradients_come_in_any_shape_type_and_strides(rule):
    ours, theirs = (table := Table(rule)).copy(), table
    ids = torch.randint(11, (4, 3), dtype=torch.int32).t()
    grad = torch.randn(4, 5, dtype=F64).expand(3, 4, 5)
    flat = (ids.long().reshape(-1), grad.reshape(-1, 5))
    assert_close(ours.update(functional, ids, grad), theirs.update(reference, *flat))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tables_of_more_than_2_to_the_31_elements_are_addressed(dtype):
    rows, dim = 2**27 + 1, 17
    try:
        weight = torch.empty(
            rows, dim, dtype=dtype
        )  # addresses: on the CPU only the pages that are touched take memory
    except RuntimeError:
        pytest.skip("there is no memory for 2^31 numbers")
    ids = torch.tensor([rows - 1, 2**26, rows - 1])
    weight[ids] = 1.0
    functional.mba_sgd_(weight, ids, torch.ones(3, dim, dtype=dtype), lr=0.5, l2=0.0, seed=1)
    assert torch.equal(weight[ids[:2]], torch.tensor([[0.0], [0.5]], dtype=dtype).expand(2, dim))


@EVERY_RULE
@pytest.mark.parametrize("rows, dim", [(0, 4), (4, 0)])
def test_empty_tables_and_rows_are_accepted(rule, rows, dim):
    ids = torch.arange(rows)
    Table(rule, rows, dim).update(functional, ids, torch.zeros(rows, dim, dtype=F64))


@EVERY_RULE
@pytest.mark.cpu_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_number_of_threads_does_not_change_a_bit(rule, dtype):
    """Several ids are so frequent that all threads add up their gradient rows."""
    ids, grad = skewed_ids(60_000, 3000), torch.randn(60_000, 24).to(dtype)
    ids[1::12], ids[2::12], ids[4::12] = 1, 2900, 2950
    table = Table(rule, rows=3000, dim=24, dtype=dtype)
    results = [with_threads(n, lambda: table.copy().update(functional, ids, grad, seed=3)) for n in (1, 2, 3)]
    assert bits(results[0]) == bits(results[1]) == bits(results[2])


@pytest.mark.cpu_kernels
@pytest.mark.parametrize("padding_idx", [None, 4096, 8191])
@pytest.mark.parametrize("count", [8193, 20_000])
def test_threads_share_out_ids_of_which_few_are_different(count, padding_idx):
    """Two ids make up nearly all, and shares end at powers of two, where another bit of the row begins."""
    table, ids = Table("sgd", rows=8192, dim=3), torch.full([count], 4096)
    ids[: count // 2], ids[0], ids[-1] = 0, 8191, 8191
    grad = torch.randn(count, 3, dtype=F64)
    expected = table.copy().update(reference, ids, grad, padding_idx=padding_idx)
    for threads in (1, 2, 3, 7):
        updated = with_threads(threads, lambda: table.copy().update(functional, ids, grad, padding_idx=padding_idx))
        assert_close(updated, expected)


@EVERY_RULE
def test_the_same_inputs_give_the_same_bits(rule):
    ids, grad, table = skewed_ids(5000, 300), torch.randn(5000, 24), Table(rule, rows=300, dim=24, dtype=torch.float32)
    expected = bits(table.copy().update(functional, ids, grad))
    for _ in range(3):
        assert bits(table.copy().update(functional, ids, grad)) == expected


def test_the_first_step_of_adam_is_as_long_as_the_learning_rate():
    """1 - beta2 is 1e-3: computed in float32 it would have four digits."""
    table = Table("adam", dtype=torch.float32)
    before = table.weight.clone()
    functional.mba_adam_(
        table.weight, **table.state, ids=torch.arange(11), grad=torch.randn(11, 5), lr=1.0, eps=0.0, l2=0.0
    )
    assert ((before - table.weight).abs() - 1).abs().max() < 1e-6


def test_autograd_sees_the_write():
    weight = torch.randn(4, 3, requires_grad=True)
    loss = weight.square().sum()
    functional.mba_sgd_(weight, torch.tensor([1]), torch.randn(1, 3), lr=0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_autograd_sees_the_write_of_every_state():
    for rule in STATES:
        table = Table(rule)
        versions = [t._version for t in table.tensors]
        table.update(functional, torch.tensor([1]), torch.randn(1, 5, dtype=F64))
        assert all(t._version > before for t, before in zip(table.tensors, versions, strict=True)), rule
    weight, decayed = torch.randn(4, 3), torch.zeros(4, dtype=F64)
    options = dict(lr=0.1, decay="lazy", decayed=decayed, log_decay=-0.1)
    functional.mba_sgd_(weight, torch.tensor([1]), torch.randn(1, 3), **options)
    assert weight._version > 0 and decayed._version > 0


@EVERY_RULE
def test_inference_tensors_are_updated_too(rule):
    with torch.inference_mode():
        table = Table(rule)
        before = table.weight.clone()
        table.update(functional, torch.tensor([1]), torch.randn(1, 5, dtype=F64))
    assert not torch.equal(table.weight, before)


@EVERY_RULE
@ANY_DTYPE
def test_a_sparse_gradient_is_taken_as_it_is(rule, dtype):
    """Not coalesced: its ids repeat."""
    table, embedding = Table(rule, dtype=dtype), torch.nn.Embedding(11, 5, sparse=True, dtype=dtype)
    ids = torch.tensor([[3, 7], [3, 0]])
    (embedding(ids) * torch.randn(2, 2, 5).to(dtype)).sum().backward()
    grad = embedding.weight.grad
    assert not grad.is_coalesced()
    expected = bits(table.copy().update(functional, grad._indices()[0], grad._values()))
    assert bits(table.update(functional, None, grad)) == expected


@EVERY_RULE
@EVERY_DECAY
@pytest.mark.parametrize("scale", [1024.0, 0.25])
def test_the_gradient_is_divided_by_its_scale(rule, decay, scale):
    ours, theirs = (table := Table(rule, dim=37)).copy(), table
    ids, grad = skewed_ids(6, 11), torch.randn(6, 37, dtype=F64)
    options = dict(grad_scale=torch.tensor(scale), decay=decay)
    actual = ours.update(functional, ids, grad * scale, **options)
    assert_close(actual, theirs.copy().update(reference, ids, grad * scale, **options))
    assert_close(actual, theirs.update(reference, ids, grad, decay=decay))


# -------------------------------------------------------------------------------------------------- torch.compile


@EVERY_RULE
@pytest.mark.parametrize("dtype", [F64, torch.bfloat16], ids=str)
def test_compiles_to_one_graph_for_all_sizes(rule, dtype):
    torch._dynamo.reset()
    table, names = Table(rule, dtype=dtype), list(STATES[rule])

    def step(weight, ids, grad, *state):
        options = {"momentum": 0.9} if rule == "momentum" else {}
        function = getattr(functional, function_of(rule))
        states = dict(zip(names, state, strict=True))
        function(weight, ids=ids, grad=grad, lr=0.1, padding_idx=-1, seed=3, **states, **options)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for count in (3, 8):
        ids, grad = skewed_ids(count, 11), torch.randn(count, 5).to(dtype)
        eager = table.copy().update(functional, ids, grad, padding_idx=-1, seed=3)
        compiled(table.weight, ids, grad, *table.state.values())
        assert bits(table.tensors) == bits(eager)


def test_another_seed_compiles_no_other_graph():
    torch._dynamo.reset()

    def step(weight, ids, grad, seed):
        functional.mba_sgd_(weight, ids, grad, lr=0.1, seed=seed)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    weight, ids, grad = Table("sgd", dtype=torch.bfloat16).weight, skewed_ids(9, 11), torch.randn(9, 5).bfloat16()
    other = weight.clone()
    compiled(weight, ids, grad, 5)
    step(other, ids, grad, 5)
    with torch.compiler.set_stance("fail_on_recompile"):
        for seed in (6, -(2**63), 2**63 - 1):
            compiled(weight, ids, grad, seed)
            step(other, ids, grad, seed)
            assert bits([weight]) == bits([other])


@EVERY_RULE
def test_a_whole_training_step_compiles_to_one_graph(rule):
    """Rows are looked up, the loss differentiated with respect to them and to the dense parameters, and all updated."""
    torch._dynamo.reset()
    names = list(STATES[rule])
    function, options = getattr(functional, function_of(rule)), {"momentum": 0.9} if rule == "momentum" else {}

    def loss_of(rows, dense, labels):
        logits = torch.relu(rows.sum(1) @ dense[0]) @ dense[1]
        return torch.nn.functional.binary_cross_entropy_with_logits(logits, labels)

    def training_step(weight, dense, ids, labels, *state):
        (grad, dense_grad), loss = torch.func.grad_and_value(loss_of, argnums=(0, 1))(weight[ids], dense, labels)
        states = dict(zip(names, state, strict=True))
        function(weight, ids=ids, grad=grad, lr=0.1, padding_idx=0, **states, **options)
        for parameter, g in zip(dense, dense_grad, strict=True):
            parameter.sub_(g, alpha=0.1)
        return loss

    table, dense = Table(rule, rows=50), [torch.randn(5, 4, dtype=F64), torch.randn(4, dtype=F64)]
    others, other_dense = table.copy(), [x.clone() for x in dense]
    compiled = torch.compile(training_step, fullgraph=True, dynamic=True, backend="aot_eager")
    losses = []
    for batch, steps in ((6, 3), (9, 4), (5, 7)):
        ids, labels = torch.randint(50, (batch, steps)), torch.rand(batch, dtype=F64)
        losses = [
            compiled(table.weight, dense, ids, labels, *table.state.values()),
            training_step(others.weight, other_dense, ids, labels, *others.state.values()),
        ]
        assert_close([*table.tensors, *dense, losses[0]], [*others.tensors, *other_dense, losses[1]])
    assert len(losses) == 2


@EVERY_RULE
@ANY_DTYPE
def test_operators_pass_opcheck(rule, dtype):
    tables = [Table(rule, dtype=dtype), Table(rule, rows=4, dim=3, dtype=dtype)]
    batches = [(skewed_ids(6, 11), torch.randn(6, 5).to(dtype)), (skewed_ids(2, 4).int(), torch.randn(2, 3).to(dtype))]
    counts, padding_idx, seeds = [torch.ones(11), torch.ones(4)], [0, -1], [1, 2]
    given = operator_lists(tables, batches)
    log_decays = [[]] if rule in ("sgd", "momentum") else []
    numbers = {"sgd": [0.0], "momentum": [0.5], "adam": [0.9, 0.999, 1e-8]}.get(rule, [1e-10])
    one = torch.ones(1)
    for options in ((None, None, "decoupled", "skip", False), (one, one * 0, "mini_batch_aware", "error", True)):
        torch.library.opcheck(
            getattr(torch.ops.dien_ops, function_of(rule)),
            (*given, counts, padding_idx, seeds, *log_decays, *options, 0.1, 0.01, *numbers),
        )
    ids, grads = (list(x) for x in zip(*batches, strict=True))
    weights = [table.weight for table in tables]
    torch.library.opcheck(torch.ops.dien_ops.mba_check, (weights, ids, grads, counts, padding_idx, "error", True))
