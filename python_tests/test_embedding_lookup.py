# SPDX-License-Identifier: Apache-2.0
"""MBAEmbedding's lookup: torch.nn.Embedding(sparse=True), whether torch does it or, where it is large, our operator."""

import pytest
import torch
import torch.nn.functional as F
from embedding_cases import ANY_DTYPE
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap

import dien_ops
from dien_ops import embedding
from helpers import with_threads

LOOKUPS = {"ours": 0, "torch's": 1 << 60}  # from how many bytes on it is ours
pytestmark = pytest.mark.cpu_kernels
TRACING = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")


@pytest.fixture(params=LOOKUPS)
def lookup(request, monkeypatch):
    calls, ours = [], embedding.lookup
    monkeypatch.setattr(embedding, "LARGE_LOOKUP", LOOKUPS[request.param])
    monkeypatch.setattr(embedding, "lookup", lambda *args: calls.append(1) or ours(*args))
    yield
    assert bool(calls) == (request.param == "ours")


@pytest.fixture
def lookup_of_any_size(monkeypatch):
    """Each lookup is ours if it can be."""
    monkeypatch.setattr(embedding, "LARGE_LOOKUP", 0)


def tables(rows, dim, padding_idx=None, dtype=torch.float32):
    """Ours and torch's of the same rows."""
    ours = dien_ops.MBAEmbedding(rows, dim, padding_idx, dtype=dtype)
    theirs = nn.Embedding(rows, dim, padding_idx, sparse=True, dtype=dtype)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@ANY_DTYPE
@pytest.mark.parametrize("shape", [(), (0,), (1,), (77,), (4, 0), (3, 5), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("dim", [0, 1, 3, 8, 18, 32, 77])
def test_rows_are_those_of_the_ids(lookup, shape, dim, dtype):
    ours, theirs = tables(11, dim, dtype=dtype)
    for id_dtype in (torch.int32, torch.int64):
        ids = torch.randint(11, shape, dtype=id_dtype)
        assert torch.equal(ours(ids), theirs(ids))


def test_a_large_lookup_is_shared_by_threads():
    ours, theirs = tables(3000, 40)
    ids = torch.randint(3000, (50, 301))
    assert embedding.is_large_lookup(ours.weight, ids)
    for threads in (1, 2, 3, 7):
        assert torch.equal(with_threads(threads, lambda: [ours(ids)])[0], theirs(ids))
    assert torch.equal(ours(ids.t()), theirs(ids.t()))  # strides


@pytest.mark.parametrize("padding_idx", [None, 0, -1])
@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64], ids=str)
def test_the_gradient_is_torchs_entry_by_entry(lookup, padding_idx, id_dtype):
    ours, theirs = tables(9, 5, padding_idx)
    ids, rows = torch.randint(9, (6, 7), dtype=id_dtype), torch.randn(6, 7, 5)
    for table in (ours, theirs):
        (table(ids) * rows).sum().backward()
    for part in ("_indices", "_values"):
        assert torch.equal(getattr(ours.weight.grad, part)(), getattr(theirs.weight.grad, part)())
    assert ours.weight.grad.is_coalesced() == theirs.weight.grad.is_coalesced()
    for table in (ours, theirs):
        table(ids[:2]).sum().backward()  # is added
    torch.testing.assert_close(ours.weight.grad.to_dense(), theirs.weight.grad.to_dense())


def test_a_gradient_of_other_strides(lookup):
    ours, theirs = tables(9, 5)
    ids = torch.randint(9, (3, 4))
    for table in (ours, theirs):
        (table(ids).transpose(0, 2).exp() * torch.arange(4.0)[:, None]).sum().backward()
    assert torch.equal(ours.weight.grad.to_dense(), theirs.weight.grad.to_dense())


def test_derivatives_of_derivatives(lookup):
    ids, found = torch.tensor([[1, 2, 0], [1, 5, 5]]), []
    for table in tables(6, 4, 0):
        (first,) = torch.autograd.grad(table(ids).pow(3).sum(), table.weight, create_graph=True)
        (second,) = torch.autograd.grad(first.to_dense().pow(2).sum(), table.weight)
        found.append((first.to_dense(), second.to_dense()))
    torch.testing.assert_close(*found)


@TRACING
def test_functional_transforms(lookup_of_any_size):
    ids, tangent, many = torch.tensor([[1, 2, 0], [1, 5, 5]]), torch.randn(6, 4), torch.randn(3, 6, 4)
    found = []
    for table in tables(6, 4):

        def rows(weight, ids, table=table):
            return functional_call(table, {"weight": weight}, (ids,))

        weight = table.weight.detach()
        found.append(
            (
                grad(lambda w, rows=rows: rows(w, ids).pow(2).sum())(weight).to_dense(),
                jvp(lambda w, rows=rows: rows(w, ids), (weight,), (tangent,)),
                vmap(rows, (None, 1))(weight, ids),
                vmap(rows, (0, None))(many, ids),
                vmap(vmap(rows, (None, 0)), (0, None))(many, ids),
            )
        )
    torch.testing.assert_close(*found, rtol=0, atol=0)


@TRACING
def test_forward_mode(lookup):
    ids, tangent = torch.tensor([[1, 2, 0], [1, 5, 5]]), torch.randn(6, 4)
    ours, _ = tables(6, 4)
    weight = ours.weight.detach()
    with forward_ad.dual_level():
        rows = functional_call(ours, {"weight": forward_ad.make_dual(weight, tangent)}, (ids,))
        assert torch.equal(forward_ad.unpack_dual(rows).primal, weight[ids])
        assert torch.equal(forward_ad.unpack_dual(rows).tangent, tangent[ids])


def test_a_frozen_table_and_no_grad_give_rows_without_gradient(lookup):
    ours, _ = tables(6, 4)
    with torch.no_grad():
        assert not ours(torch.tensor([1])).requires_grad
    with torch.inference_mode():
        assert torch.equal(ours(torch.tensor([1])), ours.weight[1:2])
    assert not ours.requires_grad_(False)(torch.tensor([1])).requires_grad


def test_ids_that_change_before_the_backward_are_noticed(lookup):
    ours, _ = tables(6, 4)
    ids = torch.tensor([1, 2])
    loss = ours(ids).sum()
    ids.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("wrong", [-1, 7, 2**31 - 1])
def test_an_id_out_of_range_is_named(lookup, wrong, id_dtype):
    with pytest.raises(IndexError, match=f"ids must be in 0..6, got {wrong}"):
        dien_ops.MBAEmbedding(7, 3)(torch.tensor([[1, 2], [wrong, 9]], dtype=id_dtype))


def test_other_wrong_ids_are_torchs_error(lookup_of_any_size):
    table = dien_ops.MBAEmbedding(7, 3)
    with pytest.raises(RuntimeError, match="have one of the following scalar types: Long, Int"):
        table(torch.tensor([1.5, 100.0]))
    with pytest.raises(TypeError, match="must be Tensor, not list"):
        table([1, 2])


def test_the_gradient_is_on_the_tables_device_whatever_the_default_is(lookup):
    ours, _ = tables(6, 4)
    with torch.device("meta"):
        ours(torch.tensor([1, 2], device="cpu")).sum().backward()
    assert ours.weight.grad.device.type == "cpu"


def test_a_parametrized_weight_is_computed_once_a_lookup(lookup_of_any_size):
    calls = []

    class Counted(nn.Module):
        def forward(self, weight):
            calls.append(1)
            return weight * 2

    table = dien_ops.MBAEmbedding(6, 4)
    rows = table.weight[[1, 2]] * 2
    nn.utils.parametrize.register_parametrization(table, "weight", Counted())
    calls.clear()
    assert torch.equal(table(torch.tensor([1, 2])), rows) and calls == [1]


def test_tracers_and_subclasses_see_torchs_lookup(lookup_of_any_size):
    class Tagged(torch.Tensor):
        pass

    ours, theirs = tables(6, 4)
    ids = torch.tensor([1, 2])
    assert torch.equal(torch.fx.symbolic_trace(ours)(ids), theirs(ids))
    assert type(ours(ids.as_subclass(Tagged))) is Tagged


@pytest.mark.parametrize("option, value", [("max_norm", 0.5), ("scale_grad_by_freq", True), ("sparse", False)])
def test_options_of_nn_embedding_that_are_set_later_work(lookup_of_any_size, option, value):
    ours, theirs = tables(6, 4)
    ids = torch.tensor([1, 2, 2])
    for table in (ours, theirs):
        setattr(table, option, value)
        if option == "scale_grad_by_freq":
            table.sparse = False  # torch has it with a dense gradient alone
        table(ids).sum().backward()
    assert torch.equal(ours.weight, theirs.weight)
    assert ours.weight.grad.layout == theirs.weight.grad.layout
    assert torch.equal(ours.weight.grad.to_dense(), theirs.weight.grad.to_dense())


def test_a_weight_that_is_not_contiguous_is_looked_up_by_torch():
    weight, ids = torch.randn(40, 3000).t(), torch.randint(3000, (20000,))
    assert torch.equal(dien_ops.MBAEmbedding.from_pretrained(weight)(ids), F.embedding(ids, weight))


@TRACING
def test_tracing_records_torchs_lookup(lookup_of_any_size):
    ours, _ = tables(6, 4)
    traced = torch.jit.trace(ours, torch.tensor([1, 2]))
    assert "aten::embedding" in str(traced.inlined_graph)
    assert torch.equal(traced(torch.tensor([5])), ours(torch.tensor([5])))


# ------------------------------------------------------------------------------------------------------- the operator


@pytest.mark.parametrize(
    "ids", [torch.tensor([[1, 3, 0], [2, 2, 2]]), torch.zeros(0, dtype=torch.int32)], ids=["6", "0"]
)
def test_the_operator_passes_opcheck(ids):
    torch.library.opcheck(torch.ops.dien_ops.embedding, (torch.randn(4, 3), ids))


def test_of_several_wrong_ids_the_first_is_named():
    ids = torch.zeros(50_000, dtype=torch.int64)
    ids[[49_999, 43_210, 43_211]] = torch.tensor([7, -8, 9])
    with pytest.raises(RuntimeError, match=r"ids must be in 0\.\.3, got -8 at position 43210"):
        torch.ops.dien_ops.embedding(torch.randn(4, 3), ids)


@pytest.mark.parametrize(
    "weight, ids, message",
    [
        (torch.randn(4), torch.tensor([1]), "weight must be 2-D, got 1-D"),
        (torch.randn(4, 3).t(), torch.tensor([1]), "weight must be contiguous"),
        (torch.randn(4, 3), torch.tensor([1.0]), "ids must be int32 or int64"),
        (torch.randn(4, 3), torch.tensor([[0, 3], [4, -1]]), r"ids must be in 0\.\.3, got 4 at position 2"),
        (torch.randn(0, 3), torch.tensor([0]), r"ids must be in 0\.\.-1, got 0 at position 0"),
    ],
    ids=["rank", "strides", "dtype", "range", "no rows"],
)
def test_the_operator_refuses(weight, ids, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.dien_ops.embedding(weight, ids)
