# SPDX-License-Identifier: Apache-2.0
"""What the MBA optimizers refuse: the message names the parameter, and every bit of all tables is as it was."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from dien_ops import optim
from embedding_cases import bits
from optim_cases import EVERY_OPTIMIZER, OPTIMIZERS, batches, give_gradient, loss_of, make, states, table, train

NOBODY_WAITS = "nobody waits for the values there"


def two_tables(name: str):
    """An optimizer of two tables, both with a gradient, after two steps."""
    first, second = table(counts=torch.ones(9)), table(counts=torch.ones(9))
    optimizer = make(name, [{"params": first.parameters()}, {"params": second.parameters()}])
    for ids in batches(2):
        optimizer.zero_grad()
        (loss_of(first, ids) + loss_of(second, ids)).backward()
        optimizer.step()
    return first, second, optimizer


def zero_counts(second, optimizer):
    second.counts.zero_()


def dense_gradient(second, optimizer):
    second.weight.grad = torch.zeros(9, 3).double()


def nan_learning_rate(second, optimizer):
    optimizer.param_groups[1]["lr"] = float("nan")


def counts_of_another_table(second, optimizer):
    optimizer.param_groups[1]["counts"] = torch.ones(4)


def transposed_weight(second, optimizer):
    second.weight.data = second.weight.data.t().contiguous().t()


@EVERY_OPTIMIZER
@pytest.mark.parametrize(
    "spoil, message",
    [
        pytest.param(
            zero_counts,
            r"parameter 0 of group 1 \(shape \[9, 3\]\): counts must be positive for every id of the mini-batch, got 0",
            marks=pytest.mark.not_on_cuda(reason=NOBODY_WAITS),
        ),
        (
            dense_gradient,
            r"parameter 0 of group 1 .*grad must be of sparse rows.*: give dense parameters to an optimizer of torch.optim",
        ),
        (nan_learning_rate, "lr must be finite and >= 0, got nan"),
        (counts_of_another_table, r"counts must have shape \[9\]"),
        (transposed_weight, "weight must be contiguous"),
    ],
)
def test_an_error_of_one_table_leaves_every_bit_of_all(name, spoil, message):
    first, second, optimizer = two_tables(name)
    spoil(second, optimizer)
    before = bits([first.weight, second.weight, *states(optimizer)])
    with pytest.raises((RuntimeError, ValueError), match=message):
        optimizer.step()
    assert bits([first.weight, second.weight, *states(optimizer)]) == before


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "sgd"])  # which has no state
@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda value: value[:4], r"must have shape \[9"),
        (
            lambda value: value.float() if value.is_floating_point() else value,
            "must be torch.float64 for a weight of torch.float64, got torch.float32",
        ),
        (lambda value: torch.stack([value, value], -1)[..., 0], "must be contiguous: it is updated in place"),
    ],
    ids=["shape", "dtype", "strides"],
)
def test_state_that_does_not_fit_one_table_leaves_every_bit_of_all(name, spoil, message):
    first, second, optimizer = two_tables(name)
    state = optimizer.state[second.weight]
    state.update({key: spoil(value) for key, value in state.items()})
    before = bits([first.weight, second.weight, *states(optimizer)])
    with pytest.raises((RuntimeError, ValueError), match=message):
        optimizer.step()
    assert bits([first.weight, second.weight, *states(optimizer)]) == before


@pytest.mark.parametrize(
    "name, missing", [("adagrad", "sum"), ("adam", "exp_avg_sq"), ("adam", "step"), ("momentum", "momentum_buffer")]
)
def test_state_that_is_not_the_rules_leaves_every_bit_of_all(name, missing):
    first, second, optimizer = two_tables(name)
    saved = optimizer.state_dict()
    saved["state"][1]["other"] = saved["state"][1].pop(missing)
    optimizer.load_state_dict(saved)
    before = bits([first.weight, second.weight, *states(optimizer)])
    with pytest.raises(
        RuntimeError, match=rf"parameter 0 of group 1 \(shape \[9, 3\]\): the state must be .*{missing}.*, got .*other"
    ):
        optimizer.step()
    assert bits([first.weight, second.weight, *states(optimizer)]) == before


def test_incomplete_state_leaves_every_bit_of_all():
    first, second, optimizer = two_tables("adam")
    del optimizer.state[second.weight]["step"], optimizer.state[second.weight]["exp_avg_sq"]
    before = bits([first.weight, second.weight, *states(optimizer)])
    with pytest.raises(RuntimeError, match=r"must be exp_avg, exp_avg_sq, step, got exp_avg$"):
        optimizer.step()
    assert bits([first.weight, second.weight, *states(optimizer)]) == before


def test_state_that_is_no_tensor_is_refused():
    _, second, optimizer = two_tables("momentum")
    optimizer.state[second.weight]["momentum_buffer"] = None
    with pytest.raises(TypeError, match="momentum_buffer must be a Tensor, got NoneType"):
        optimizer.step()


@EVERY_OPTIMIZER
@pytest.mark.not_on_cuda(reason=NOBODY_WAITS)
@pytest.mark.parametrize("tables", [1, 2])
def test_a_step_that_fails_creates_no_state(name, tables):
    embeddings = [table(counts=torch.ones(9)) for _ in range(tables)]
    embeddings[-1].counts.zero_()
    optimizer = make(name, [e.weight for e in embeddings])
    sum(loss_of(e, torch.tensor([1, 2])) for e in embeddings).backward()
    with pytest.raises(RuntimeError, match="counts must be positive"):
        optimizer.step()
    assert len(optimizer.state) == 0


@EVERY_OPTIMIZER
@pytest.mark.not_on_cuda(reason=NOBODY_WAITS)
def test_a_step_that_fails_adds_nothing_to_the_state_that_is_there(name):
    """That of 16-bit tables holds the number of updates; what else an option calls for later is created by a step."""
    embedding = table(dtype=torch.bfloat16, counts=torch.ones(9))
    optimizer = make(name, embedding.parameters())
    train(optimizer, embedding, batches(1))
    if name in ("sgd", "momentum"):
        optimizer.state[embedding.weight].pop("momentum_buffer", None)
        optimizer.param_groups[0]["momentum"] = 0.9
    before = list(optimizer.state[embedding.weight])
    embedding.counts.zero_()
    with pytest.raises(RuntimeError, match="counts must be positive"):
        train(optimizer, embedding, batches(1))
    assert list(optimizer.state[embedding.weight]) == before
    assert optimizer.state[embedding.weight]["updates"] == 1


def test_an_error_of_the_device_is_blamed_on_no_parameter(monkeypatch):
    """A kernel that ran before may have caused it, and every call from then on raises it."""
    _, _, optimizer = two_tables("adam")

    def broken(*_):
        raise torch.AcceleratorError("device-side assert triggered")

    monkeypatch.setattr(optim.MBAAdam, "_check", broken)
    monkeypatch.setattr(optim.MBAAdam, "_operator", staticmethod(broken))
    with pytest.raises(torch.AcceleratorError, match=r"^device-side assert triggered"):
        optimizer.step()
    optimizer.param_groups.pop()
    with pytest.raises(torch.AcceleratorError, match=r"^device-side assert triggered"):
        optimizer.step()


@EVERY_OPTIMIZER
def test_a_gradient_that_is_part_of_its_weight_leaves_every_bit_of_all(name):
    first, second, optimizer = two_tables(name)
    second.weight.grad = torch.sparse_coo_tensor(
        torch.tensor([[1, 2]]), second.weight.detach()[3:5], (9, 3), check_invariants=True
    )
    before = bits([first.weight, second.weight, *states(optimizer)])
    with pytest.raises(RuntimeError, match="grad must not share memory with weight"):
        optimizer.step()
    assert bits([first.weight, second.weight, *states(optimizer)]) == before


@EVERY_OPTIMIZER
def test_a_state_dict_of_another_optimizer_is_refused(name):
    embedding = table()
    optimizer = make(name, embedding.parameters())
    group = dict(optimizer.param_groups[0])
    saved = torch.optim.SGD(embedding.parameters(), lr=0.5, weight_decay=0.1).state_dict()
    with pytest.raises(
        ValueError, match=r"parameter group 0 of the state_dict has no l2, counts.*of another optimizer"
    ):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups == [group]
    train(optimizer, embedding, batches(1))


def test_parameters_that_are_no_tables_are_refused_at_once():
    with pytest.raises(ValueError, match=r"MBASGD updates embedding tables .* got a parameter of shape \[5\]"):
        optim.MBASGD(nn.Linear(3, 5).parameters(), lr=0.1)
    optimizer = optim.MBASGD(table().parameters(), lr=0.1)
    with pytest.raises(ValueError, match="updates embedding tables"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
    assert len(optimizer.param_groups) == 1


def test_counts_that_are_not_the_tables_are_refused_at_once():
    with pytest.raises(RuntimeError, match=r"counts must have shape \[9\] \[num_embeddings\], got \[4\]"):
        optim.MBASGD(table().parameters(), lr=0.1, counts=torch.ones(4))


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("sgd", dict(lr=-0.1), "lr must be finite and >= 0, got -0.1"),
        ("sgd", dict(l2=-1.0), "l2 must be finite and >= 0, got -1.0"),
        ("sgd", dict(decay="l2"), "decay must be one of .*'lazy', got 'l2'"),
        ("adam", dict(decay="lazy"), "decay must be one of .*, got 'lazy'"),
        ("sgd", dict(nonfinite="ignore"), "nonfinite must be one of 'propagate', 'skip', 'error', got 'ignore'"),
        ("sgd", dict(seed=2**63), r"seed must be in -2\*\*63..2\*\*63-1"),
        ("sgd", dict(momentum=1.5), r"momentum must be in \[0, 1\), got 1.5"),
        ("adagrad", dict(eps=-1.0), "eps must be finite and >= 0, got -1.0"),
        (
            "rowwise_adagrad",
            dict(initial_accumulator_value=-1.0),
            "initial_accumulator_value must be finite and >= 0",
        ),
        ("adam", dict(betas=(1.0, 0.9)), r"betas\[0\] must be in \[0, 1\), got 1.0"),
        ("adam", dict(eps=float("nan")), "eps must be finite and >= 0, got nan"),
    ],
)
def test_options_out_of_range_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        make(name, table().parameters(), **options)


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("sgd", dict(lr=None), "lr must be a number, got NoneType"),
        ("sgd", dict(l2="0.1"), "l2 must be a number, got str"),
        ("sgd", dict(momentum=None), "momentum must be a number, got NoneType"),
        ("adagrad", dict(initial_accumulator_value=None), "initial_accumulator_value must be a number"),
        ("adam", dict(betas=0.9), "betas must be a pair of numbers, got float"),
        ("adam", dict(betas=(0.9, "0.9")), r"betas\[1\] must be a number, got str"),
        ("sgd", dict(check_ids=None), "check_ids must be a bool, got NoneType"),
        ("sgd", dict(seed=0.5), "seed must be an integer or None, got float"),
        ("adam", dict(eps=[]), "eps must be a number, got list"),
    ],
)
def test_options_that_are_no_numbers_are_refused(name, options, message):
    with pytest.raises(TypeError, match=message):
        make(name, table().parameters(), **options)


def give_bad_ids(weight, optimizer):
    weight.grad = torch.sparse_coo_tensor(
        torch.tensor([[0, 9]]), torch.ones(2, 3).double(), (9, 3), check_invariants=False, is_coalesced=False
    )


def give_nan(weight, optimizer):
    optimizer.param_groups[0]["nonfinite"] = "error"
    give_gradient(weight, torch.tensor([4, 7]), torch.tensor([[0.0] * 3, [0, 0, math.nan]]).double())


@EVERY_OPTIMIZER
@pytest.mark.not_on_cuda(reason=NOBODY_WAITS)
@pytest.mark.parametrize("first_step", [True, False])
@pytest.mark.parametrize(
    "spoil, message",
    [
        (give_bad_ids, "ids must be in 0..8, got 9 at position 1"),
        (give_nan, r"grad must be finite, got nan at .* column 2"),
    ],
)
def test_the_bad_one_of_several_tables_of_a_call_is_named(name, spoil, message, first_step):
    tables = [table() for _ in range(4)]
    optimizer = make(name, [{"params": [t.weight for t in tables[:3]]}, {"params": [tables[3].weight]}])
    for step in range(1 if first_step else 2):
        for t in tables:
            give_gradient(t.weight, torch.tensor([step, 1]), torch.randn(2, 3).double())
        if step == 0 and not first_step:
            optimizer.step()
    spoil(tables[1].weight, optimizer)
    before = bits([*(t.weight for t in tables), *states(optimizer)])
    with pytest.raises(RuntimeError, match=rf"^parameter 1 of group 0 \(shape \[9, 3\]\): {message}"):
        optimizer.step()
    assert bits([*(t.weight for t in tables), *states(optimizer)]) == before
    assert bool(optimizer.state) == (not first_step and name != "sgd")


@EVERY_OPTIMIZER
def test_ids_outside_are_left_out_where_they_are_not_checked(name):
    embedding = table()
    optimizer = make(name, embedding.parameters(), check_ids=False)
    before = embedding.weight.detach().clone()
    give_bad_ids(embedding.weight, optimizer)
    optimizer.step()
    assert torch.equal(embedding.weight[1:], before[1:]) and not torch.equal(embedding.weight[0], before[0])


@EVERY_OPTIMIZER
def test_a_table_with_a_bad_gradient_is_skipped_alone(name):
    tables = [table(), table()]
    optimizer = make(name, [t.weight for t in tables], nonfinite="skip")
    before = [t.weight.detach().clone() for t in tables]
    give_gradient(tables[0].weight, torch.tensor([1]), torch.full((1, 3), math.nan).double())
    give_gradient(tables[1].weight, torch.tensor([1]), torch.ones(1, 3).double())
    optimizer.step()
    assert torch.equal(tables[0].weight, before[0]) and not torch.equal(tables[1].weight, before[1])
