# SPDX-License-Identifier: Apache-2.0
"""The embedding column: updates of a table's rows with mini-batch aware L2, beside what torch.optim and its operators
give, and FBGEMM where it is installed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bench import machine
from bench import rivals_embedding as rivals
from bench.harness import Unavailable
from bench.results import COPY, FLAT, Sweep, Target
from bench.rivals_embedding import (
    ADAGRAD,
    ADAM,
    COMPOSED,
    DENSE,
    FBGEMM,
    MOMENTUM,
    ONE_IN_A_THIRD,
    ROWWISE,
    UNIFORM,
    UNIQUE,
    WITHOUT_L2,
    ZIPF,
    Table,
    Update,
)

OURS = {"dien_ops": rivals.ours}
RIVALS = {
    COMPOSED: rivals.composed,
    UNIQUE: rivals.unique,
    WITHOUT_L2: rivals.without_l2,
    DENSE: rivals.dense,
    FBGEMM: rivals.fbgemm,
}
LONG = pytest.mark.long

ITEMS = Table(1_000_000)
KINDS = {"Zipf ids": ZIPF, "uniform ids": UNIFORM, "one id in a third": ONE_IN_A_THIRD}
ONE_TABLE = [
    pytest.param(Update((replace(ITEMS, kind=kind),)), id=f"{Update((ITEMS,)).name} {name}", marks=marks)
    for (name, kind), marks in zip(KINDS.items(), ([], LONG, LONG), strict=True)
]
# 1024 histories of 50 items, of their categories and brands, and a user each.
SEVERAL = Update((ITEMS, Table(10_000), Table(200_000, 1024), Table(50_000)), dim=18, lookup=True)
ONE_USER = Update((Table(1_000_000, 128),), dim=18, batches=64)
NEAR_THE_COPY = 1 / 2.5


def measure(bench, p, targets=(), others=RIVALS, memory=False, **more):
    """The row; a quick run leaves dense updates out."""
    absent = {DENSE: "left out of a quick run"} if bench.quick and DENSE in others else {}
    others = {name: factory for name, factory in others.items() if name not in absent}
    small = replace(p, tables=tuple(replace(t, rows=64, ids=8) for t in p.tables)) if memory else None
    bench.measure(p, OURS, others, targets, absent=absent, memory=small, **more)


# --------------------------------------------------------------------------------------------------- against the rivals


@pytest.mark.parametrize("p", ONE_TABLE)
def test_update(bench, p):
    """Update of a table by SGD with L2, gradient rows given."""
    measure(bench, p, [Target(COMPOSED, 8), Target(COPY, NEAR_THE_COPY)], memory=p.tables[0].kind == ZIPF)


@pytest.mark.parametrize("p", ONE_TABLE)
def test_step(bench, p):
    """Lookup, backward and update of a table by SGD with L2."""
    measure(bench, replace(p, lookup=True), [Target(COMPOSED, 5)], memory=p.tables[0].kind == ZIPF)


@pytest.mark.parametrize(
    "rule", [*(pytest.param(rule, marks=LONG) for rule in (MOMENTUM, ADAGRAD, ROWWISE)), ADAM], ids=str
)
def test_rules(bench, rule):
    """Update by the other rules, each with L2, gradient rows given, Zipf ids."""
    others = {name: factory for name, factory in RIVALS.items() if name != DENSE}
    measure(bench, Update((ITEMS,), rule=rule), [Target(COPY, NEAR_THE_COPY)], others)


@pytest.mark.parametrize("p", [pytest.param(SEVERAL, id="1M, 10k, 200k and 50k rows D18", marks=LONG)])
def test_several_tables(bench, p):
    """Lookup, backward and update of several tables in one step by SGD with L2, Zipf ids."""
    measure(bench, p, [Target(COMPOSED, 5)])


@pytest.mark.parametrize("lookup", [False, True], ids=["update", "lookup, backward and update"])
@pytest.mark.parametrize("p", [pytest.param(ONE_USER, id=ONE_USER.name)])
def test_small_mini_batch(bench, p, lookup):
    """A mini-batch of 128 ids, SGD with L2, Zipf ids: what a call costs."""
    others = {name: factory for name, factory in RIVALS.items() if name != DENSE}
    measure(bench, replace(p, lookup=lookup), [Target(COMPOSED, 1)], others)


# --------------------------------------------------------------------------------------------------- against ourselves


@LONG
@pytest.mark.parametrize("name", ["Zipf ids", "one id in a third"])
def test_skewed_ids(bench, name):
    """Update by SGD with L2: skewed ids against uniform ones."""
    uniform = "dien_ops, uniform ids"
    bench.measure(
        Update((replace(ITEMS, kind=KINDS[name]),)),
        OURS,
        {uniform: rivals.with_ids(rivals.ours, UNIFORM)},
        [Target(uniform, 1 / 1.5)],
    )


@LONG
@pytest.mark.parametrize("p", [pytest.param(Update((ITEMS,)), id=f"{Update((ITEMS,)).name} Zipf ids")])
def test_bfloat16(bench, p):
    """Update of a bfloat16 table by SGD with L2, rounded to nearest and stochastically."""
    ours32, nearest = "dien_ops, float32", "dien_ops, bfloat16, to nearest"
    bench.measure(
        replace(p, dtype=torch.bfloat16, stochastic=True),
        {"dien_ops, bfloat16, stochastic": rivals.ours},
        {
            nearest: rivals.with_options(rivals.ours, stochastic=False),
            ours32: rivals.with_options(rivals.ours, dtype=torch.float32, stochastic=False),
            f"{COMPOSED}, bfloat16": rivals.composed,
        },
        [Target(ours32, 1.0)],
    )


# ------------------------------------------------------------------------------------------------ as the table grows

SWEPT = Update((Table(100_000, kind=UNIFORM),), dim=16, batches=64, dtype=torch.bfloat16)
ROWS = (100_000, 1_000_000, 10_000_000, 100_000_000)
FLAT_ROWS = (1_000_000, 10_000_000, 30_000_000, 100_000_000)
CACHES = 4  # so many times the cache is touched before a mini-batch comes again: a quarter of it at most is still there
GROWTH = {COMPOSED: rivals.composed, WITHOUT_L2: rivals.without_l2, DENSE: rivals.dense}


def grown(rows, kind):
    return replace(SWEPT, tables=(replace(SWEPT.tables[0], rows=rows, kind=kind),))


def sweep(kind):
    return [
        pytest.param(grown(rows, kind), Sweep(f"rows, {kind} ids", rows), id=f"{rows:,} rows", marks=LONG)
        for rows in ROWS
    ]


@pytest.mark.parametrize("p, swept", sweep(UNIFORM))
def test_growth_uniform(bench, p, swept):
    """Update in bfloat16 as the table grows, 51,200 uniform ids (D16)."""
    measure(bench, p, others=GROWTH, sweep=swept)


@pytest.mark.parametrize("p, swept", sweep(ZIPF))
def test_growth_zipf(bench, p, swept):
    """Update in bfloat16 as the table grows, 51,200 Zipf ids (D16)."""
    measure(bench, p, others=GROWTH, sweep=swept)


@LONG
@pytest.mark.parametrize("kind", [pytest.param(UNIFORM, id="uniform ids")])
def test_flatness(bench, kind):
    """Update in bfloat16 of tables that no cache holds, all in the same rounds, 51,200 ids (D16)."""
    # Not of Zipf ids: a mini-batch names more rows of them, the larger the table.
    cache = machine.last_level_cache()
    if cache is None:
        raise Unavailable("this machine does not say how large its caches are")
    sizes = [rows for rows in FLAT_ROWS if rivals.touched_bytes(grown(rows, kind)) >= CACHES * cache]
    if len(sizes) < 2:
        raise Unavailable(f"no two tables are large beside a cache of {cache / 2**20:.0f} MiB")
    *smaller, largest = sizes
    bench.measure(
        grown(largest, kind),
        {f"dien_ops, {largest:,} rows": rivals.ours},
        {f"dien_ops, {rows:,} rows": rivals.with_rows(rivals.ours, rows) for rows in smaller},
        [Target(FLAT, 1 / 1.2)],
    )
