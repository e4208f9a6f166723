# SPDX-License-Identifier: Apache-2.0
"""MBAEmbedding: torch.nn.Embedding with sparse gradients, that counts ids, drops them and filters them."""

from __future__ import annotations

import copy
import gc
import io
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import dien_ops
from dien_ops import optim
from helpers import here, random_state

NOBODY_WAITS = "nobody waits for the ids there"


def test_it_is_torchs_embedding_with_sparse_gradients():
    table = dien_ops.MBAEmbedding(7, 3, padding_idx=0)
    assert isinstance(table, torch.nn.Embedding)
    ids = torch.tensor([[1, 0], [6, 1]])
    torch.testing.assert_close(table(ids), torch.nn.functional.embedding(ids, table.weight))
    table(ids).sum().backward()
    assert table.weight.grad.is_sparse
    assert not table.weight[0].any() and not table.weight.grad.to_dense()[0].any()


@pytest.mark.not_on_cuda(reason=NOBODY_WAITS)
@pytest.mark.parametrize("wrong", [-1, 7])
def test_an_id_out_of_range_is_named(wrong):
    with pytest.raises(IndexError, match=f"ids must be in 0..6, got {wrong}"):
        dien_ops.MBAEmbedding(7, 3)(torch.tensor([[1, 2], [wrong, 9]]))


def test_counts_are_instances_that_hold_the_id():
    table = dien_ops.MBAEmbedding(6, 2, padding_idx=0)
    assert table.counts is None and table.seen == 0
    table.count_(torch.tensor([[1, 1, 2], [3, 1, 0]])).count_(torch.tensor([5, 5]))
    assert table.counts.tolist() == [0, 2, 1, 1, 0, 2]
    assert table.counts.dtype == torch.int64 and table.seen == 4


def test_counts_can_be_occurrences():
    table = dien_ops.MBAEmbedding(6, 2, padding_idx=0)
    table.count_(torch.tensor([[[1, 1], [2, 0]]], dtype=torch.int32), of="occurrences")
    assert table.counts.tolist() == [0, 2, 1, 0, 0, 0] and table.seen == 0
    with pytest.raises(ValueError, match="of must be one of 'instances', 'occurrences', got 'rows'"):
        table.count_(torch.tensor([1]), of="rows")


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float32, torch.float64], ids=str)
def test_counting_goes_on_from_given_counts_and_leaves_them_alone(dtype):
    given = torch.ones(3, dtype=dtype)
    table = dien_ops.MBAEmbedding(3, 2, counts=given)
    table.count_(torch.tensor([2, 2]))
    assert table.counts.tolist() == [1, 1, 3] and given.tolist() == [1, 1, 1]


@pytest.mark.not_on_cuda(reason=NOBODY_WAITS)
def test_counting_an_id_out_of_range_counts_nothing():
    table = dien_ops.MBAEmbedding(3, 2, counts=torch.ones(3, dtype=torch.int64))
    for wrong in (3, -1):
        with pytest.raises(IndexError, match=f"ids must be in 0..2, got {wrong}"):
            table.count_(torch.tensor([[0, wrong]]))
    with pytest.raises(ValueError, match="ids must be 1-D or 2-D, got 3-D"):
        table.count_(torch.zeros(1, 1, 1, dtype=torch.int64))
    assert table.counts.tolist() == [1, 1, 1]


def test_counts_of_the_wrong_shape_are_refused():
    with pytest.raises(RuntimeError, match=r"counts must have shape \[3\] \[num_embeddings\], got \[4\]"):
        dien_ops.MBAEmbedding(3, 2, counts=torch.ones(4))


def test_a_state_dict_brings_the_counts_along():
    counted = dien_ops.MBAEmbedding(4, 2).count_(torch.tensor([1, 1, 3]))
    fresh = dien_ops.MBAEmbedding(4, 2)
    fresh.load_state_dict(counted.state_dict())
    assert torch.equal(fresh.counts, counted.counts)
    fresh.count_(torch.tensor([0]))
    assert counted.counts[0] == 0
    never_counted = dien_ops.MBAEmbedding(4, 2)
    never_counted.load_state_dict(torch.nn.Embedding(4, 2).state_dict())
    assert never_counted.counts is None


def state_with(counts: Tensor, rows: int = 4) -> dict[str, Tensor]:
    return {"weight": torch.zeros(rows, 2), "counts": here(counts)}


NO_COUNTS, INTEGERS, FLOATS = None, torch.tensor([9, 8, 7, 6]), torch.tensor([0.5, 2.7, 1.0, 3.0]).double()


@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
@pytest.mark.parametrize("before", [NO_COUNTS, INTEGERS, FLOATS], ids=["none", "integers", "floats"])
@pytest.mark.parametrize("saved", [INTEGERS.int(), INTEGERS, FLOATS.float(), FLOATS], ids=lambda x: str(x.dtype))
def test_loaded_counts_are_those_that_were_saved(before, saved, assign):
    table = dien_ops.MBAEmbedding(4, 2, counts=here(before))
    table.load_state_dict(state_with(saved), assign=assign)
    assert table.counts.dtype == (torch.float64 if saved.is_floating_point() else torch.int64)
    assert table.counts.tolist() == saved.tolist()


@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
@pytest.mark.parametrize("before", [NO_COUNTS, INTEGERS, FLOATS], ids=["none", "integers", "floats"])
@pytest.mark.parametrize(
    "saved, message",
    [
        (torch.ones(5), r"size mismatch for table.counts: .*torch.Size\(\[5\]\).* torch.Size\(\[4\]\)"),
        (torch.ones(1, dtype=torch.int64), "size mismatch for table.counts"),
        (torch.ones(4).byte(), "table.counts must be int32, int64, float32 or float64, got torch.uint8"),
        (torch.ones(4).half(), "table.counts must be int32, int64, float32 or float64, got torch.float16"),
    ],
)
def test_loading_counts_that_do_not_fit_leaves_those_that_are_there(before, saved, message, assign):
    table = dien_ops.MBAEmbedding(4, 2, counts=here(before))
    model = torch.nn.ModuleDict({"table": table})
    with pytest.raises(RuntimeError, match=message):
        model.load_state_dict({f"table.{k}": v for k, v in state_with(saved).items()}, assign=assign)
    if before is None:
        assert table.counts is None
    else:
        assert torch.equal(table.counts, here(before)) and table.counts.dtype == before.dtype


def test_from_pretrained_needs_a_tensor():
    with pytest.raises(TypeError, match="embeddings must be a Tensor, got NoneType"):
        dien_ops.MBAEmbedding.from_pretrained(None)


def test_from_pretrained_starts_from_the_given_rows():
    rows = torch.randn(4, 2)
    table = dien_ops.MBAEmbedding.from_pretrained(rows, freeze=False, padding_idx=1, counts=torch.ones(4))
    assert torch.equal(table.weight, rows) and table.weight.requires_grad
    assert table.padding_idx == 1 and table.counts.tolist() == [1, 1, 1, 1]


def test_from_pretrained_freezes_as_torch_does_and_takes_the_options():
    options = dict(learn_counts=9, id_dropout=0.5, min_count=2)
    table = dien_ops.MBAEmbedding.from_pretrained(torch.randn(4, 2), padding_idx=1, **options)
    assert not table.weight.requires_grad
    assert (table.learn_counts, table.id_dropout, table.min_count) == (9, 0.5, 2)


def owners_of(weight: Tensor) -> list[dien_ops.MBAEmbedding]:
    from dien_ops.embedding_table import owners

    return owners().get(id(weight), [])


def through_pickle(table):
    file = io.BytesIO()
    torch.save(table, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, through_pickle], ids=["deepcopy", "copy", "pickle"])
def test_copies_own_their_weight(copied):
    table = copied(dien_ops.MBAEmbedding(4, 2))
    assert table in owners_of(table.weight)


def test_a_table_owns_the_weight_it_was_given_later():
    table = dien_ops.MBAEmbedding(4, 2)
    table.weight = torch.nn.Parameter(torch.zeros(4, 2))
    assert owners_of(table.weight) == [table]
    state = dien_ops.MBAEmbedding(4, 2).state_dict()
    table.load_state_dict(state, assign=True)
    assert owners_of(table.weight) == [table]
    table.double()
    assert owners_of(table.weight) == [table]


def test_owning_a_weight_keeps_no_table_alive():
    table = dien_ops.MBAEmbedding(4, 2)
    weight = table.weight
    del table
    gc.collect()
    assert owners_of(weight) == []


ROWS_OF_ANY_DTYPE = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)


@ROWS_OF_ANY_DTYPE
def test_inference_compiles_to_one_graph(dtype):
    torch._dynamo.reset()
    options = dict(padding_idx=0, counts=torch.arange(7), id_dropout=0.5, min_count=3, dtype=dtype)
    table = dien_ops.MBAEmbedding(7, 3, **options).eval()
    compiled = torch.compile(table, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        for ids in (torch.tensor([1, 2]), torch.tensor([1, 3, 6])):
            assert torch.equal(compiled(ids), table(ids))


@ROWS_OF_ANY_DTYPE
def test_rows_may_be_of_any_dtype(dtype):
    table = dien_ops.MBAEmbedding(7, 3, dtype=dtype)
    optimizer = optim.MBAAdam(table.parameters(), lr=0.1)
    before = table.weight.detach().clone()
    table(torch.tensor([1, 5, 1])).sum().backward()
    optimizer.step()
    assert table.weight.dtype == dtype and not torch.equal(table.weight[1], before[1])
    assert optimizer.state[table.weight]["exp_avg"].dtype == (
        torch.float64 if dtype == torch.float64 else torch.float32
    )


# ------------------------------------------------------------------------------------ counts learned in training


def test_training_counts_what_it_looks_up():
    table = dien_ops.MBAEmbedding(6, 2, padding_idx=0, learn_counts=1000)
    assert table.counts is None and table.seen == 0
    table(torch.tensor([[1, 1, 2], [3, 1, 0]]))
    table.eval()(torch.tensor([4, 4]))
    table.train()(torch.tensor([5, 1], dtype=torch.int32))
    assert table.counts.tolist() == [0, 3, 1, 1, 0, 1] and table.seen == 4


def decay_of(table: nn.Module, optimizer: torch.optim.Optimizer, ids: Tensor) -> Tensor:
    """l2 / n_j of the ids, as one step of MBASGD with lr = 1 and no other gradient shows it."""
    before = table.weight.detach().clone()
    optimizer.zero_grad()
    (table(ids) * 0).sum().backward()
    optimizer.step()
    return (1 - table.weight.detach() / before)[ids.unique(), 0]


def test_the_estimate_of_n_j_is_the_share_of_what_was_seen():
    """counts 2, 1, 1 of 4 instances; there are 1000."""
    table = dien_ops.MBAEmbedding(6, 2, learn_counts=1000, dtype=torch.float64)
    optimizer = optim.MBASGD(table.parameters(), lr=1.0, l2=10.0)
    found = decay_of(table, optimizer, torch.tensor([1, 1, 2, 3]))
    torch.testing.assert_close(found, 10 / torch.tensor([500.0, 250.0, 250.0]).double())
    found = decay_of(table, optimizer, torch.tensor([2, 3, 2, 3]))  # 3 and 3 of 8
    torch.testing.assert_close(found, 10 / torch.tensor([375.0, 375.0]).double())


def test_tables_of_one_group_have_their_own_estimates():
    tables = [dien_ops.MBAEmbedding(6, 2, learn_counts=n, dtype=torch.float64) for n in (100, 400)]
    optimizer = optim.MBASGD([t.weight for t in tables], lr=1.0, l2=10.0)
    before = [t.weight.detach().clone() for t in tables]
    sum((t(torch.tensor([1, 2])) * 0).sum() for t in tables).backward()
    optimizer.step()
    for table, weight, n in zip(tables, before, (50, 200), strict=True):
        torch.testing.assert_close(table.weight.detach()[1:3], weight[1:3] * (1 - 10 / n))


def test_after_one_epoch_the_estimate_is_the_count():
    data = torch.randint(1, 30, (96, 4))
    counted, learned = dien_ops.MBAEmbedding(30, 2).count_(data), dien_ops.MBAEmbedding(30, 2, learn_counts=96)
    for batch in data.split(10):
        learned(batch)
    assert torch.equal(learned.counts, counted.counts) and learned.seen == 96


def test_the_estimate_has_no_bias_from_the_first_batch_on():
    """Of n_j = 64 in 256 instances: the mean over all batches of one shuffled pass, each seen first by a table of its own."""
    data = (torch.arange(256) % 4).view(-1, 1)[torch.randperm(256)]
    estimates = []
    for batch in data.split(8):
        table = dien_ops.MBAEmbedding(4, 2, learn_counts=256)
        table(batch)
        estimates.append(table.counts.double() * 256 / table.seen)
    torch.testing.assert_close(torch.stack(estimates).mean(0), torch.full((4,), 64.0).double())


def test_learned_counts_go_on_in_another_table():
    first = dien_ops.MBAEmbedding(6, 2, learn_counts=100)
    first(torch.tensor([1, 2, 1]))
    assert set(first.state_dict()) == {"weight", "counts", "seen"}
    for second in (dien_ops.MBAEmbedding(6, 2, learn_counts=100), dien_ops.MBAEmbedding(6, 2)):
        second.load_state_dict(first.state_dict())
        assert second.seen == 3 and torch.equal(second.counts, first.counts)
    assert set(second.state_dict()) == {"weight", "counts"}
    inside = nn.ModuleDict({"table": dien_ops.MBAEmbedding(6, 2, learn_counts=100)})
    inside.load_state_dict(nn.ModuleDict({"table": first}).state_dict())
    assert inside["table"].seen == 3
    again = copy.deepcopy(first)
    again(torch.tensor([1]))
    assert (again.seen, first.seen) == (4, 3)


def test_the_state_is_torchs_where_nothing_was_counted():
    theirs = nn.Embedding(6, 2, sparse=True)
    ours = dien_ops.MBAEmbedding(6, 2, padding_idx=0, learn_counts=100, id_dropout=0.5, min_count=2)
    assert set(ours.state_dict()) == {"weight"}
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())
    model = nn.ModuleDict({"table": ours})
    model.load_state_dict(nn.ModuleDict({"table": theirs}).state_dict())


def test_loaded_counts_without_seen_are_those_of_the_whole_training_set():
    table = dien_ops.MBAEmbedding(4, 2, learn_counts=100)
    table(torch.tensor([1]))
    table.load_state_dict(state_with(INTEGERS))
    assert table.seen == 100 and table.counts.tolist() == INTEGERS.tolist()


# ------------------------------------------------------------------- DIN section 6.5: dropout and filter of ids


def test_dropped_ids_read_zeros_and_get_no_gradient_and_no_decay():
    table = dien_ops.MBAEmbedding(200, 2, padding_idx=0, id_dropout=0.5)
    before = table.weight.detach().clone()
    optimizer = optim.MBASGD(table.parameters(), lr=0.5, l2=0.1)
    rows = table(torch.arange(200))
    dropped = (rows == 0).all(1)
    (rows * 0 + rows.detach()).sum().backward()
    optimizer.step()
    assert torch.equal(table.weight[dropped], before[dropped])
    torch.testing.assert_close(table.weight[~dropped], before[~dropped] * (1 - 0.5 * 0.1))
    assert abs(int(dropped[1:].sum()) - 99.5) < 5 * math.sqrt(199 / 4)


def test_nothing_is_dropped_in_evaluation_or_without_the_option():
    table = dien_ops.MBAEmbedding(200, 2, padding_idx=0, id_dropout=0.5).eval()
    assert torch.equal(table(torch.arange(200)), table.weight)
    plain = dien_ops.MBAEmbedding(200, 2, padding_idx=0)
    state = random_state()
    assert torch.equal(plain(torch.arange(200)), plain.weight)
    assert torch.equal(random_state(), state)


@pytest.mark.parametrize("training", [True, False])
def test_rare_ids_read_the_padding_row(training):
    counts = torch.tensor([9, 1, 3, 2, 0])
    table = dien_ops.MBAEmbedding(5, 2, padding_idx=0, counts=counts, min_count=2).train(training)
    rows = table(torch.tensor([[0, 1, 2], [3, 4, 1]], dtype=torch.int32))
    expected = table.weight[torch.tensor([[0, 0, 2], [3, 0, 0]])]
    assert torch.equal(rows, expected)
    rows.sum().backward()
    assert table.weight.grad.to_dense().any(1).tolist() == [False, False, True, True, False]


def test_the_k_most_frequent_are_kept():
    table = dien_ops.MBAEmbedding(5, 2, padding_idx=0, counts=torch.tensor([0, 7, 3, 5, 1]))
    table.min_count = table.counts.topk(2).values[-1].item()
    assert table(torch.arange(5)).any(1).tolist() == [False, True, False, True, False]


def test_a_filter_needs_counts():
    table = dien_ops.MBAEmbedding(5, 2, padding_idx=0, min_count=2)
    with pytest.raises(RuntimeError, match="min_count needs counts: give them, or call count_ with the training set"):
        table(torch.tensor([1]))
    assert table.count_(torch.tensor([1, 1]))(torch.tensor([1])).any()


@pytest.mark.not_on_cuda(reason=NOBODY_WAITS)
@pytest.mark.parametrize("wrong", [-1, 5])
def test_a_filter_hides_no_id_that_is_out_of_range(wrong):
    table = dien_ops.MBAEmbedding(5, 2, padding_idx=0, counts=torch.ones(5), min_count=2)
    with pytest.raises(IndexError, match=f"ids must be in 0..4, got {wrong}"):
        table(torch.tensor([1, wrong]))


@pytest.mark.parametrize(
    "options, error, message",
    [
        (dict(id_dropout=0.5), ValueError, "padding_idx must be given where id_dropout or min_count are"),
        (dict(min_count=2), ValueError, "padding_idx must be given where id_dropout or min_count are"),
        (dict(padding_idx=0, id_dropout=1.0), ValueError, r"id_dropout must be in \[0, 1\), got 1.0"),
        (dict(padding_idx=0, min_count=-1), ValueError, "min_count must be finite and >= 0, got -1"),
        (dict(padding_idx=0, min_count="2"), TypeError, "min_count must be a number, got str"),
        (dict(learn_counts=1.5), TypeError, "learn_counts must be an int, got float"),
        (dict(learn_counts=0), ValueError, "learn_counts must be greater than zero, got 0"),
        (dict(learn_counts=9, counts=torch.ones(5)), ValueError, "counts must be None where learn_counts is given"),
    ],
)
def test_wrong_options_are_named(options, error, message):
    with pytest.raises(error, match=message):
        dien_ops.MBAEmbedding(5, 2, **{name: here(value) for name, value in options.items()})


def test_it_says_which_options_it_has():
    table = dien_ops.MBAEmbedding(5, 2, padding_idx=0, learn_counts=9, id_dropout=0.5, min_count=2)
    expected = "MBAEmbedding(5, 2, padding_idx=0, sparse=True, learn_counts=9, id_dropout=0.5, min_count=2)"
    assert repr(table) == expected
    assert "learn_counts" not in repr(dien_ops.MBAEmbedding(5, 2))


@pytest.mark.cpu_kernels
@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage/enabled").exists(), reason="Linux alone has them")
@pytest.mark.parametrize("of", ["weight", "counts"])
def test_a_new_table_is_put_into_large_pages_where_the_system_grants_them(of):
    """The setting `never` refuses them; what is asked for is asked for all the same, as smaps shows."""
    memory = getattr(dien_ops.MBAEmbedding(2**21, 2).count_(torch.tensor([1])), of)  # 16 MiB
    address = memory.data_ptr() + memory.nbytes // 2
    flags: list[str] = []
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        bounds = line.split()[0].split("-")
        if len(bounds) == 2:
            inside = int(bounds[0], 16) <= address < int(bounds[1], 16)
        elif inside and line.startswith("VmFlags:"):
            flags = line.split()[1:]
    assert "hg" in flags  # MADV_HUGEPAGE
