# SPDX-License-Identifier: Apache-2.0
"""The benchmarks' contestants: each does its problem's work, whose operations and bytes are counted right."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import pytest
import torch

from bench import composed, harness, rivals, rivals_attention, rivals_dice, rivals_embedding

EVERY_RULE = set(rivals_embedding.RULES)
RULES_OF_TORCH = {rivals_embedding.SGD, rivals_embedding.ADAGRAD, rivals_embedding.ADAM}
RULES_OF = {
    rivals_embedding.ours: EVERY_RULE,
    rivals_embedding.composed: RULES_OF_TORCH,
    rivals_embedding.unique: EVERY_RULE,
    rivals_embedding.without_l2: RULES_OF_TORCH,
    rivals_embedding.dense: {rivals_embedding.SGD},
    rivals_embedding.fbgemm: {rivals_embedding.SGD, rivals_embedding.ROWWISE},
}


def small_update(kind=rivals_embedding.ZIPF, **more) -> rivals_embedding.Update:
    table = rivals_embedding.Table(300, 200, kind)
    return rivals_embedding.Update((table,), **{"dim": 8, "batches": 2, **more})


@pytest.mark.parametrize("train", [False, True], ids=["forward", "training"])
@pytest.mark.parametrize(
    "factory, problem",
    [
        (rivals.ours, rivals.Recurrence(4, 3, 5, 6, uniform_lengths=True)),
        (rivals.ours, rivals.Recurrence(4, 3, 5, 6, attention=True)),
        (rivals.nn_gru, rivals.Recurrence(4, 3, 5, 6)),
        (rivals.python_loop, rivals.Recurrence(4, 3, 5, 6, attention=True)),
        (rivals.deepctr_torch, rivals.Recurrence(4, 3, 5, 6, attention=True)),
    ],
    ids=["ours", "ours_augru", "nn_gru", "python_loop", "deepctr_torch"],
)
def test_contestants_do_the_same_work(factory, problem, train):
    try:
        contestant = factory(replace(problem, train=train))
    except harness.Unavailable as reason:
        pytest.skip(str(reason))
    assert harness.check("contestant", contestant) < 1e-5


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("lengths", [False, True])
@pytest.mark.parametrize("factory", [composed.ours, composed.eager])
@pytest.mark.parametrize(
    "problem",
    [
        *(rivals_attention.Unit(4, 5, 3, (7, 2), x) for x in ("sigmoid", "prelu")),
        rivals_attention.Unit(4, 5, 3, (7, 2), softmax=True, targets=2),
        rivals_attention.Bilinear(4, 5, 6, 3),
        rivals_attention.Bilinear(4, 5, 6, 3, targets=2),
        rivals_attention.Auxiliary(4, 5, 6),
    ],
    ids=lambda p: p.name,
)
def test_contestants_of_the_attention_column_do_the_same_work(factory, problem, lengths, train):
    contestant = factory(replace(problem, train=train, uniform_lengths=lengths))
    assert harness.check("contestant", contestant) is not None
    inert = problem.name.startswith("B4 C2 T5 D3")  # with softmax, the output's bias
    assert len(contestant.read(contestant.call())) == (1 + len(problem.shapes) - inert if train else 1)


def test_dice_of_the_eager_unit_is_that_of_the_batch():
    problem = rivals_attention.Unit(4, 5, 3, (7, 2), "dice", train=True)
    assert harness.check("eager", composed.eager(problem)) is not None


@pytest.mark.parametrize("train", [False, True], ids=["forward", "training"])
@pytest.mark.parametrize("batch_statistics", [False, True], ids=["averages", "batch"])
@pytest.mark.parametrize("factory", [composed.ours, composed.eager, rivals_dice.batch_norm])
@pytest.mark.parametrize("steps, lengths", [(None, False), (4, False), (4, True)])
def test_contestants_of_dice_do_the_same_work(factory, steps, lengths, batch_statistics, train):
    problem = rivals_dice.Activation(30, 5, steps, batch_statistics, train=train, uniform_lengths=lengths)
    if factory is rivals_dice.batch_norm and lengths:
        with pytest.raises(harness.Unavailable, match="padding would count"):
            harness.check("contestant", factory(problem))
    else:
        assert harness.check("contestant", factory(problem)) < 1e-5


def test_bytes_of_dice_are_those_of_its_passes():
    p = rivals_dice.Activation(10, 8)
    tensor = 10 * 8 * 4
    assert (p.bytes, replace(p, batch_statistics=False).bytes) == (3 * tensor, 2 * tensor)
    assert replace(p, train=True).bytes == 8 * tensor
    assert replace(p, dtype=torch.bfloat16, train=True).bytes == 4 * tensor
    padded = replace(p, steps=6, uniform_lengths=True)
    valid = int(padded.lengths.sum())
    assert padded.bytes == (2 * valid + 60) * 8 * 4 and replace(padded, train=True).bytes == (6 * valid + 120) * 8 * 4


@pytest.mark.parametrize("lookup", [False, True], ids=["update", "step"])
@pytest.mark.parametrize("rule", rivals_embedding.RULES)
@pytest.mark.parametrize("factory", RULES_OF, ids=lambda f: f.__name__)
def test_contestants_of_the_embedding_column_do_the_same_work(factory, rule, lookup):
    problem = small_update(rule=rule, lookup=lookup)
    if rule not in RULES_OF[factory]:
        with pytest.raises(harness.Unavailable):
            factory(problem)
        return
    try:
        contestant = factory(problem)
    except harness.Unavailable as reason:
        assert factory is rivals_embedding.fbgemm
        pytest.skip(str(reason))
    for _ in range(3):  # whatever stood there before
        # Adam's second moments change by a thousandth of them: the last digits of the change are lost.
        assert harness.check("contestant", contestant) < (5e-5 if rule == rivals_embedding.ADAM else 1e-5)


@pytest.mark.parametrize("factory", [f for f in RULES_OF if f is not rivals_embedding.fbgemm], ids=lambda f: f.__name__)
def test_several_tables_are_updated_in_one_step(factory):
    tables = rivals_embedding.Table(300, 40), rivals_embedding.Table(20, 50), rivals_embedding.Table(50, 7)
    contestant = factory(rivals_embedding.Update(tables, dim=5, lookup=True, batches=2))
    assert harness.check("contestant", contestant) < 1e-5


@pytest.mark.parametrize(
    "factory", [rivals_embedding.composed, rivals_embedding.unique, rivals_embedding.dense], ids=lambda f: f.__name__
)
def test_embedding_rivals_take_bfloat16(factory):
    assert harness.check("contestant", factory(small_update(dtype=torch.bfloat16))) > 0


@pytest.mark.parametrize("kind", [rivals_embedding.ZIPF, rivals_embedding.ONE_IN_A_THIRD])
def test_an_update_that_leaves_out_the_decay_or_does_nothing_is_wrong(kind):
    problem = small_update(kind)
    right, wrong = rivals_embedding.composed(problem), rivals_embedding.without_l2(problem)
    for call in (wrong.call, lambda: None):
        with pytest.raises(harness.WrongResult):
            harness.check("wrong", replace(right, call=call))
    assert harness.check("right", right) < 1e-5


def test_contestants_share_tables_and_no_mini_batch_comes_again_before_all_others_had_their_turn(monkeypatch):
    problem = small_update(batches=5)
    data = rivals_embedding.data_of(problem)
    assert rivals_embedding.data_of(replace(problem, rule=rivals_embedding.ADAM, lookup=True)) is data
    used = []

    def use(rule, weight, states, batch, counts):
        used.append(batch)

    monkeypatch.setattr(rivals_embedding, "_update_unique", use)
    contestants = [rivals_embedding.unique(problem) for _ in range(2)]
    for one in contestants * 5:
        one.call()
    assert [id(b) for b in used] == 2 * [id(b) for (b,) in data.batches]
    assert len({id(b) for b in used}) == 5
    gone = weakref.ref(data)
    used.clear()
    del data, contestants, one
    gc.collect()
    assert gone() is None


def test_ids_are_drawn_by_zipfs_law():
    table = rivals_embedding.Table(1000, 400_000)
    ids = rivals_embedding.draw(table, torch.Generator().manual_seed(0))
    shares = ids.bincount(minlength=1000).sort(descending=True).values / table.ids
    ranks = torch.arange(1, 1001)
    expected = 1 / ranks / (1 / ranks).sum()
    assert shares[:50].tolist() == pytest.approx(expected[:50].tolist(), rel=0.1)
    assert shares[100:].sum().item() == pytest.approx(expected[100:].sum().item(), rel=0.02)
    third = rivals_embedding.draw(
        replace(table, kind=rivals_embedding.ONE_IN_A_THIRD), torch.Generator().manual_seed(0)
    )
    assert third.bincount().max().item() / table.ids == pytest.approx(1 / 3, rel=0.02)


def test_bytes_of_an_update_are_those_of_its_gradient_and_of_each_row_once():
    problem = rivals_embedding.Update((rivals_embedding.Table(4, 1000, rivals_embedding.UNIFORM),), dim=6, batches=1)
    count = step = 8

    def moved(**more):
        changed = replace(problem, **more)
        return rivals_embedding.bytes_of(changed, rivals_embedding.data_of(changed))

    given = 1000 * (8 + 6 * 4) + 4 * count  # all four rows occur
    row = 4 * 6 * 4
    assert moved() == given + 2 * row
    assert moved(rule=rivals_embedding.MOMENTUM) == given + 2 * 2 * row
    assert moved(rule=rivals_embedding.ROWWISE) == given + 2 * (row + 4 * 4)
    assert moved(rule=rivals_embedding.ADAM) == given + 2 * (3 * row + 4 * step)
    # float32 states beside 16-bit weights
    assert moved(rule=rivals_embedding.ADAGRAD, dtype=torch.bfloat16) == 1000 * (8 + 12) + 4 * count + 2 * 1.5 * row


def test_what_uniform_ids_touch_is_at_most_the_table_and_a_line_for_each_id():
    def touched(rows, ids):
        problem = rivals_embedding.Update((rivals_embedding.Table(rows, ids),), dim=16, batches=1)
        return rivals_embedding.touched_bytes(problem)

    assert touched(1000, 10**6) == pytest.approx(1000 * (64 + 8))
    assert touched(10**9, 1000) == pytest.approx(1000 * (64 + 64), rel=1e-4)


@pytest.mark.parametrize("factory", [rivals.ours, rivals.ours_on_copies, rivals.python_loop])
def test_copies_of_a_history_give_what_its_targets_give(factory):
    assert harness.check("contestant", factory(rivals.Recurrence(2, 3, 5, 6, attention=True, targets=4))) < 1e-5


def test_operations_and_bytes_are_counted_once_per_sequence_for_the_input_and_thrice_for_training():
    p = rivals.Recurrence(2, 10, 3, 5, attention=True)
    assert p.flops == 2 * 2 * 10 * (3 + 5) * 15
    assert replace(p, train=True).flops == 3 * p.flops
    assert replace(p, targets=4).flops == 2 * 2 * 10 * (3 + 4 * 5) * 15
    assert p.bytes == 4 * (2 * 10 * (3 + 1) + 15 * (3 + 5 + 2) + 2 * 10 * 5)
    assert replace(p, train=True, dtype=torch.bfloat16).bytes == 3 * p.bytes / 2
    padded = replace(p, uniform_lengths=True)
    assert padded.flops == p.flops * padded.valid_steps / 20
