# SPDX-License-Identifier: Apache-2.0
"""The sparse updates with mini-batch aware L2 against reference.py, and MBAEmbedding."""

from __future__ import annotations

import copy
import gc
import io
import math

import pytest
import torch
from torch import Tensor

import dien_ops
from dien_ops import functional, reference
from helpers import assert_at_most_twice_torchs_error, assert_close, with_threads

RULES = ["sgd", "momentum", "adagrad", "rowwise_adagrad", "adam"]
EVERY_RULE = pytest.mark.parametrize("rule", RULES)
COUNT_TYPES = [torch.int32, torch.int64, torch.float32, torch.float64]


class Table:
    """A weight with the state of one rule; update() runs a step with the functional or the reference form."""

    def __init__(self, rule: str, rows: int = 11, dim: int = 5, dtype: torch.dtype = torch.float64) -> None:
        self.rule = rule
        names = {
            "sgd": [],
            "momentum": ["momentum_buffer"],
            "adagrad": ["state_sum"],
            "rowwise_adagrad": ["state_sum"],
            "adam": ["exp_avg", "exp_avg_sq", "step"],
        }[rule]
        self.weight = torch.randn(rows, dim, dtype=dtype)
        self.state = {name: torch.zeros_like(self.weight) for name in names}
        if rule == "rowwise_adagrad":
            self.state["state_sum"] = torch.zeros(rows, dtype=dtype)
        if rule == "adam":
            self.state["step"] = torch.zeros(rows, dtype=torch.int64)

    @property
    def tensors(self) -> list[Tensor]:
        return [self.weight, *self.state.values()]

    def copy(self, dtype: torch.dtype | None = None) -> Table:
        other = copy.deepcopy(self)
        if dtype is not None:
            other.weight = other.weight.to(dtype)
            other.state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in other.state.items()}
        return other

    def update(self, module, ids: Tensor, grad: Tensor, **options) -> list[Tensor]:
        function = getattr(module, f"mba_{'sgd' if self.rule == 'momentum' else self.rule}_")
        if self.rule == "momentum":
            options["momentum"] = 0.9
        assert function(self.weight, ids=ids, grad=grad, lr=0.1, **self.state, **options) is None
        return self.tensors


def skewed_ids(count: int, rows: int) -> Tensor:
    """Ids that repeat: half of them are the same one."""
    ids = torch.randint(rows, (count,))
    ids[torch.rand(count) < 0.5] = rows // 2
    return ids


def bits(tensors: list[Tensor]) -> list[bytes]:
    return [t.numpy().tobytes() for t in tensors]


# ----------------------------------------------------------------------------------------------------- update


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
        grad = torch.randn(9, dim, dtype=torch.float64)
        actual = ours.update(functional, ids, grad, l2=0.3, counts=counts)
        assert_close(actual, theirs.update(reference, ids, grad, l2=0.3, counts=counts))


@EVERY_RULE
@pytest.mark.parametrize("count", [0, 1, 1000])
def test_mini_batches_of_any_size_are_the_references(rule, count):
    """1000 gradient rows of one id are summed in pieces."""
    ours, theirs = (table := Table(rule)).copy(), table
    ids, grad = skewed_ids(count, 11), torch.randn(count, 5, dtype=torch.float64)
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


def test_ids_beyond_one_digit_of_the_sort_are_the_references():
    ours, theirs = (table := Table("sgd", rows=5_000_000, dim=1)).copy(), table
    ids = torch.randint(5_000_000, (40_000,))
    ids[::3] = ids[0]
    grad = torch.randn(40_000, 1, dtype=torch.float64)
    assert_close(ours.update(functional, ids, grad), theirs.update(reference, ids, grad))


@EVERY_RULE
def test_rows_that_are_not_in_the_mini_batch_keep_their_bits(rule):
    table = Table(rule)
    before = [t.clone() for t in table.tensors]
    table.update(functional, torch.tensor([3, 7, 3]), torch.randn(3, 5, dtype=torch.float64), l2=1.0)
    others = [i for i in range(11) if i not in (3, 7)]
    assert bits([t[others] for t in table.tensors]) == bits([t[others] for t in before])
    assert not torch.equal(table.weight[3], before[0][3])


def test_an_id_decays_once_per_mini_batch_however_often_it_occurs():
    weight = torch.ones(4, 2, dtype=torch.float64)
    functional.mba_sgd_(weight, torch.tensor([1, 1, 1]), torch.zeros(3, 2, dtype=torch.float64), lr=0.5, l2=0.2)
    torch.testing.assert_close(weight[1], torch.full((2,), 0.9, dtype=torch.float64))


@EVERY_RULE
@pytest.mark.parametrize("dtype", COUNT_TYPES)
def test_counts_of_every_type_divide_the_decay(rule, dtype):
    ours, theirs = (table := Table(rule)).copy(), table
    counts = torch.randint(1, 9, (22,), dtype=dtype)[::2]
    ids, grad = skewed_ids(6, 11), torch.randn(6, 5, dtype=torch.float64)
    actual = ours.update(functional, ids, grad, l2=2.0, counts=counts)
    assert_close(actual, theirs.update(reference, ids, grad, l2=2.0, counts=counts))


def test_a_count_of_zero_does_not_matter_for_an_absent_id():
    table = Table("sgd")
    counts = torch.ones(11).index_fill(0, torch.tensor([4]), 0)
    table.update(functional, torch.tensor([3, 5]), torch.randn(2, 5, dtype=torch.float64), counts=counts)


@EVERY_RULE
@pytest.mark.parametrize("padding_idx", [0, 5, -1])
def test_the_padding_row_never_changes(rule, padding_idx):
    ours, theirs = (table := Table(rule)).copy(), table
    before = [t.clone() for t in ours.tensors]
    ids = torch.arange(11).repeat(2)
    grad = torch.randn(22, 5, dtype=torch.float64)
    counts = torch.ones(11, dtype=torch.int64)
    counts[padding_idx] = 0
    actual = ours.update(functional, ids, grad, padding_idx=padding_idx, counts=counts)
    assert bits([t[padding_idx] for t in actual]) == bits([t[padding_idx] for t in before])
    assert_close(actual, theirs.update(reference, ids, grad, padding_idx=padding_idx, counts=counts))


@EVERY_RULE
def test_ids_and_gradients_come_in_any_shape_type_and_strides(rule):
    ours, theirs = (table := Table(rule)).copy(), table
    ids = torch.randint(11, (4, 3), dtype=torch.int32).t()
    grad = torch.randn(4, 5, dtype=torch.float64).expand(3, 4, 5)
    flat = (ids.long().reshape(-1), grad.reshape(-1, 5))
    assert_close(ours.update(functional, ids, grad), theirs.update(reference, *flat))


def test_tables_of_more_than_2_to_the_31_elements_are_addressed():
    rows, dim = 2**27 + 1, 17
    weight = torch.empty(rows, dim)  # 9 GB of addresses; only the pages that are touched take memory
    ids = torch.tensor([rows - 1, 2**26, rows - 1])
    weight[ids] = 1.0
    functional.mba_sgd_(weight, ids, torch.ones(3, dim), lr=0.5, l2=0.0)
    assert torch.equal(weight[ids[:2]], torch.tensor([[0.0], [0.5]]).expand(2, dim))


@EVERY_RULE
@pytest.mark.parametrize("rows, dim", [(0, 4), (4, 0)])
def test_empty_tables_and_rows_are_accepted(rule, rows, dim):
    ids = torch.arange(rows)
    Table(rule, rows, dim).update(functional, ids, torch.zeros(rows, dim, dtype=torch.float64))


@EVERY_RULE
def test_the_number_of_threads_does_not_change_a_bit(rule):
    ids, grad = skewed_ids(60_000, 3000), torch.randn(60_000, 24)
    table = Table(rule, rows=3000, dim=24, dtype=torch.float32)
    one, two = (with_threads(n, lambda: table.copy().update(functional, ids, grad)) for n in (1, 2))
    assert bits(one) == bits(two)


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


@EVERY_RULE
def test_compiles_to_one_graph_for_all_sizes(rule):
    torch._dynamo.reset()
    table = Table(rule)
    names = list(table.state)

    def step(weight, ids, grad, *state):
        options = {"momentum": 0.9} if rule == "momentum" else {}
        function = getattr(functional, f"mba_{'sgd' if rule == 'momentum' else rule}_")
        function(weight, ids=ids, grad=grad, lr=0.1, **dict(zip(names, state, strict=True)), **options)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for count in (3, 8):
        ids, grad = skewed_ids(count, 11), torch.randn(count, 5, dtype=torch.float64)
        eager = table.copy().update(functional, ids, grad)
        compiled(table.weight, ids, grad, *table.state.values())
        assert bits(table.tensors) == bits(eager)


@EVERY_RULE
def test_operators_pass_opcheck(rule):
    table = Table(rule)
    state = list(table.state.values()) if rule != "sgd" else [None]
    batch = [skewed_ids(6, 11), torch.randn(6, 5, dtype=torch.float64), torch.ones(11), 0]
    numbers = [0.1, 0.01, 0.9, 0.999, 1e-8] if rule == "adam" else [0.1, 0.01, 0.0 if rule == "sgd" else 0.5]
    operator = getattr(torch.ops.dien_ops, f"mba_{'sgd' if rule == 'momentum' else rule}_")
    torch.library.opcheck(operator, (table.weight, *state, *batch, *numbers))
    torch.library.opcheck(torch.ops.dien_ops.mba_check, (table.weight, *batch))


# ----------------------------------------------------------------------------------------------------- errors

IDS, GRAD = torch.tensor([1, 2]), torch.zeros(2, 5, dtype=torch.float64)
ERRORS = {
    "ids must be in 0..10, got 11 at position 1": (RuntimeError, dict(ids=torch.tensor([1, 11]))),
    "ids must be in 0..10, got -1 at position 0": (RuntimeError, dict(ids=torch.tensor([-1, 2]))),
    "ids must be int32 or int64": (ValueError, dict(ids=torch.tensor([1.0, 2.0]))),
    "ids must be a Tensor, got list": (TypeError, dict(ids=[1, 2])),
    "grad must be a Tensor, got NoneType": (TypeError, dict(grad=None)),
    "lr must be a number, got NoneType": (TypeError, dict(lr=None)),
    "l2 must be a number, got str": (TypeError, dict(l2="0.1")),
    "padding_idx must be an integer, got float": (TypeError, dict(padding_idx=1.0)),
    r"grad must have shape \[2, 5\] \[\*ids.shape, D\], got \[3, 5\]": (
        RuntimeError,
        dict(grad=torch.zeros(3, 5).double()),
    ),
    "grad must have the dtype of weight": (ValueError, dict(grad=torch.zeros(2, 5))),
    r"counts must be positive for every id of the mini-batch, got 0 for id 2": (
        RuntimeError,
        dict(counts=torch.tensor([1, 1, 0, 1, 1, 1, 1, 1, 1, 1, 1])),
    ),
    "counts must be positive for every id of the mini-batch, got nan for id 1": (
        RuntimeError,
        dict(counts=torch.full((11,), math.nan)),
    ),
    r"counts must have shape \[11\] \[num_embeddings\], got \[3\]": (
        RuntimeError,
        dict(counts=torch.ones(3)),
    ),
    "counts must be int32, int64, float32 or float64, got torch.bool": (
        ValueError,
        dict(counts=torch.ones(11) > 0),
    ),
    "padding_idx must be in -11..10, got 11": (ValueError, dict(padding_idx=11)),
    "lr must be finite and >= 0, got nan": (ValueError, dict(lr=math.nan)),
    "lr must be finite and >= 0, got -1.0": (ValueError, dict(lr=-1.0)),
    "l2 must be finite and >= 0, got inf": (ValueError, dict(l2=math.inf)),
}


@EVERY_RULE
@pytest.mark.parametrize("message", ERRORS)
def test_errors_name_the_argument_and_leave_every_bit(rule, message):
    table = Table(rule)
    for state in table.state.values():
        state.random_(1, 5)
    before = bits(table.tensors)
    error, arguments = ERRORS[message]
    function = getattr(functional, f"mba_{'sgd' if rule == 'momentum' else rule}_")
    with pytest.raises(error, match=message):
        function(table.weight, **table.state, **{"ids": IDS, "grad": GRAD, "lr": 0.1, **arguments})
    assert bits(table.tensors) == before


@pytest.mark.parametrize(
    "rule, arguments, error, message",
    [
        ("sgd", dict(momentum=0.9), ValueError, "momentum_buffer must be given where momentum is not 0"),
        ("momentum", dict(momentum=1.0), ValueError, r"momentum must be in \[0, 1\), got 1.0"),
        ("adagrad", dict(eps=-1.0), ValueError, "eps must be finite and >= 0, got -1.0"),
        ("adam", dict(betas=(0.9, 1.0)), ValueError, r"betas\[1\] must be in \[0, 1\), got 1.0"),
        ("adam", dict(betas=0.9), TypeError, "betas must be a pair of numbers, got float"),
        ("adam", dict(betas=(0.9,)), ValueError, "betas must be a pair of numbers, got 1 of them"),
        ("adam", dict(betas=(0.9, None)), TypeError, r"betas\[1\] must be a number, got NoneType"),
        ("adam", dict(exp_avg_sq=None), TypeError, "exp_avg_sq must be a Tensor, got NoneType"),
        ("adam", dict(step=None), TypeError, "step must be a Tensor, got NoneType"),
        ("adagrad", dict(eps=None), TypeError, "eps must be a number, got NoneType"),
        ("adagrad", dict(state_sum=None), TypeError, "state_sum must be a Tensor, got NoneType"),
        ("rowwise_adagrad", dict(state_sum=None), TypeError, "state_sum must be a Tensor, got NoneType"),
        ("momentum", dict(momentum="0.9"), TypeError, "momentum must be a number, got str"),
        ("adam", dict(step=torch.zeros(11)), ValueError, "step must be int64, got torch.float32"),
        ("adagrad", dict(state_sum=torch.zeros(11).double()), RuntimeError, "state_sum must have shape"),
        ("rowwise_adagrad", dict(state_sum=torch.zeros(11)), ValueError, "state_sum must have the dtype"),
    ],
)  # fmt: skip
def test_each_rules_own_arguments_are_checked(rule, arguments, error, message):
    table = Table(rule)
    function = getattr(functional, f"mba_{'sgd' if rule == 'momentum' else rule}_")
    with pytest.raises(error, match=message):
        function(table.weight, **{**table.state, "ids": IDS, "grad": GRAD, "lr": 0.1, **arguments})


@pytest.mark.parametrize(
    "weight, error, message",
    [
        (torch.zeros(5, 11).double().t(), RuntimeError, "weight must be contiguous: it is updated in place"),
        (torch.zeros(5).double(), ValueError, "weight must be 2-D, got 1-D"),
        (torch.zeros(11, 5).half(), ValueError, "weight must be float32 or float64, got float16"),
    ],
)
def test_weights_that_cannot_be_updated_are_refused(weight, error, message):
    with pytest.raises(error, match=message):
        functional.mba_sgd_(weight, IDS, GRAD, lr=0.1)


@EVERY_RULE
def test_a_gradient_that_is_part_of_what_is_updated_is_refused(rule):
    table = Table(rule)
    for name, written in {"weight": table.weight, **table.state}.items():
        if written.dim() == 2:
            for grad in (written[2:4], written[2:4, :1].expand(2, 5), written.t()[:2, :5]):
                before = bits(table.tensors)
                with pytest.raises(RuntimeError, match=f"grad must not share memory with {name}"):
                    table.update(functional, IDS, grad)
                assert bits(table.tensors) == before


def test_a_gradient_beside_the_weight_is_accepted():
    memory = torch.randn(13, 5, dtype=torch.float64)
    for weight, grad in [(memory[:11], memory[11:]), (memory[2:], memory[:2])]:
        functional.mba_sgd_(weight, IDS, grad, lr=0.1)


def test_the_operators_alone_refuse_what_they_would_ignore():
    weight, operator = torch.zeros(11, 5, dtype=torch.float64), torch.ops.dien_ops.mba_sgd_
    with pytest.raises(RuntimeError, match=r"momentum_buffer must be given where momentum is not 0, got momentum=0.9"):
        operator(weight, None, IDS, GRAD, None, None, 0.1, 0.01, 0.9)
    for padding_idx in (-1, 11):
        with pytest.raises(RuntimeError, match=f"padding_idx must be in 0..10, got {padding_idx}"):
            operator(weight, None, IDS, GRAD, None, padding_idx, 0.1, 0.01, 0.0)


# ----------------------------------------------------------------------------------------------- MBAEmbedding


def test_it_is_torchs_embedding_with_sparse_gradients():
    table = dien_ops.MBAEmbedding(7, 3, padding_idx=0)
    assert isinstance(table, torch.nn.Embedding)
    ids = torch.tensor([[1, 0], [6, 1]])
    torch.testing.assert_close(table(ids), torch.nn.functional.embedding(ids, table.weight))
    table(ids).sum().backward()
    assert table.weight.grad.is_sparse
    assert not table.weight[0].any() and not table.weight.grad.to_dense()[0].any()


@pytest.mark.parametrize("wrong", [-1, 7])
def test_an_id_out_of_range_is_named(wrong):
    with pytest.raises(IndexError, match=f"ids must be in 0..6, got {wrong}"):
        dien_ops.MBAEmbedding(7, 3)(torch.tensor([[1, 2], [wrong, 9]]))


def test_counts_are_instances_that_hold_the_id():
    table = dien_ops.MBAEmbedding(6, 2, padding_idx=0)
    assert table.counts is None
    table.count_(torch.tensor([[1, 1, 2], [3, 1, 0]])).count_(torch.tensor([5, 5]))
    assert table.counts.tolist() == [0, 2, 1, 1, 0, 2]
    assert table.counts.dtype == torch.int64


def test_counts_can_be_occurrences():
    table = dien_ops.MBAEmbedding(6, 2, padding_idx=0)
    table.count_(torch.tensor([[[1, 1], [2, 0]]], dtype=torch.int32), occurrences=True)
    assert table.counts.tolist() == [0, 2, 1, 0, 0, 0]


def test_counting_goes_on_from_given_counts_and_leaves_them_alone():
    given = torch.ones(3)
    table = dien_ops.MBAEmbedding(3, 2, counts=given)
    table.count_(torch.tensor([2, 2]))
    assert table.counts.tolist() == [1, 1, 3] and given.tolist() == [1, 1, 1]


def test_counting_an_id_out_of_range_counts_nothing():
    table = dien_ops.MBAEmbedding(3, 2, counts=torch.ones(3, dtype=torch.int64))
    with pytest.raises(IndexError, match=r"ids must be in 0..2, got 3"):
        table.count_(torch.tensor([[0, 3]]))
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
    return {"weight": torch.zeros(rows, 2), "counts": counts}


NO_COUNTS, INTEGERS, FLOATS = None, torch.tensor([9, 8, 7, 6]), torch.tensor([0.5, 2.7, 1.0, 3.0]).double()


@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
@pytest.mark.parametrize("before", [NO_COUNTS, INTEGERS, FLOATS], ids=["none", "integers", "floats"])
@pytest.mark.parametrize("saved", [INTEGERS.int(), INTEGERS, FLOATS.float(), FLOATS], ids=lambda x: str(x.dtype))
def test_loaded_counts_are_those_that_were_saved(before, saved, assign):
    table = dien_ops.MBAEmbedding(4, 2, counts=before)
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
    table = dien_ops.MBAEmbedding(4, 2, counts=before)
    model = torch.nn.ModuleDict({"table": table})
    with pytest.raises(RuntimeError, match=message):
        model.load_state_dict({f"table.{k}": v for k, v in state_with(saved).items()}, assign=assign)
    if before is None:
        assert table.counts is None
    else:
        assert torch.equal(table.counts, before) and table.counts.dtype == before.dtype


def test_from_pretrained_needs_a_tensor():
    with pytest.raises(TypeError, match="embeddings must be a Tensor, got NoneType"):
        dien_ops.MBAEmbedding.from_pretrained(None)


def test_from_pretrained_starts_from_the_given_rows():
    rows = torch.randn(4, 2)
    table = dien_ops.MBAEmbedding.from_pretrained(rows, freeze=False, padding_idx=1, counts=torch.ones(4))
    assert torch.equal(table.weight, rows) and table.weight.requires_grad
    assert table.padding_idx == 1 and table.counts.tolist() == [1, 1, 1, 1]


def owners_of(weight: Tensor) -> list[dien_ops.MBAEmbedding]:
    from dien_ops.embedding import owners

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


def test_inference_compiles_to_one_graph():
    torch._dynamo.reset()
    table = dien_ops.MBAEmbedding(7, 3)
    compiled = torch.compile(table, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        for ids in (torch.tensor([1, 2]), torch.tensor([1, 2, 6])):
            assert torch.equal(compiled(ids), table(ids))
