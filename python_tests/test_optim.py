# SPDX-License-Identifier: Apache-2.0
"""The MBA optimizers: against dense brute force, torch.optim where they coincide, and as Optimizers."""

from __future__ import annotations

import copy
import io
import pickle
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import dien_ops
from dien_ops import optim

OPTIMIZERS = {
    "sgd": (optim.MBASGD, dict(lr=0.1)),
    "momentum": (optim.MBASGD, dict(lr=0.1, momentum=0.9)),
    "adagrad": (optim.MBAAdagrad, dict(lr=0.1, initial_accumulator_value=0.1)),
    "rowwise_adagrad": (optim.MBARowwiseAdagrad, dict(lr=0.1)),
    "adam": (optim.MBAAdam, dict(lr=0.1, betas=(0.8, 0.99))),
}
EVERY_OPTIMIZER = pytest.mark.parametrize("name", OPTIMIZERS)


def make(name: str, params, **options):
    cls, defaults = OPTIMIZERS[name]
    return cls(params, **{**defaults, **options})


def table(rows: int = 9, dim: int = 3, dtype: torch.dtype = torch.float64, **options) -> dien_ops.MBAEmbedding:
    return dien_ops.MBAEmbedding(rows, dim, dtype=dtype, **options)


def loss_of(embedding: nn.Module, ids: Tensor) -> Tensor:
    rows = embedding(ids)
    scale = torch.arange(1, rows.numel() + 1, dtype=rows.dtype).view(rows.shape)
    return (rows * scale.sin()).sum() + rows.square().sum()


def train(optimizer, embedding: nn.Module, batches: list[Tensor]) -> None:
    for ids in batches:
        optimizer.zero_grad()
        loss_of(embedding, ids).backward()
        optimizer.step()


def batches(count: int = 12, rows: int = 9) -> list[Tensor]:
    return [torch.randint(rows, (2, 3)) for _ in range(count)]


def bits(*tensors: Tensor) -> list[bytes]:
    return [t.detach().numpy().tobytes() for t in tensors]


def states(optimizer) -> list[Tensor]:
    return [value for state in optimizer.state.values() for value in state.values()]


class BruteForce:
    """The update of a dense table, one row at a time, straight from the paper and the rules' definitions."""

    def __init__(self, name: str, weight: Tensor, l2: float, counts: Tensor | None) -> None:
        self.name, self.weight, self.l2 = name, weight.detach().clone(), l2
        self.counts = counts.double() if counts is not None else torch.ones(weight.shape[0]).double()
        self.first = torch.full_like(self.weight, 0.1) if name == "adagrad" else torch.zeros_like(self.weight)
        self.second = torch.zeros_like(self.weight)
        self.steps = [0] * weight.shape[0]

    def step(self, ids: Tensor, gradient: Tensor) -> None:
        for j in set(ids.flatten().tolist()):
            w = self.weight[j]
            g = gradient[j] + self.l2 / self.counts[j] * w
            self.steps[j] += 1
            if self.name == "sgd":
                move = g
            elif self.name == "momentum":
                self.first[j] = move = 0.9 * self.first[j] + g
            elif self.name == "adagrad":
                self.first[j] += g**2
                move = g / (self.first[j].sqrt() + 1e-10)
            elif self.name == "rowwise_adagrad":
                self.first[j] += (g**2).mean()
                move = g / (self.first[j].sqrt() + 1e-10)
            else:
                self.first[j] = 0.8 * self.first[j] + 0.2 * g
                self.second[j] = 0.99 * self.second[j] + 0.01 * g**2
                corrected = self.second[j] / (1 - 0.99 ** self.steps[j])
                move = self.first[j] / (1 - 0.8 ** self.steps[j]) / (corrected.sqrt() + 1e-8)
            self.weight[j] = w - 0.1 * move


@EVERY_OPTIMIZER
@pytest.mark.parametrize("counted", [False, True], ids=["n=1", "counts"])
def test_many_steps_are_the_dense_brute_force(name, counted):
    counts = torch.randint(1, 20, (9,)) if counted else None
    embedding = table(counts=counts)
    dense = BruteForce(name, embedding.weight, 0.5, counts)
    optimizer = make(name, embedding.parameters(), l2=0.5)
    for ids in batches(30):
        optimizer.zero_grad()
        rows = dense.weight.clone().requires_grad_()
        loss_of(lambda i, rows=rows: rows[i], ids).backward()
        loss_of(embedding, ids).backward()
        dense.step(ids, rows.grad)
        optimizer.step()
    torch.testing.assert_close(embedding.weight.detach(), dense.weight, rtol=1e-11, atol=1e-11)


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
    assert bits(embedding.weight[6:]) == bits(before[6:])


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


COUNTS = torch.tensor([1, 2, 4, 5])
DECAY = 0.1 / COUNTS.double()


def test_counts_are_those_of_the_table_that_owns_the_weight():
    embedding = table(4)
    optimizer = optim.MBASGD(embedding.parameters(), lr=1.0, l2=0.1)
    torch.testing.assert_close(decay_of(embedding, optimizer), torch.full((4,), 0.1).double())
    embedding.counts = COUNTS.clone()
    torch.testing.assert_close(decay_of(embedding, optimizer), DECAY)
    embedding.count_(torch.tensor([0]))
    torch.testing.assert_close(decay_of(embedding, optimizer)[0], torch.tensor(0.05).double())


def test_counts_of_the_group_come_first():
    embedding = table(4, counts=torch.full((4,), 100))
    optimizer = optim.MBASGD([{"params": embedding.parameters(), "counts": COUNTS}], lr=1.0, l2=0.1)
    torch.testing.assert_close(decay_of(embedding, optimizer), DECAY)


def test_any_sparse_embedding_can_have_counts():
    embedding = nn.Embedding(4, 3, sparse=True, dtype=torch.float64)
    optimizer = optim.MBASGD(embedding.parameters(), lr=1.0, l2=0.1, counts=COUNTS)
    torch.testing.assert_close(decay_of(embedding, optimizer), DECAY)


def test_counts_are_found_after_copies_and_loads():
    embedding = table(4, counts=COUNTS)
    optimizer = optim.MBASGD(embedding.parameters(), lr=1.0, l2=0.1)
    model_and_optimizer = copy.deepcopy((embedding, optimizer))
    torch.testing.assert_close(decay_of(*model_and_optimizer), DECAY)
    fresh = table(4)
    its_optimizer = optim.MBASGD(fresh.parameters(), lr=1.0, l2=0.1)
    fresh.load_state_dict(embedding.state_dict())
    torch.testing.assert_close(decay_of(fresh, its_optimizer), DECAY)


def test_tables_that_share_a_weight_share_their_counts():
    first, second = table(4, counts=COUNTS), table(4)
    second.weight = first.weight
    optimizer = optim.MBASGD(second.parameters(), lr=1.0, l2=0.1)
    torch.testing.assert_close(decay_of(second, optimizer), DECAY)
    second.counts = COUNTS + 1
    with pytest.raises(RuntimeError, match=r"2 MBAEmbeddings share a weight .* pass the optimizer the counts to use"):
        decay_of(second, optimizer)
    optimizer.param_groups[0]["counts"] = COUNTS
    torch.testing.assert_close(decay_of(second, optimizer), DECAY)


# ------------------------------------------------------------------------------------- what an Optimizer does


@EVERY_OPTIMIZER
@pytest.mark.parametrize("through_file", [False, True], ids=["memory", "file"])
def test_a_loaded_state_goes_on_with_the_same_bits(name, through_file):
    embedding, data = table(dtype=torch.float32, counts=torch.randint(1, 5, (9,))), batches()
    optimizer = make(name, embedding.parameters())
    train(optimizer, embedding, data[:6])
    saved = copy.deepcopy({"model": embedding.state_dict(), "optimizer": optimizer.state_dict()})
    if through_file:
        file = io.BytesIO()
        torch.save(saved, file)
        file.seek(0)
        saved = torch.load(file)
    train(optimizer, embedding, data[6:])

    resumed = table(dtype=torch.float32)
    its_optimizer = make(name, resumed.parameters(), lr=123.0)
    resumed.load_state_dict(saved["model"])
    its_optimizer.load_state_dict(saved["optimizer"])
    train(its_optimizer, resumed, data[6:])
    assert bits(resumed.weight, *states(its_optimizer)) == bits(embedding.weight, *states(optimizer))
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
    assert bits(*states(other)) == bits(*states(optimizer))


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
    assert bits(unused.weight) == bits(before)


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


# ----------------------------------------------------------------------------------------------------- errors


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
        (zero_counts, "counts must be positive for every id of the mini-batch, got 0 for id"),
        (
            dense_gradient,
            "needs gradients of sparse rows.*give dense parameters to an optimizer of torch.optim",
        ),
        (nan_learning_rate, "lr must be finite and >= 0, got nan"),
        (counts_of_another_table, r"counts must have shape \[9\]"),
        (transposed_weight, "weight must be contiguous"),
    ],
)
def test_an_error_of_one_table_leaves_every_bit_of_all(name, spoil, message):
    first, second, optimizer = two_tables(name)
    spoil(second, optimizer)
    before = bits(first.weight, second.weight, *states(optimizer))
    with pytest.raises((RuntimeError, ValueError), match=message):
        optimizer.step()
    assert bits(first.weight, second.weight, *states(optimizer)) == before


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "sgd"])  # which has no state
@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda value: value[:4], r"must have shape \[9"),
        (
            lambda value: value.float() if value.is_floating_point() else value,
            "must have the dtype of weight",
        ),
    ],
    ids=["shape", "dtype"],
)
def test_state_that_does_not_fit_one_table_leaves_every_bit_of_all(name, spoil, message):
    first, second, optimizer = two_tables(name)
    state = optimizer.state[second.weight]
    state.update({key: spoil(value) for key, value in state.items()})
    before = bits(first.weight, second.weight, *states(optimizer))
    with pytest.raises((RuntimeError, ValueError), match=message):
        optimizer.step()
    assert bits(first.weight, second.weight, *states(optimizer)) == before


@pytest.mark.parametrize(
    "name, missing", [("adagrad", "sum"), ("adam", "exp_avg_sq"), ("adam", "step"), ("momentum", "momentum_buffer")]
)
def test_state_that_is_not_the_rules_leaves_every_bit_of_all(name, missing):
    first, second, optimizer = two_tables(name)
    saved = optimizer.state_dict()
    saved["state"][1]["other"] = saved["state"][1].pop(missing)
    optimizer.load_state_dict(saved)
    before = bits(first.weight, second.weight, *states(optimizer))
    with pytest.raises(
        RuntimeError, match=rf"state of a parameter of shape \[9, 3\] must be .*{missing}.*, got .*other"
    ):
        optimizer.step()
    assert bits(first.weight, second.weight, *states(optimizer)) == before


def test_incomplete_state_leaves_every_bit_of_all():
    first, second, optimizer = two_tables("adam")
    del optimizer.state[second.weight]["step"], optimizer.state[second.weight]["exp_avg_sq"]
    before = bits(first.weight, second.weight, *states(optimizer))
    with pytest.raises(RuntimeError, match=r"must be exp_avg, exp_avg_sq, step, got exp_avg$"):
        optimizer.step()
    assert bits(first.weight, second.weight, *states(optimizer)) == before


def test_state_that_is_no_tensor_is_refused():
    _, second, optimizer = two_tables("momentum")
    optimizer.state[second.weight]["momentum_buffer"] = None
    with pytest.raises(TypeError, match="momentum_buffer must be a Tensor, got NoneType"):
        optimizer.step()


@EVERY_OPTIMIZER
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
def test_a_gradient_that_is_part_of_its_weight_leaves_every_bit_of_all(name):
    first, second, optimizer = two_tables(name)
    second.weight.grad = torch.sparse_coo_tensor(
        torch.tensor([[1, 2]]), second.weight.detach()[3:5], (9, 3), check_invariants=True
    )
    before = bits(first.weight, second.weight, *states(optimizer))
    with pytest.raises(RuntimeError, match="grad must not share memory with weight"):
        optimizer.step()
    assert bits(first.weight, second.weight, *states(optimizer)) == before


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


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("sgd", dict(lr=-0.1), "lr must be finite and >= 0, got -0.1"),
        ("sgd", dict(l2=-1.0), "l2 must be finite and >= 0, got -1.0"),
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
        ("adam", dict(eps=[]), "eps must be a number, got list"),
    ],
)
def test_options_that_are_no_numbers_are_refused(name, options, message):
    with pytest.raises(TypeError, match=message):
        make(name, table().parameters(), **options)
