# SPDX-License-Identifier: Apache-2.0
"""What concerns only the CUDA kernels of the sparse updates: how a mini-batch is cut into segments, pieces and blocks, many
tables in one launch, addresses beyond 32 bits. Values, options and errors of a table: test_embedding*.py, which run on them too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from helpers import assert_close, begins_anywhere

pytestmark = pytest.mark.usefixtures("cuda_kernels")

F64 = torch.float64
PIECE, SUPER, TILE, TABLES_PER_LAUNCH = 32, 1024, 96, 16  # csrc/cuda/embedding_tables.cuh
RULES = {  # the numbers that an operator takes behind l2
    "sgd": [0.0],
    "momentum": [0.9],
    "adagrad": [1e-3],
    "rowwise_adagrad": [1e-3],
    "adam": [0.8, 0.99, 1e-3],
}
STATES = ["momentum_buffer", "state_sum", "exp_avg", "exp_avg_sq", "row_sum", "step"]
NO_STATES = dict.fromkeys(STATES, torch.empty(0))
DIMS = [1, 3, 17, 18, 64, 129]
EPS = {torch.float32: 1e-5, F64: 1e-12, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@dataclass
class Table:
    """A table with its mini-batch and all states that a rule can have."""

    weight: Tensor
    ids: Tensor
    grad: Tensor
    counts: Tensor | None = None
    padding: int = -1
    seed: int = 0
    states: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        wide = F64 if self.weight.dtype == F64 else torch.float32
        of_row = {"row_sum": wide, "step": torch.int64}
        for name in () if self.states else STATES:
            shape = self.weight.shape[:1] if name in of_row else self.weight.shape
            self.states[name] = torch.zeros(shape, dtype=of_row.get(name, wide))

    def clone(self) -> Table:
        states = {name: state.clone() for name, state in self.states.items()}
        return Table(self.weight.clone(), self.ids, self.grad, self.counts, self.padding, self.seed, states)

    def tensors(self) -> list[Tensor]:
        return [self.weight, *self.states.values()]


def random_table(rows: int, dim: int, ids: Tensor | Sequence[int], dtype=torch.float32, **options) -> Table:
    ids = torch.as_tensor(ids)
    return Table(torch.randn(rows, dim).to(dtype), ids, torch.randn(len(ids), dim).to(dtype), **options)


def exact_table(rows: int, dim: int, ids: Tensor | Sequence[int], dtype=torch.float32) -> Table:
    """Small integers for gradients, whose sums are exact in any order, and a weight of 0: after SGD with lr = 1 and l2 = 0 the
    weight is minus the sums."""
    ids = torch.as_tensor(ids)
    return Table(torch.zeros(rows, dim, dtype=dtype), ids, torch.randint(-8, 9, (len(ids), dim)).to(dtype))


def update(rule: str, tables: Sequence[Table], *, lr=0.1, l2=0.3, decay="mini_batch_aware", nonfinite="propagate",
           check_ids=True, stochastic=False, grad_scale=None, found_inf=None, decayed=None, log_decays=()) -> None:  # fmt: skip
    def states(*names: str) -> list[list[Tensor]]:
        return [[t.states[name] for t in tables] for name in names]

    of_rule = {
        "sgd": [[], decayed or []],
        "momentum": [*states("momentum_buffer"), []],
        "adagrad": states("state_sum"),
        "rowwise_adagrad": states("row_sum"),
        "adam": states("exp_avg", "exp_avg_sq", "step"),
    }[rule]
    counted = any(t.counts is not None for t in tables)
    counts = [torch.ones(t.weight.shape[0]) if t.counts is None else t.counts for t in tables] if counted else []
    operator = getattr(torch.ops.dien_ops, f"mba_{'sgd' if rule == 'momentum' else rule}_")
    operator(
        [t.weight for t in tables],
        *of_rule,
        [t.ids for t in tables],
        [t.grad for t in tables],
        counts,
        [t.padding for t in tables],
        [t.seed for t in tables] if stochastic else [],
        *([list(log_decays)] if rule in ("sgd", "momentum") else []),
        grad_scale,
        found_inf,
        decay,
        nonfinite,
        check_ids,
        lr,
        l2,
        *RULES[rule],
    )


def updated(rule: str, tables: Sequence[Table], **options) -> list[list[Tensor]]:
    """The tensors of copies of the tables after an update of them."""
    copies = [t.clone() for t in tables]
    update(rule, copies, **options)
    return [t.tensors() for t in copies]


def by_hand(rule: str, t: Table, *, lr=0.1, l2=0.3, decay="mini_batch_aware", scale=1.0) -> list[Tensor]:
    """The same in float64, row by row, for ids in any range."""
    w = t.weight.to(F64)
    s = {name: state.to(F64) if state.is_floating_point() else state.clone() for name, state in t.states.items()}
    rows, a = w.shape[0], RULES[rule]
    for j in sorted({j for j in t.ids.tolist() if 0 <= j < rows and j != t.padding}):
        g = t.grad[t.ids == j].to(F64).sum(0) / scale
        share = l2 / (1.0 if t.counts is None else float(t.counts[j]))
        kept = 1.0
        if decay == "decoupled":
            kept = 1 - lr * share
        else:
            g = g + share * w[j]
        if rule == "sgd":
            step = g
        elif rule == "momentum":
            step = s["momentum_buffer"][j] = a[0] * s["momentum_buffer"][j] + g
        elif rule == "adagrad":
            s["state_sum"][j] += g**2
            step = g / (s["state_sum"][j].sqrt() + a[0])
        elif rule == "rowwise_adagrad":
            s["row_sum"][j] += (g**2).mean()
            step = g / (s["row_sum"][j].sqrt() + a[0])
        else:
            s["step"][j] += 1
            n = int(s["step"][j])
            m = s["exp_avg"][j] = a[0] * s["exp_avg"][j] + (1 - a[0]) * g
            v = s["exp_avg_sq"][j] = a[1] * s["exp_avg_sq"][j] + (1 - a[1]) * g**2
            step = m / (1 - a[0] ** n) / ((v / (1 - a[1] ** n)).sqrt() + a[2])
        w[j] = kept * w[j] - lr * step
    return [w, *s.values()]


def assert_by_hand(rule: str, tables: Sequence[Table], **options) -> None:
    scale = options.get("grad_scale")
    hand = {key: options[key] for key in ("lr", "l2", "decay") if key in options}
    for t, got in zip(tables, updated(rule, tables, **options), strict=True):
        expected = by_hand(rule, t, scale=1.0 if scale is None else float(scale), **hand)
        assert_close([x.to(F64) for x in got], [x.to(F64) for x in expected], EPS[t.weight.dtype])


def assert_sums(tables: Sequence[Table], **options) -> None:
    """Of exact_table's."""
    for t, got in zip(tables, updated("sgd", tables, lr=1.0, l2=0.0, **options), strict=True):
        counted = (t.ids >= 0) & (t.ids < t.weight.shape[0]) & (t.ids != t.padding)
        expected = torch.zeros_like(t.weight, dtype=F64).index_add(0, t.ids[counted].long(), -t.grad[counted].to(F64))
        assert torch.equal(got[0].to(F64), expected)


def assert_same_bits(actual: Sequence[Sequence[Tensor]], expected: Sequence[Sequence[Tensor]]) -> None:
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        for x, y in zip(a, e, strict=True):
            assert torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8)), f"table {i}"


def in_random_order(lengths: Sequence[int]) -> Tensor:
    """Ids of which i occurs lengths[i] times."""
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return ids[torch.randperm(len(ids))]


def tables_of_all_dims(dtype=torch.float32) -> list[Table]:
    tables = []
    for i, dim in enumerate(DIMS):
        ids = torch.randint(9, (20 + i,))
        counts = torch.randint(1, 9, (9,)).to([torch.int32, torch.int64, torch.float32, F64][i % 4])
        tables.append(
            random_table(9, dim, ids.int() if i % 2 else ids, dtype, counts=counts, padding=i % 3 - 1, seed=i)
        )
    return tables


# -------------------------------------------------------------------------------------------------------------- the values


@pytest.mark.parametrize("dtype", EPS, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_tables_of_any_dimension_are_updated_by_every_rule(rule, dtype):
    assert_by_hand(rule, tables_of_all_dims(dtype))


@pytest.mark.parametrize("rule", RULES)
def test_a_second_update_goes_on_from_the_first_ones_state(rule):
    tables = tables_of_all_dims(F64)
    update(rule, tables)
    assert_by_hand(rule, tables, decay="decoupled")


def test_adam_corrects_for_any_number_of_updates():
    t = random_table(5, 3, [0, 1, 2, 3], F64)
    t.states["step"] += torch.tensor([0, 9, 999, 2**40, 5])
    assert_by_hand("adam", [t])


@pytest.mark.parametrize("rule", RULES)
def test_every_order_of_threads_gives_the_same_bits(rule, order, request):
    tables = [*tables_of_all_dims(), random_table(5, 18, in_random_order([1, 40, 7, 0, 1100]))]
    got = updated(rule, tables)
    if request.config.getoption("--device") == "cpu":
        request.getfixturevalue("set_executor")(order="in_order")
    assert_same_bits(got, updated(rule, tables))


@pytest.mark.parametrize("moved", ["weight", "grad", "exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("dtype", EPS, ids=str)
def test_each_tensor_may_begin_anywhere(dtype, moved):
    """That one alone: the rows of the others could be moved in chunks."""
    tables = [random_table(7, dim, torch.randint(7, (50,)), dtype) for dim in (4, 8, 16)]
    aligned = updated("adam", tables)
    for t in tables:
        if moved in t.states:
            t.states[moved] = begins_anywhere(t.states[moved])
        else:
            setattr(t, moved, begins_anywhere(getattr(t, moved)))
    update("adam", tables)
    assert_same_bits([t.tensors() for t in tables], aligned)


def test_tables_without_numbers():
    ids = torch.tensor([2, 0, 2])
    nothing = [
        random_table(4, 0, ids),  # no columns: its rows are updated all the same
        random_table(0, 5, ids[:0]),
        random_table(3, 5, ids[:0]),
        random_table(0, 0, ids[:0]),
    ]
    for rule in RULES:
        tables = [*nothing, random_table(4, 5, ids)]
        assert_by_hand(rule, tables[1:])
        got = updated(rule, tables)
    assert got[0][-1].tolist() == [1, 0, 1, 0]


def test_lazy_decay_is_paid_when_a_row_is_touched():
    t = random_table(300, 3, torch.randint(300, (500,)), F64)
    decayed = -torch.rand(300).to(F64)
    before, touched = decayed.clone(), torch.zeros(300, dtype=torch.bool).index_fill(0, t.ids, True)
    sums = torch.zeros(300, 3, dtype=F64).index_add(0, t.ids, t.grad)
    expected = torch.where(touched[:, None], (-1.5 - before).exp()[:, None] * t.weight - 0.1 * sums, t.weight)
    update("sgd", [t], decay="lazy", decayed=[decayed], log_decays=[-1.5])
    assert_close([t.weight], [expected])
    assert torch.equal(decayed, torch.where(touched, -1.5, before))


# --------------------------------------------------------------------------------------------- segments, pieces and blocks

LENGTHS = [n + d for n in (PIECE, 2 * PIECE, TILE, SUPER, SUPER + PIECE, 2 * SUPER) for d in (-1, 0, 1)]


@pytest.mark.parametrize("dim", [1, 6])
def test_segments_of_any_length_are_summed_whole(dim):
    lengths = [1, 2, *LENGTHS, 3 * SUPER + 5, 3]
    shuffled = [lengths[i] for i in torch.randperm(len(lengths)).tolist()]
    assert_sums([exact_table(len(shuffled), dim, in_random_order(shuffled))])


@pytest.mark.parametrize("length", LENGTHS)
def test_one_id_may_fill_the_batch(length):
    assert_sums([exact_table(3, 2, torch.full((length,), 1))])


@pytest.mark.parametrize("before", [0, 1, PIECE - 1, PIECE, PIECE + 1, TILE - 1, TILE])
def test_a_long_segment_may_begin_anywhere(before):
    """Behind rows that occur once, and in front of others."""
    ids = torch.cat(
        [torch.arange(before), torch.full((2 * SUPER + 70,), before), torch.arange(before + 1, before + 40)]
    )
    assert_sums([exact_table(before + 40, 2, ids[torch.randperm(len(ids))])])


@pytest.mark.parametrize("count", [1, TILE - 1, TILE, TILE + 1, 2 * TILE, 2 * TILE + PIECE])
def test_rows_that_occur_once_fill_blocks(count):
    assert_sums([exact_table(count, 3, torch.randperm(count))])


def test_a_segment_across_two_blocks_is_summed_by_the_first():
    for length in (2, PIECE - 1, PIECE, PIECE + 1):
        for first in range(TILE - 3, TILE + 2):
            ids = torch.cat([torch.arange(first), torch.full((length,), first), torch.arange(first + 1, first + 4)])
            assert_sums([exact_table(first + 4, 1, ids)])


def test_positions_that_are_left_out_may_be_most_of_a_batch():
    ids = torch.randint(-40, 80, (1500,))
    ids[torch.rand(1500) < 0.5] = 7
    tables = []
    for begin in (0, 100, 1400):
        t = exact_table(30, 5, ids[begin:])
        t.padding = 7
        t.grad[(t.ids < 0) | (t.ids >= 30) | (t.ids == 7)] = math.nan
        tables.append(t)
    assert_sums(tables, check_ids=False)


def test_rows_that_are_left_out_need_no_count():
    counts = torch.tensor([1.0, 0.0, math.nan, -1.0])  # padding, and rows that the batch does not name
    t = random_table(4, 3, [0, 1, 0, 9, -7], F64, counts=counts, padding=1)
    assert_by_hand("adam", [t], check_ids=False)


def test_counts_are_read_in_their_own_precision():
    counts = [
        torch.full((4,), 2**40 + 1),
        torch.full((4,), 0.1, dtype=F64),
        torch.full((4,), 2**24 + 1, dtype=torch.int32),
    ]
    for n in counts:
        assert_by_hand("sgd", [random_table(4, 3, [1, 2, 1], F64, counts=n)], l2=0.3 * float(n[0]))


@pytest.mark.parametrize("decay", ["mini_batch_aware", "decoupled"])
@pytest.mark.parametrize("rule", RULES)
def test_long_segments_are_updated_by_every_rule(rule, decay):
    lengths = [3, 40, 1, 1100, 33, 2]
    tables = [random_table(6, dim, in_random_order(lengths), F64, counts=torch.arange(1, 7)) for dim in (2, 130)]
    assert_by_hand(rule, tables, decay=decay, grad_scale=torch.tensor([4.0]))


def test_long_sums_of_16_bit_gradients_are_float32s():
    t = random_table(1, 2, torch.zeros(5000, dtype=torch.int64), torch.bfloat16)
    t.grad.fill_(1.0)  # in bfloat16 the sum would stay at 256
    (got,) = updated("adagrad", [t], l2=0.0)
    assert got[2].tolist() == [[25e6, 25e6]]


# ------------------------------------------------------------------------------------------------------------- many tables


def test_a_table_does_not_depend_on_the_others():
    lengths = [1, 33, 5, 1100, 64, 2]
    table = random_table(6, 6, in_random_order(lengths))
    others = [random_table(300, dim, torch.randint(300, (n,))) for dim, n in ((3, 501), (64, 17), (1, 225))]
    for rule in RULES:
        alone = updated(rule, [table])
        for place in range(len(others) + 1):
            got = updated(rule, [*others[:place], table, *others[place:]])
            assert_same_bits([got[place]], alone)


def many_tables() -> list[Table]:
    tables = []
    for i in range(2 * TABLES_PER_LAUNCH + 3):
        rows, batch = 1 + 7 * i % 31, 13 * i % 300
        tables.append(exact_table(rows, 1 + i % 5, torch.randint(rows, (batch,))))
    return tables


def test_a_call_takes_more_tables_than_a_launch():
    assert_sums(many_tables())
    assert_by_hand("adagrad", many_tables(), grad_scale=torch.tensor([4.0]))


@pytest.mark.parametrize("number", [0, TABLES_PER_LAUNCH - 1, TABLES_PER_LAUNCH, 2 * TABLES_PER_LAUNCH + 2])
@pytest.mark.not_on_cuda(reason="a device-side assertion ends the process")
def test_whatever_is_wrong_is_found_before_any_table_changes(number):
    tables = many_tables()
    tables[number] = random_table(5, 3, [1, 2, 4, 2])
    wrong = tables[number]
    counts = [torch.ones(t.weight.shape[0]) for t in tables]
    for t, n in zip(tables, counts, strict=True):
        t.counts = n
    before = [t.clone() for t in tables]

    def refused(message: str, **options) -> None:
        with pytest.raises(RuntimeError, match=message):
            update("adam", tables, **options)
        assert_same_bits([t.tensors() for t in tables], [t.tensors() for t in before])

    wrong.ids[2] = 5
    refused(rf"table {number}: ids must be in 0\.\.4, got 5 at position 2")
    wrong.ids[2] = -1
    refused(rf"table {number}: ids must be in 0\.\.4, got -1 at position 2")
    wrong.ids[2] = 4
    for count in (0.0, -1.5, math.nan):
        counts[number][4] = count
        refused(rf"table {number}: counts must be positive .*, got {count:g} for id 4")
    counts[number][4] = 0.5
    wrong.grad[3, 2] = math.inf
    refused(rf"table {number}: grad must be finite, got inf at position 3 \(id 2\), column 2", nonfinite="error")
    update("adam", tables)


@pytest.mark.not_on_cuda(reason="a device-side assertion ends the process")
def test_a_table_that_has_a_launch_for_itself_has_a_number_all_the_same():
    tables = [random_table(5, 3, [1, 2]) for _ in range(TABLES_PER_LAUNCH + 1)]
    tables[-1].ids[1] = 5
    with pytest.raises(RuntimeError, match=rf"^table {TABLES_PER_LAUNCH}: ids must be in 0\.\.4, got 5 at position 1"):
        update("sgd", tables)


@pytest.mark.not_on_cuda(reason="a device-side assertion ends the process")
def test_one_table_needs_no_number():
    t = random_table(5, 3, [1, 5])
    with pytest.raises(RuntimeError, match=r"^ids must be in 0\.\.4, got 5 at position 1"):
        torch.ops.dien_ops.mba_check([t.weight], [t.ids], [t.grad], [], [-1], "propagate", True)


# -------------------------------------------------------------------------------------------------- gradients, found_inf


@pytest.mark.parametrize("dtype", EPS, ids=str)
def test_a_table_with_a_gradient_that_is_not_finite_is_skipped_alone(dtype):
    """Wherever it stands: in the first or last row or column, of a table of several blocks."""
    sizes = [(1, 5), (600, 2), (70, 129), (600, 6), (5, 17), (3, 3)]
    tables = [random_table(20, dim, torch.randint(1, 20, (batch,)), dtype, padding=0) for batch, dim in sizes]
    places = [(0, 0), (599, 1), (69, 128), (511, 3), None, None]
    for t, place, value in zip(tables, places, [math.nan, math.inf, -math.inf, math.nan, 0, 0], strict=True):
        if place is not None:
            t.grad[place] = value
    tables[5].ids[1] = 0
    tables[5].grad[1, 2] = math.nan  # of padding
    got = updated("adam", tables, nonfinite="skip")
    assert_same_bits(got[:4], [t.tensors() for t in tables[:4]])
    assert_same_bits(got[4:], updated("adam", tables[4:]))
    tables[5].grad[1, 2] = 0
    assert not any(torch.equal(a[0], t.weight) for a, t in zip(got[4:], tables[4:], strict=True))


@pytest.mark.parametrize("number", [3, TABLES_PER_LAUNCH, 2 * TABLES_PER_LAUNCH + 2])
def test_of_more_tables_than_a_launch_takes_one_is_skipped_alone(number):
    tables = many_tables()
    expected = updated("adam", tables)
    tables[number].grad[-1, 0] = math.nan
    expected[number] = tables[number].tensors()
    assert_same_bits(updated("adam", tables, nonfinite="skip"), expected)


def test_a_gradient_of_many_blocks_is_looked_through_to_its_end():
    """More of them than a block has threads."""
    batch, dim = 128 * 4 * 16 + 1, 66  # 32 lanes for each row, 16 rows each
    t = random_table(2, dim, torch.ones(batch, dtype=torch.int64))
    t.grad[-1, -1] = math.nan
    assert_same_bits(updated("sgd", [t], nonfinite="skip"), [t.tensors()])


@pytest.mark.parametrize("rule", RULES)
def test_found_inf_keeps_every_bit_as_it_was(rule):
    tables = [random_table(9, 5, torch.randint(9, (40,))) for _ in range(3)]
    tables[1].grad[3] = math.nan
    got = updated(rule, tables, found_inf=torch.ones(1), nonfinite="error")
    assert_same_bits(got, [t.tensors() for t in tables])
    tables[1].grad[3] = 0
    assert_same_bits(updated(rule, tables, found_inf=torch.zeros(1)), updated(rule, tables))


# ------------------------------------------------------------------------------------------------------ addresses and keys


def test_tables_have_more_rows_than_32_bits_count():
    """The keys of what stands behind such a table have more bits, too."""
    rows = 2**40
    huge = [
        Table(torch.empty(rows, 0), torch.tensor([rows - 1, 0, 5]), torch.empty(3, 0), states=NO_STATES)
        for _ in range(2)
    ]
    table = exact_table(50, 3, torch.randint(50, (400,)))
    copy = table.clone()
    update("sgd", [huge[0], copy, huge[1]], lr=1.0, l2=0.0)
    assert_same_bits([[copy.weight]], [[updated("sgd", [table], lr=1.0, l2=0.0)[0][0]]])


@pytest.mark.parametrize("huge_first", [True, False])
def test_keys_and_positions_may_fill_a_word_but_not_more(huge_first):
    """16 positions, and as many keys as the other 60 bits count: each table has one more than rows."""
    table = exact_table(50, 3, torch.randint(50, (7,)))
    alone = updated("sgd", [table], lr=1.0, l2=0.0)[0][0]

    def update_with(rows: int) -> None:
        huge = Table(torch.empty(rows, 0), torch.full((9,), rows - 1), torch.empty(9, 0), states=NO_STATES)
        update("sgd", [huge, table] if huge_first else [table, huge], lr=1.0, l2=0.0)

    with pytest.raises(RuntimeError, match="more than 2\\^64 rows times ids"):
        update_with(2**60 - 51)
    update_with(2**60 - 52)
    assert torch.equal(table.weight, alone)


def test_a_table_has_more_numbers_than_32_bits_count():
    rows, dim = 2**28 + 2, 17
    try:
        weight = torch.empty(rows, dim, dtype=torch.bfloat16)  # pages that nobody touches take no memory
    except RuntimeError as error:
        pytest.skip(f"needs 9 GB of addresses: {error}")
    last = torch.arange(rows - 3, rows)
    weight[last] = 5
    grad = torch.randint(-8, 9, (7, dim)).bfloat16()
    ids = torch.tensor([rows - 1, rows - 2, rows - 1, rows - 3, rows - 1, rows - 2, rows - 1])
    update("sgd", [Table(weight, ids, grad, states=NO_STATES)], lr=1.0, l2=0.0)
    expected = torch.full((3, dim), 5.0).index_add(0, ids - (rows - 3), -grad.float())
    assert torch.equal(weight[last].float(), expected)


# ------------------------------------------------------------------------------------------------------------------- noise


def philox(counter: list[int], key: int) -> list[int]:
    """Philox4x32-10."""
    mask, key0, key1 = 2**32 - 1, key & (2**32 - 1), key >> 32
    for _ in range(10):
        a, b = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        counter = [(b >> 32) ^ counter[1] ^ key0, b & mask, (a >> 32) ^ counter[3] ^ key1, a & mask]
        key0, key1 = (key0 + 0x9E3779B9) & mask, (key1 + 0xBB67AE85) & mask
    return counter


def test_philox_is_the_published_one():
    assert philox([0] * 4, 0) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]  # its authors' known answers
    assert philox([2**32 - 1] * 4, 2**64 - 1) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


def noise(row: int, dim: int, seed: int) -> Tensor:
    words = [w for block in range(-(-dim // 8)) for w in philox([row & (2**32 - 1), row >> 32, block, 0], seed)]
    return torch.tensor([half for w in words for half in (w & 0xFFFF, w >> 16)][:dim])


@pytest.mark.parametrize("dim", [1, 3, 4, 17, 18, 24, 130])
def test_bfloat16_is_rounded_with_the_noise_of_seed_row_and_column(dim):
    tables = []
    for seed in (5, 2**63 - 1, -7):
        t = random_table(8, dim, [3, 0, 3, 7], torch.bfloat16, seed=seed)
        t.weight.zero_()
        tables.append(t)
    for t, got in zip(tables, updated("sgd", tables, lr=1.0, l2=0.0, stochastic=True), strict=True):
        exact = torch.zeros(8, dim).index_add(0, t.ids, -t.grad.float())
        for row in range(8):
            bits = exact[row].view(torch.int32).long() & 0xFFFFFFFF
            expected = (bits + noise(row, dim, t.seed % 2**64)) >> 16
            assert torch.equal(got[0][row].view(torch.int16).long() & 0xFFFF, expected)


def test_float16_is_rounded_to_a_neighbour_by_the_same_noise():
    t = random_table(8, 33, torch.randint(8, (40,)), torch.float16, seed=99)
    t.weight.zero_()
    t.grad *= 10.0 ** torch.randint(-5, 4, (40, 33))
    (got,) = updated("sgd", [t], lr=1.0, l2=0.0, stochastic=True)
    (plain,) = updated("sgd", [t], lr=1.0, l2=0.0)
    exact = updated("sgd", [Table(t.weight.float(), t.ids, t.grad.float())], lr=1.0, l2=0.0)[0][0]
    step = 2.0 ** (torch.frexp(exact)[1].clamp_min(-13) - 11)
    fraction = exact.abs() / step - (exact.abs() / step).floor()
    up = torch.stack([noise(row, 33, 99) for row in range(8)]) >= (1 - fraction) * 2**16
    magnitude = ((exact.abs() / step).floor() + up) * step
    near = (fraction * 2**13 - (fraction * 2**13).round()).abs() < 1e-6  # what 13 bits of the noise decide
    wrong = (got[0].float() != exact.sign() * magnitude) & (near | (exact.abs() < 2**-14))
    assert not wrong.any() and not torch.equal(got[0], plain[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_without_seeds_weights_are_rounded_to_the_nearest(dtype):
    t = random_table(8, 33, torch.randint(8, (20,)), dtype, seed=99)
    t.weight.zero_()
    exact = updated("sgd", [Table(t.weight.float(), t.ids, t.grad.float())], lr=1.0, l2=0.0)[0][0]
    assert torch.equal(updated("sgd", [t], lr=1.0, l2=0.0)[0][0], exact.to(dtype))


def test_noise_is_neither_of_the_others_in_the_call_nor_of_the_alignment():
    table = random_table(40, 24, torch.randint(40, (90,)), torch.bfloat16, seed=3)
    other = random_table(70, 5, torch.randint(70, (300,)), torch.bfloat16, seed=4)
    alone = updated("adam", [table], stochastic=True)
    assert_same_bits(updated("adam", [other, table], stochastic=True)[1:], alone)
    table.grad = begins_anywhere(table.grad)
    assert_same_bits(updated("adam", [table], stochastic=True), alone)
