# SPDX-License-Identifier: Apache-2.0
"""What the sparse updates refuse: the message names it, and every bit of every table is as it was."""

from __future__ import annotations

import math

import pytest
import torch

from dien_ops import functional
from embedding_cases import EVERY_RULE, F64, Table, bits, call_operator, function_of, operator_lists
from helpers import here, run_python, with_threads

IDS, GRAD = torch.tensor([1, 2]), torch.zeros(2, 5, dtype=F64)
NAN = torch.tensor([[0.0, 0, 0, 0, 0], [0, math.nan, 0, 0, 0]], dtype=F64)
# Found in the values of a tensor: on a device nobody waits for them. One wrong value each: which of several is named is
# for the threads to decide.
VALUES = {
    "ids must be in 0..10, got 11 at position 1": dict(ids=torch.tensor([1, 11])),
    "ids must be in 0..10, got -1 at position 0": dict(ids=torch.tensor([-1, 2])),
    "counts must be positive for every id of the mini-batch, got 0 for id 2": dict(
        counts=torch.ones(11).index_fill(0, torch.tensor([2]), 0)
    ),
    "counts must be positive for every id of the mini-batch, got -3 for id 2": dict(
        counts=torch.ones(11, dtype=torch.int32).index_fill(0, torch.tensor([2]), -3)
    ),
    "counts must be positive for every id of the mini-batch, got nan for id 1": dict(
        counts=torch.ones(11).index_fill(0, torch.tensor([1]), math.nan)
    ),
    r"grad must be finite, got nan at position 1 \(id 2\), column 1": dict(grad=NAN, nonfinite="error"),
    r"grad must be finite, got -inf at position 0 \(id 1\), column 4": dict(
        grad=torch.tensor([[0, 0, 0, 0, -math.inf], [0.0] * 5], dtype=F64), nonfinite="error"
    ),
}  # fmt: skip
ARGUMENTS = {
    "ids must be int32 or int64": (ValueError, dict(ids=torch.tensor([1.0, 2.0]))),
    "ids must be a Tensor, got list": (TypeError, dict(ids=[1, 2])),
    "grad must be a Tensor, got NoneType": (TypeError, dict(grad=None)),
    "lr must be a number, got NoneType": (TypeError, dict(lr=None)),
    "l2 must be a number, got str": (TypeError, dict(l2="0.1")),
    "padding_idx must be an integer, got float": (TypeError, dict(padding_idx=1.0)),
    r"grad must have shape \[2, 5\] \[\*ids.shape, D\], got \[3, 5\]": (RuntimeError, dict(grad=torch.zeros(3, 5).double())),
    "grad must have the dtype of weight": (ValueError, dict(grad=torch.zeros(2, 5))),
    "grad must be of sparse rows.* got a dense matrix: give the ids": (RuntimeError, dict(ids=None)),
    r"counts must have shape \[11\] \[num_embeddings\], got \[3\]": (RuntimeError, dict(counts=torch.ones(3))),
    "counts must be int32, int64, float32 or float64, got torch.bool": (ValueError, dict(counts=torch.ones(11) > 0)),
    "padding_idx must be in -11..10, got 11": (ValueError, dict(padding_idx=11)),
    "lr must be finite and >= 0, got nan": (ValueError, dict(lr=math.nan)),
    "lr must be finite and >= 0, got -1.0": (ValueError, dict(lr=-1.0)),
    "l2 must be finite and >= 0, got inf": (ValueError, dict(l2=math.inf)),
    "decay must be one of 'mini_batch_aware', 'decoupled', 'difacto'.*, got 'l2'": (ValueError, dict(decay="l2")),
    "nonfinite must be one of 'propagate', 'skip', 'error', got None": (ValueError, dict(nonfinite=None)),
    "check_ids must be a bool, got int": (TypeError, dict(check_ids=1)),
    "seed must be an integer or None, got float": (TypeError, dict(seed=1.0)),
    "seed must be an integer or None, got bool": (TypeError, dict(seed=True)),
    r"seed must be in -2\*\*63..2\*\*63-1, got 9223372036854775808": (ValueError, dict(seed=2**63)),
    r"grad_scale must be one float32 number, got torch.float64 of shape \[\]": (
        ValueError, dict(grad_scale=torch.ones((), dtype=F64))),
    r"found_inf must be one float32 number, got torch.float32 of shape \[2\]": (ValueError, dict(found_inf=torch.ones(2))),
    "found_inf must be on the device of weight": (RuntimeError, dict(found_inf=torch.ones((), device="meta"))),
}  # fmt: skip


def used(rule: str) -> Table:
    """A table with state that is not zero."""
    table = Table(rule)
    for state in table.state.values():
        state.random_(1, 5)
    return table


def update(table: Table, arguments: dict) -> None:
    given = {"ids": IDS, "grad": GRAD, "lr": 0.1, **arguments}
    given = {name: here(value) for name, value in given.items()}
    getattr(functional, function_of(table.rule))(table.weight, **{**table.state, **given})


@EVERY_RULE
@pytest.mark.not_on_cuda(reason="nobody waits for the values there")
@pytest.mark.parametrize("message", VALUES)
def test_a_wrong_value_is_named_and_leaves_every_bit(rule, message):
    table = used(rule)
    before = bits(table.tensors)
    with pytest.raises(RuntimeError, match=message):
        update(table, VALUES[message])
    assert bits(table.tensors) == before


@pytest.mark.cpu_kernels
def test_of_several_wrong_values_the_first_is_named_whatever_the_threads():
    """Of counts, that of the smallest id."""
    table, n = Table("sgd"), 60_000
    ids, grad = torch.arange(n) % 11, torch.zeros(n, 5, dtype=F64)
    wrong = torch.arange(9000, n, 777)
    bad, counts = grad.index_fill(0, wrong, math.nan), torch.ones(11).index_fill(0, torch.tensor([3, 4, 9]), 0)
    for _ in range(5):
        with pytest.raises(RuntimeError, match=r"got 11 at position 9000$"):
            with_threads(3, lambda: table.update(functional, ids.index_fill(0, wrong, 11), grad))
        with pytest.raises(RuntimeError, match=r"got 0 for id 3$"):
            with_threads(3, lambda: table.update(functional, ids, grad, counts=counts))
        with pytest.raises(RuntimeError, match=r"got nan at position 9000 \(id 2\), column 0$"):
            with_threads(3, lambda: table.update(functional, ids, bad, nonfinite="error"))


@EVERY_RULE
@pytest.mark.parametrize("message", ARGUMENTS)
def test_a_wrong_argument_is_named_and_leaves_every_bit(rule, message):
    table = used(rule)
    before = bits(table.tensors)
    error, arguments = ARGUMENTS[message]
    with pytest.raises(error, match=message):
        update(table, arguments)
    assert bits(table.tensors) == before


DECAYED = torch.zeros(11, dtype=F64)
LAZY = dict(decay="lazy", decayed=DECAYED, log_decay=-1.0)


@pytest.mark.parametrize(
    "rule, arguments, error, message",
    [
        ("sgd", dict(momentum=0.9), ValueError, "momentum_buffer must be given where momentum is not 0"),
        ("momentum", dict(momentum=1.0), ValueError, r"momentum must be in \[0, 1\), got 1.0"),
        ("momentum", dict(momentum="0.9"), TypeError, "momentum must be a number, got str"),
        ("adagrad", dict(eps=-1.0), ValueError, "eps must be finite and >= 0, got -1.0"),
        ("adagrad", dict(eps=None), TypeError, "eps must be a number, got NoneType"),
        ("adagrad", dict(state_sum=None), TypeError, "state_sum must be a Tensor, got NoneType"),
        ("adagrad", dict(state_sum=DECAYED), RuntimeError, "state_sum must have shape"),
        ("adagrad", LAZY, TypeError, "unexpected keyword argument 'decayed'"),
        ("adagrad", dict(decay="lazy"), ValueError, "decay must be one of .*, got 'lazy'"),
        ("rowwise_adagrad", dict(state_sum=None), TypeError, "state_sum must be a Tensor, got NoneType"),
        ("rowwise_adagrad", dict(state_sum=torch.zeros(11)), ValueError, "state_sum must have the computing dtype"),
        ("adam", dict(betas=(0.9, 1.0)), ValueError, r"betas\[1\] must be in \[0, 1\), got 1.0"),
        ("adam", dict(betas=0.9), TypeError, "betas must be a pair of numbers, got float"),
        ("adam", dict(betas=(0.9,)), ValueError, "betas must be a pair of numbers, got 1 of them"),
        ("adam", dict(betas=(0.9, None)), TypeError, r"betas\[1\] must be a number, got NoneType"),
        ("adam", dict(exp_avg_sq=None), TypeError, "exp_avg_sq must be a Tensor, got NoneType"),
        ("adam", dict(step=None), TypeError, "step must be a Tensor, got NoneType"),
        ("adam", dict(step=torch.zeros(11)), ValueError, "step must be int64, got torch.float32"),
        ("sgd", dict(decay="lazy"), ValueError, 'decayed and log_decay must be given where decay is "lazy"'),
        ("sgd", LAZY | dict(decay="decoupled"), ValueError, "decayed and log_decay must be None .* got decay='decoupled'"),
        ("sgd", LAZY | dict(counts=torch.ones(11)), ValueError, 'counts must be None where decay is "lazy"'),
        ("momentum", LAZY | dict(momentum=0.5), ValueError, 'momentum must be 0 where decay is "lazy", got 0.5'),
        ("momentum", LAZY, ValueError, 'momentum_buffer must be None where decay is "lazy"'),
        ("sgd", LAZY | dict(decayed=torch.zeros(11)), ValueError, "decayed must be float64, got torch.float32"),
        ("sgd", LAZY | dict(decayed=DECAYED[:3]), RuntimeError, r"decayed must have shape \[11\]"),
        ("sgd", LAZY | dict(log_decay=0.5), ValueError, "log_decay must be finite and <= 0, got 0.5"),
        ("sgd", LAZY | dict(log_decay="0"), TypeError, "log_decay must be a number, got str"),
    ],
)  # fmt: skip
def test_each_rules_own_arguments_are_checked(rule, arguments, error, message):
    table = used(rule)
    before = bits(table.tensors)
    with pytest.raises(error, match=message):
        update(table, arguments)
    assert bits(table.tensors) == before


@pytest.mark.parametrize(
    "weight, error, message",
    [
        (torch.zeros(5, 11).double().t(), RuntimeError, "weight must be contiguous: it is updated in place"),
        (torch.zeros(5).double(), ValueError, "weight must be 2-D, got 1-D"),
        (torch.zeros(11, 5).int(), ValueError, "weight must be float32, float64, bfloat16 or float16, got int32"),
    ],
)
def test_weights_that_cannot_be_updated_are_refused(weight, error, message):
    with pytest.raises(error, match=message):
        functional.mba_sgd_(here(weight), here(IDS), here(GRAD), lr=0.1)


def test_a_sparse_gradient_must_be_one_of_rows():
    weight = torch.zeros(3, 2)
    entries = torch.ones(3, 2).to_sparse()
    with pytest.raises(RuntimeError, match=r"grad must be of sparse rows.* got a sparse matrix"):
        functional.mba_sgd_(weight, None, entries, lr=0.1)
    rows = torch.ones(4, 2).to_sparse(1)
    with pytest.raises(RuntimeError, match=r"grad must have shape \[3, 2\] \[num_embeddings, D\], got \[4, 2\]"):
        functional.mba_sgd_(weight, None, rows, lr=0.1)


@EVERY_RULE
def test_a_gradient_that_is_part_of_what_is_updated_is_refused_where_it_is_not_copied(rule):
    table = Table(rule)
    for name, written in {"weight": table.weight, **table.state}.items():
        if written.dim() == 2:
            before = bits(table.tensors)
            with pytest.raises(RuntimeError, match=f"grad must not share memory with {name}"):
                table.update(functional, here(IDS), written[2:4])
            assert bits(table.tensors) == before
            for strided in (written[2:4, :1].expand(2, 5), written.t()[:2, :5]):
                expected = bits(table.copy().update(functional, here(IDS), strided.clone()))
                assert bits(table.update(functional, here(IDS), strided)) == expected


def test_a_gradient_beside_the_weight_is_accepted():
    memory = torch.randn(13, 5, dtype=F64)
    for weight, grad in [(memory[:11], memory[11:]), (memory[2:], memory[:2])]:
        functional.mba_sgd_(weight, here(IDS), grad, lr=0.1)


# ------------------------------------------------------------------------------------------------ several tables

BAD = {
    "table 2: ids must be in 0..6, got 7 at position 1": dict(ids=torch.tensor([0, 7])),
    "table 2: counts must be positive for every id of the mini-batch, got 0 for id 3": dict(ids=torch.tensor([0, 3])),
    r"table 2: grad must be finite, got inf at position 1 \(id 1\), column 0": dict(
        ids=torch.tensor([0, 1]), grad=torch.tensor([[0.0] * 4, [math.inf, 0, 0, 0]]).double()
    ),
}


def three_tables(rule: str) -> tuple[list[Table], list[tuple], list[torch.Tensor]]:
    shapes = ((11, 5), (30, 1), (7, 4))
    tables = [Table(rule, *shape) for shape in shapes]
    batches = [(torch.randint(rows, (9,)), torch.randn(9, dim, dtype=F64)) for rows, dim in shapes]
    counts = [torch.ones(rows) for rows, _ in shapes]
    counts[2][3] = 0
    return tables, batches, counts


@EVERY_RULE
@pytest.mark.not_on_cuda(reason="nobody waits for the values there")
@pytest.mark.parametrize("message", BAD)
def test_a_bad_last_table_is_named_and_leaves_every_bit_of_all(rule, message):
    tables, batches, counts = three_tables(rule)
    bad = {"grad": torch.randn(2, 4, dtype=F64), **BAD[message]}
    batches[2] = bad["ids"], bad["grad"]
    before = [bits(table.tensors) for table in tables]
    with pytest.raises(RuntimeError, match=message):
        call_operator(tables, batches, counts=counts, nonfinite="error")
    assert [bits(table.tensors) for table in tables] == before
    with pytest.raises(RuntimeError, match=message):
        weights = [table.weight for table in tables]
        ids, grads = (list(x) for x in zip(*batches, strict=True))
        torch.ops.dien_ops.mba_check(weights, ids, grads, counts, [-1] * 3, "error", True)


@EVERY_RULE
def test_lists_that_do_not_fit_each_other_are_refused(rule):
    tables, batches, counts = three_tables(rule)
    before = [bits(table.tensors) for table in tables]
    for options, message in (
        (dict(counts=counts[:2]), "counts must have one entry of each of the 3 weights, got 2"),
        (dict(padding_idx=[-1]), "padding_idx must have one entry of each of the 3 weights, got 1"),
        (dict(seeds=[1, 2]), "seeds must have one entry of each of the 3 weights, got 2"),
        (dict(padding_idx=[-1, -1, 7]), "table 2: padding_idx must be in -1..6, got 7"),
        (dict(decay="difacto"), "decay must be mini_batch_aware, decoupled or lazy, got difacto"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call_operator(tables, batches, **options)
    if tables[0].state:
        lists = operator_lists(tables, batches)
        lists[1] = lists[1][:2]
        log_decays = [[]] if rule == "momentum" else []
        numbers = {"momentum": [0.9], "adam": [0.9, 0.999, 1e-8]}.get(rule, [1e-10])
        with pytest.raises(RuntimeError, match="must have one tensor of each of the 3 weights, got 2"):
            getattr(torch.ops.dien_ops, function_of(rule))(
                *lists, [], [-1] * 3, [], *log_decays, None, None, "decoupled", "skip", True, 0.1, 0.3, *numbers
            )
    assert [bits(table.tensors) for table in tables] == before


def test_two_tables_that_share_memory_are_refused():
    memory = Table("sgd")
    view = Table("sgd")
    view.weight = memory.weight
    batch = (here(IDS), here(GRAD))
    with pytest.raises(RuntimeError, match="table 1: weight must not share memory with that of table 0"):
        call_operator([memory, view], [batch, batch])


@EVERY_RULE
def test_states_that_two_tables_share_are_refused(rule):
    for name in Table(rule).state:
        tables = [Table(rule), Table(rule)]
        tables[1].state[name] = tables[0].state[name]
        before = [bits(table.tensors) for table in tables]
        with pytest.raises(RuntimeError, match=f"table 1: {name} must not share memory with that of table 0"):
            call_operator(tables, [(here(IDS), here(GRAD))] * 2)
        assert [bits(table.tensors) for table in tables] == before


def test_a_gradient_that_is_part_of_another_table_is_refused():
    tables = [Table("sgd"), Table("sgd")]
    for written, read in ((0, 1), (1, 0)):
        grads = [here(GRAD), here(GRAD)]
        grads[read] = tables[written].weight[2:4]
        with pytest.raises(RuntimeError, match=f"table {written}: grad must not share memory with weight"):
            call_operator(tables, [(here(IDS), grad) for grad in grads])


def test_states_that_are_not_contiguous_are_refused():
    for rule in ("momentum", "adagrad", "adam"):
        table = Table(rule)
        name = next(iter(table.state))
        table.state[name] = table.state[name].t().contiguous().t()
        with pytest.raises(RuntimeError, match=f"{name} must be contiguous: it is updated in place"):
            table.update(functional, here(IDS), here(GRAD))


@pytest.mark.parametrize(
    "momentum_buffers, decayed, counts, log_decays, decay, message",
    [
        (0, 0, 0, 1, "lazy", "decayed must be given with decay=lazy, and only with it"),
        (0, 1, 0, 0, "lazy", "log_decays must be given with decay=lazy, and only with it"),
        (0, 1, 0, 0, "decoupled", "decayed must be given with decay=lazy, and only with it"),
        (0, 0, 0, 1, "decoupled", "log_decays must be given with decay=lazy, and only with it"),
        (0, 1, 1, 1, "lazy", "decay=lazy takes no counts"),
        (1, 1, 0, 1, "lazy", "decay=lazy takes no momentum"),
    ],
)
def test_the_operator_checks_what_goes_with_lazy_decay(momentum_buffers, decayed, counts, log_decays, decay, message):
    weight = torch.zeros(11, 5, dtype=F64)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.dien_ops.mba_sgd_(
            [weight], [weight.clone()] * momentum_buffers, [torch.zeros(11, dtype=F64)] * decayed, [here(IDS)],
            [here(GRAD)], [torch.ones(11)] * counts, [-1], [], [-0.5] * log_decays, None, None, decay, "propagate",
            True, 0.1, 0.1, 0.0,
        )  # fmt: skip


@pytest.mark.parametrize("argument", ["grad_scale", "found_inf"])
@pytest.mark.parametrize(
    "value, message",
    [
        (torch.ones(2), r"must have one element, got shape \[2\]"),
        (torch.ones(1, dtype=F64), "must be float32"),
    ],
)
def test_the_operator_checks_what_a_scaler_gives(argument, value, message):
    table = Table("sgd")
    with pytest.raises(RuntimeError, match=f"{argument} {message}"):
        call_operator([table], [(here(IDS), here(GRAD))], **{argument: here(value)})


def test_more_rows_and_ids_than_a_key_can_number_are_refused():
    """Rows without columns take no memory."""
    weight = torch.zeros(2**62, 0)
    with pytest.raises(
        RuntimeError, match=r"must not have more than 2\^64 rows times ids, got 46116860184273879\d\d and 5"
    ):
        functional.mba_sgd_(weight, torch.zeros(5, dtype=torch.int64), torch.zeros(5, 0), lr=0.1)


def test_momentum_needs_its_buffer():
    weight, options = torch.zeros(11, 5, dtype=F64), (None, None, "mini_batch_aware", "propagate", True)
    with pytest.raises(
        RuntimeError, match=r"momentum_buffers? must be given where momentum is not 0, got momentum=0.9"
    ):
        torch.ops.dien_ops.mba_sgd_(
            [weight], [], [], [here(IDS)], [here(GRAD)], [], [-1], [], [], *options, 0.1, 0.01, 0.9
        )


# ------------------------------------------------------------------------------------------------ on a device only


@pytest.mark.parametrize(
    "call, message",
    [
        ("ids=torch.tensor([1, 11]), grad=grad", "ids must be in 0..10, got 11 at position 1"),
        ("ids=ids, grad=grad, counts=torch.zeros(11)", "counts must be positive for every id of the mini-batch, got 0"),
        ("ids=ids, grad=grad / 0, nonfinite='error'", "grad must be finite"),
    ],
)
def test_a_wrong_value_is_named_before_the_context_is_lost(on_device, call, message):
    code = f"""
import torch
from dien_ops import functional
torch.set_default_device("cuda")
weight, ids, grad = torch.zeros(11, 5), torch.tensor([1, 2]), torch.ones(2, 5)
functional.mba_sgd_(weight, {call}, lr=0.1)
torch.cuda.synchronize()
"""
    done = run_python(code)
    assert message in done.stdout and "device-side assert" in done.stderr
