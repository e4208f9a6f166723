# SPDX-License-Identifier: Apache-2.0
"""Updates of a table's rows with mini-batch aware L2 on a GPU, beside what torch.optim and its operators give, and
FBGEMM where it is installed.

The same mini-batch in each call, which a CUDA graph can replay: it is not in the L2 cache, which is full of other data.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bench import rivals_embedding as rivals
from bench.results import COPY, FLAT, Sweep, Target
from bench.rivals import from_a_graph
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
GRAPH = {"dien_ops, graph": from_a_graph(rivals.ours)}
SPARSE = {
    COMPOSED: rivals.composed,
    UNIQUE: rivals.unique,
    WITHOUT_L2: rivals.without_l2,
    FBGEMM: rivals.fbgemm,
}
RIVALS = SPARSE | {DENSE: rivals.dense}
NEAR_THE_COPY = Target(COPY, 0.8)
DTYPES = torch.float32, torch.bfloat16
KINDS = {"Zipf ids": ZIPF, "uniform ids": UNIFORM, "one id in a third": ONE_IN_A_THIRD}

LARGE = Update((Table(4_000_000, 409_600),), batches=1, device="cuda")  # 4096 histories of 100
BATCH = Update((Table(1_000_000),), batches=1, device="cuda")  # the CPU's rows
# 4096 histories of 100 items, of their categories and brands, and a user each.
SEVERAL = replace(
    LARGE,
    tables=(Table(4_000_000, 409_600), Table(10_000, 409_600), Table(200_000, 4096), Table(50_000, 409_600)),
    dim=18,
)
ONE_USER = Update((Table(1_000_000, 128),), dim=18, batches=1, device="cuda")
# A parameter's number of elements may pass 2^31 here.
SWEPT = Update((Table(100_000, kind=UNIFORM),), dim=16, batches=1, dtype=torch.bfloat16, device="cuda")
ROWS = (100_000, 1_000_000, 10_000_000, 100_000_000, 300_000_000)


def of_kind(p: Update, kind: str) -> Update:
    return replace(p, tables=tuple(replace(t, kind=kind) for t in p.tables))


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def rows(*problems: Update):
    return [
        pytest.param(replace(of_kind(p, kind), dtype=dtype), id=f"{p.name} {name} {name_of(dtype)}")
        for dtype in DTYPES
        for p in problems
        for name, kind in KINDS.items()
    ]


def measure(bench, p, others, targets=(), **more) -> None:
    bench.measure(p, OURS, others, targets, without_memory=GRAPH, **more)


@pytest.mark.parametrize("p", rows(LARGE, BATCH))
def test_update(bench, p):
    """Update of a table by SGD with L2, gradient rows given."""
    near_the_copy = [NEAR_THE_COPY] if p.tables == of_kind(LARGE, p.tables[0].kind).tables else []
    measure(bench, p, GRAPH | RIVALS, [Target(COMPOSED, 8), *near_the_copy])


@pytest.mark.parametrize("p", rows(LARGE))
def test_step(bench, p):
    """Lookup, backward and update of a table by SGD with L2."""
    measure(bench, replace(p, lookup=True), RIVALS, [Target(COMPOSED, 5)])


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("rule", [MOMENTUM, ADAGRAD, ROWWISE, ADAM], ids=str)
def test_rules(bench, rule, dtype):
    """Update by the other rules, each with L2, gradient rows given, Zipf ids."""
    measure(bench, replace(LARGE, rule=rule, dtype=dtype), GRAPH | SPARSE, [NEAR_THE_COPY])


@pytest.mark.parametrize("p", [pytest.param(SEVERAL, id="4M, 10k, 200k and 50k rows D18")])
def test_several_tables(bench, p):
    """Lookup, backward and update of several tables in one step by SGD with L2, Zipf ids."""
    measure(bench, replace(p, lookup=True), SPARSE, [Target(COMPOSED, 5)])


@pytest.mark.parametrize("kind", [ZIPF, ONE_IN_A_THIRD], ids=["Zipf ids", "one id in a third"])
def test_skewed_ids(bench, kind):
    """Update by SGD with L2: skewed ids against uniform ones."""
    uniform = "dien_ops, uniform ids"
    others = {uniform: rivals.with_ids(rivals.ours, UNIFORM)}
    measure(bench, of_kind(LARGE, kind), others, [Target(uniform, 1 / 1.5)])


@pytest.mark.parametrize("lookup", [False, True], ids=["update", "lookup, backward and update"])
@pytest.mark.parametrize("p", [pytest.param(ONE_USER, id=ONE_USER.name)])
def test_small_mini_batch(bench, p, lookup):
    """A mini-batch of 128 ids, SGD with L2, Zipf ids: what a call costs."""
    measure(bench, replace(p, lookup=lookup), SPARSE if lookup else GRAPH | SPARSE, [Target(COMPOSED, 1)])


@pytest.mark.parametrize("p", [pytest.param(LARGE, id=f"{LARGE.name} Zipf ids")])
def test_bfloat16(bench, p):
    """Update of a bfloat16 table by SGD with L2, rounded to nearest and stochastically."""
    ours32, nearest = "dien_ops, float32", "dien_ops, bfloat16, to nearest"
    bench.measure(
        replace(p, dtype=torch.bfloat16, stochastic=True),
        {"dien_ops, bfloat16, stochastic": rivals.ours},
        {
            nearest: rivals.with_options(rivals.ours, stochastic=False),
            ours32: rivals.with_options(rivals.ours, dtype=torch.float32, stochastic=False),
        },
        [Target(ours32, 1.0)],
    )


def grown(rows: int, kind: str) -> Update:
    return replace(SWEPT, tables=(Table(rows, kind=kind),))


@pytest.mark.parametrize("table_rows", ROWS, ids=lambda rows: f"{rows:,} rows")
def test_growth_uniform(bench, table_rows):
    """Update in bfloat16 as the table grows, 51,200 uniform ids (D16)."""
    others = {COMPOSED: rivals.composed, WITHOUT_L2: rivals.without_l2, DENSE: rivals.dense}
    measure(bench, grown(table_rows, UNIFORM), GRAPH | others, sweep=Sweep("rows, uniform ids", table_rows))


@pytest.mark.parametrize("table_rows", ROWS, ids=lambda rows: f"{rows:,} rows")
def test_growth_zipf(bench, table_rows):
    """Update in bfloat16 as the table grows, 51,200 Zipf ids (D16)."""
    others = {COMPOSED: rivals.composed, WITHOUT_L2: rivals.without_l2, DENSE: rivals.dense}
    measure(bench, grown(table_rows, ZIPF), GRAPH | others, sweep=Sweep("rows, Zipf ids", table_rows))


@pytest.mark.parametrize("kind", [pytest.param(UNIFORM, id="uniform ids")])
def test_flatness(bench, kind):
    """Update in bfloat16 of tables of any size, all in the same rounds, 51,200 ids (D16)."""
    *smaller, largest = ROWS[1:]  # a mini-batch names fewer rows of the smallest
    bench.measure(
        grown(largest, kind),
        {f"dien_ops, {largest:,} rows": from_a_graph(rivals.ours)},
        {f"dien_ops, {rows:,} rows": from_a_graph(rivals.with_rows(rivals.ours, rows)) for rows in smaller},
        [Target(FLAT, 1 / 1.2)],
    )
