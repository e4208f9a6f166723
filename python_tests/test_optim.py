# SPDX-License-Identifier: Apache-2.0
"""The MBA optimizers: torch.optim where they coincide, where n_j comes from, and what every Optimizer does. Against dense
brute force: test_embedding_decay.py."""

from __future__ import annotations

import copy
import io
import pickle
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from dien_ops import optim
from embedding_cases import ANY_DTYPE, bits
from optim_cases import EVERY_OPTIMIZER, batches, loss_of, make, states, table, train

TORCHS = {  # optimizer, ours, whether it takes sparse gradients, whether it treats absent rows as ours does
    "SGD": (partial(torch.optim.SGD, lr=0.1), "sgd", True, True),
    "SGD with momentum": (partial(torch.optim.SGD, lr=0.1, momentum=0.9), "momentum", False, False),
    "Adagrad": (partial(torch.optim.Adagrad, lr=0.1, initial_accumulator_value=0.1), "adagrad", True, True),
    "Adam": (partial(torch.optim.Adam, lr=0.1, betas=(0.8, 0.99), eps=1e-30), "adam", False, False),
    "SparseAdam": (
        partial(torch.optim.SparseAdam, lr=0.1, betas=(0.8, 0.99), eps=1e-30),
        "adam",
        True,
        False,
    ),
}


@pytest.mark.parametrize("torchs", TORCHS)
def test_without_decay_it_is_torchs_optimizer(torchs):
    """Where torch treats absent rows otherwise, every batch holds every row. SparseAdam adds eps earlier."""
    make_torchs, name, sparse, absent_rows_alike = TORCHS[torchs]
    ours = table()
    theirs = nn.Embedding.from_pretrained(ours.weight.detach().clone(), freeze=False, sparse=sparse)
    data = batches() if absent_rows_alike else [torch.cat([b.flatten(), torch.arange(9)]) for b in batches()]
    options = {"eps": 1e-30} if name == "adam" else {}
    train(make(name, ours.parameters(), l2=0.0, **options), ours, data)
    with torch.sparse.check_sparse_tensor_invariants(enable=False):  # which Adagrad would warn of
        train(make_torchs(theirs.parameters()), theirs, data)
    torch.testing.assert_close(ours.weight, theirs.weight, rtol=1e-11, atol=1e-11)


@EVERY_OPTIMIZER
def test_rows_that_were_never_looked_up_keep_their_bits(name):
    embedding = table()
    before = embedding.weight.detach().clone()
    train(make(name, embedding.parameters()), embedding, batches(rows=6))
    assert bits([embedding.weight[6:]]) == bits([before[6:]])


@EVERY_OPTIMIZER
def test_the_padding_row_stays_zero(name):
    embedding = table(padding_idx=0)
    optimizer = make(name, embedding.parameters(), l2=1.0)
    train(optimizer, embedding, batches())
    assert not embedding.weight[0].any()
    embedding.weight.grad = torch.sparse_coo_tensor(
        torch.tensor([[0, 1]]), torch.ones(2, 3).double(), (9, 3), check_invariants=True
    )
    optimizer.step()  # a gradient that torch's embedding would not have given
    assert not embedding.weight[0].any()


# --------------------------------------------------------------------------------------- where n_j comes from


def decay_of(embedding: nn.Module, optimizer) -> Tensor:
    """l2 / n_j as one step of MBASGD with lr = 1 and no other gradient shows it."""
    before = embedding.weight.detach().clone()
    optimizer.zero_grad()
    (embedding(torch.arange(embedding.num_embeddings)) * 0).sum().backward()
    optimizer.step()
    return (1 - embedding.weight.detach() / before)[:, 0]


COUNTS = [1, 2, 4, 5]


def counts() -> Tensor:
    return torch.tensor(COUNTS)


def decay() -> Tensor:
    return 0.1 / counts().double()


def test_counts_are_those_of_the_table_that_owns_the_weight():
    embedding = table(4)
    optimizer = optim.MBASGD(embedding.parameters(), lr=1.0, l2=0.1)
    torch.testing.assert_close(decay_of(embedding, optimizer), torch.full((4,), 0.1).double())
    embedding.counts = counts()
    torch.testing.assert_close(decay_of(embedding, optimizer), decay())
    embedding.count_(torch.tensor([0]))
    torch.testing.assert_close(decay_of(embedding, optimizer)[0], torch.tensor(0.05).double())


def test_counts_of_the_group_come_first():
    embedding = table(4, counts=torch.full((4,), 100))
    optimizer = optim.MBASGD([{"params": embedding.parameters(), "counts": counts()}], lr=1.0, l2=0.1)
    torch.testing.assert_close(decay_of(embedding, optimizer), decay())


def test_any_sparse_embedding_can_have_counts():
    embedding = nn.Embedding(4, 3, sparse=True, dtype=torch.float64)
    optimizer = optim.MBASGD(embedding.parameters(), lr=1.0, l2=0.1, counts=counts())
    torch.testing.assert_close(decay_of(embedding, optimizer), decay())


def test_counts_are_found_after_copies_and_loads():
    embedding = table(4, counts=counts())
    optimizer = optim.MBASGD(embedding.parameters(), lr=1.0, l2=0.1)
    model_and_optimizer = copy.deepcopy((embedding, optimizer))
    torch.testing.assert_close(decay_of(*model_and_optimizer), decay())
    fresh = table(4)
    its_optimizer = optim.MBASGD(fresh.parameters(), lr=1.0, l2=0.1)
    fresh.load_state_dict(embedding.state_dict())
    torch.testing.assert_close(decay_of(fresh, its_optimizer), decay())


def test_tables_that_share_a_weight_share_their_counts():
    first, second = table(4, counts=counts()), table(4)
    second.weight = first.weight
    optimizer = optim.MBASGD(second.parameters(), lr=1.0, l2=0.1)
    torch.testing.assert_close(decay_of(second, optimizer), decay())
    second.counts = first.counts
    torch.testing.assert_close(decay_of(second, optimizer), decay())
    second.counts = counts() + 1
    with pytest.raises(RuntimeError, match=r"2 MBAEmbeddings share a weight .* pass the optimizer the counts to use"):
        decay_of(second, optimizer)
    optimizer.param_groups[0]["counts"] = counts()
    torch.testing.assert_close(decay_of(second, optimizer), decay())


def test_a_row_that_is_padding_to_some_of_the_tables_that_share_it_is_data():
    first, second = table(4, padding_idx=1), table(4)
    second.weight = first.weight
    with torch.no_grad():
        first.weight.fill_(1.0)
    before = first.weight.detach().clone()
    decay_of(second, optim.MBASGD(second.parameters(), lr=1.0, l2=0.1))
    torch.testing.assert_close(first.weight.detach(), before * 0.9)
    second.padding_idx = 1
    decay_of(second, optim.MBASGD(second.parameters(), lr=1.0, l2=0.1))
    torch.testing.assert_close(first.weight.detach()[:3, 0], torch.tensor([0.81, 0.9, 0.81]).double())


# ------------------------------------------------------------------------------------- what an Optimizer does


@EVERY_OPTIMIZER
@ANY_DTYPE
@pytest.mark.parametrize("through_file", [False, True], ids=["memory", "file"])
def test_a_loaded_state_goes_on_with_the_same_bits(name, through_file, dtype):
    """16-bit tables too: their float32 state loses nothing, and the noise goes on."""
    embedding, data = table(dtype=dtype, counts=torch.randint(1, 5, (9,))), batches()
    optimizer = make(name, embedding.parameters())
    train(optimizer, embedding, data[:6])
    saved = copy.deepcopy({"model": embedding.state_dict(), "optimizer": optimizer.state_dict()})
    if through_file:
        file = io.BytesIO()
        torch.save(saved, file)
        file.seek(0)
        saved = torch.load(file)
    train(optimizer, embedding, data[6:])

    resumed = table(dtype=dtype)
    its_optimizer = make(name, resumed.parameters(), lr=123.0)
    resumed.load_state_dict(saved["model"])
    its_optimizer.load_state_dict(saved["optimizer"])
    train(its_optimizer, resumed, data[6:])
    assert bits([resumed.weight, *states(its_optimizer)]) == bits([embedding.weight, *states(optimizer)])
    assert [s.dtype for s in states(its_optimizer)] == [s.dtype for s in states(optimizer)]


@EVERY_OPTIMIZER
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_a_copied_optimizer_loads_a_state(name, copied):
    embedding = table()
    optimizer = make(name, embedding.parameters())
    train(optimizer, embedding, batches(1))
    other = copied(optimizer)
    train(optimizer, embedding, batches(1))
    other.load_state_dict(optimizer.state_dict())
    assert bits(states(other)) == bits(states(optimizer))


@EVERY_OPTIMIZER
def test_schedulers_and_tensor_learning_rates_are_obeyed(name):
    by_scheduler, by_hand = table(), table()
    by_hand.load_state_dict(by_scheduler.state_dict())
    optimizer = make(name, by_scheduler.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    other = make(name, by_hand.parameters(), lr=torch.tensor(0.1, dtype=torch.float64))
    for i, ids in enumerate(batches(3)):
        train(optimizer, by_scheduler, [ids])
        scheduler.step()
        other.param_groups[0]["lr"] = torch.tensor(0.1 * 0.5**i, dtype=torch.float64)
        train(other, by_hand, [ids])
    torch.testing.assert_close(by_scheduler.weight, by_hand.weight)


def test_a_closure_is_evaluated_with_gradients_and_its_loss_returned():
    embedding = table()
    optimizer = optim.MBASGD(embedding.parameters(), lr=0.1)
    before = embedding.weight.detach().clone()

    def closure():
        optimizer.zero_grad()
        loss = loss_of(embedding, torch.tensor([1, 2]))
        loss.backward()
        return loss

    assert isinstance(optimizer.step(closure), Tensor)
    assert not torch.equal(embedding.weight[1], before[1])
    assert optimizer.step() is None


def test_groups_have_their_own_options():
    first, second = table(4), table(6)
    optimizer = optim.MBASGD(first.parameters(), lr=1.0, l2=0.1)
    optimizer.add_param_group({"params": second.parameters(), "l2": 0.3, "counts": torch.full((6,), 3)})
    assert [g["l2"] for g in optimizer.param_groups] == [0.1, 0.3]
    torch.testing.assert_close(decay_of(first, optimizer), torch.full((4,), 0.1).double())
    torch.testing.assert_close(decay_of(second, optimizer), torch.full((6,), 0.1).double())


def test_parameters_without_a_gradient_are_left_alone():
    used, unused = table(), table()
    before = unused.weight.detach().clone()
    train(optim.MBAAdam([*used.parameters(), *unused.parameters()], lr=1e-3), used, batches(2))
    assert bits([unused.weight]) == bits([before])


@EVERY_OPTIMIZER
def test_one_lookup_per_field_is_one_update_per_row(name):
    """A table shared by target and history: its gradients are added by autograd, and a row decays once."""
    together, apart = table(), table()
    apart.load_state_dict(together.state_dict())
    target, history = torch.tensor([1, 2]), torch.tensor([[2, 2], [3, 1]])
    for embedding, fields in [
        (together, [torch.cat([target, history.flatten()])]),
        (apart, [target, history]),
    ]:
        optimizer = make(name, embedding.parameters())
        for _ in range(2):
            optimizer.zero_grad()
            sum(embedding(ids).square().sum() for ids in fields).backward()
            optimizer.step()
    torch.testing.assert_close(together.weight, apart.weight, rtol=1e-12, atol=1e-12)


@EVERY_OPTIMIZER
def test_tables_of_a_group_are_updated_by_one_call(name, monkeypatch):
    """Those of one dtype and device, with counts or without: here two calls for five tables, and one check before."""
    tables = [table(9 + i, counts=torch.ones(9 + i) if i > 2 else None) for i in range(5)]
    optimizer, calls = make(name, [t.weight for t in tables]), []
    operator = type(optimizer)._operator
    monkeypatch.setattr(type(optimizer), "_operator", staticmethod(lambda *a: calls.append(len(a[0])) or operator(*a)))
    for _ in range(2):
        sum(loss_of(t, torch.tensor([1, 2])) for t in tables).backward()
        optimizer.step()
    assert calls == [3, 2, 3, 2]


@EVERY_OPTIMIZER
def test_a_group_may_hold_tables_of_several_dtypes(name):
    dtypes = (torch.float64, torch.bfloat16, torch.float32, torch.bfloat16)
    together = [table(dtype=dtype) for dtype in dtypes]
    apart = copy.deepcopy(together)
    ids = torch.tensor([1, 2, 1])
    for tables, groups in ((together, [together]), (apart, [[t] for t in apart])):
        optimizer = make(name, [{"params": [t.weight for t in group]} for group in groups])
        for _ in range(2):
            optimizer.zero_grad()
            for t in tables:
                loss_of(t, ids).backward()
            optimizer.step()
    assert bits(t.weight for t in together) == bits(t.weight for t in apart)


@EVERY_OPTIMIZER
def test_several_tables_are_as_many_optimizers(name):
    together, apart = [[table(9 + i, 3 + i) for i in range(4)] for _ in range(2)]
    for one, other in zip(together, apart, strict=True):
        other.load_state_dict(one.state_dict())
    optimizers = [make(name, [t.weight for t in together]), *(make(name, t.parameters()) for t in apart)]
    for ids in batches(5):
        for tables in (together, apart):
            sum(loss_of(t, ids) for t in tables).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert bits(t.weight for t in together) == bits(t.weight for t in apart)


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_a_state_of_wider_numbers_is_narrowed_when_it_is_loaded(name):
    """As by torch's optimizers: a float64 checkpoint goes on in float32."""
    wide, narrow = table(), table(dtype=torch.float32)
    optimizers = [make(name, t.parameters()) for t in (wide, narrow)]
    train(optimizers[0], wide, batches(2))
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    train(optimizers[1], narrow, batches(1))
    assert all(x.dtype in (torch.float32, torch.int64) for x in states(optimizers[1]))


def test_a_hook_sees_the_state_that_is_loaded_as_it_is():
    embedding = table()
    optimizer = make("adam", embedding.parameters())
    train(optimizer, embedding, batches(2))
    seen = []
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.register_load_state_dict_pre_hook(lambda _, loaded: seen.append(loaded["state"][0]["exp_avg"]))
    optimizer.load_state_dict(optimizer.state_dict())
    assert torch.equal(seen[0], optimizer.state[embedding.weight]["exp_avg"])


@EVERY_OPTIMIZER
def test_autograd_sees_what_a_step_writes(name):
    """So a backward that needs the old values raises instead of using the new ones."""
    embedding = table()
    optimizer = make(name, embedding.parameters())
    train(optimizer, embedding, batches(1))
    written = [embedding.weight, *states(optimizer)]
    before = [x._version for x in written]
    loss = embedding.weight.square().sum()
    train(optimizer, embedding, batches(1))
    assert all(x._version > version for x, version in zip(written, before, strict=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_what_a_state_holds_beside_the_parameters_is_loaded_as_it_is():
    """As by torch's optimizers."""
    embedding = table()
    optimizer = make("adam", embedding.parameters())
    train(optimizer, embedding, batches(1))
    saved = optimizer.state_dict()
    saved["state"]["note"] = {"loss": torch.ones(2, dtype=torch.float16)}
    optimizer.load_state_dict(saved)
    assert optimizer.state["note"]["loss"].dtype == torch.float16
    train(optimizer, embedding, batches(1))


def test_momentum_that_begins_later_starts_from_zero():
    embedding = table()
    optimizer = make("sgd", embedding.parameters())
    train(optimizer, embedding, batches(1))
    assert not states(optimizer)
    optimizer.param_groups[0]["momentum"] = 0.9
    train(optimizer, embedding, batches(1))
    assert list(optimizer.state[embedding.weight]) == ["momentum_buffer"]
