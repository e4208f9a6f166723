# SPDX-License-Identifier: Apache-2.0
"""One run of benchmarks: ``python -m pytest bench/bench_<column>.py --benchmark-json FILE``.

A bench file holds one test per section; its docstring's first line is the section's title, and a parameter's id names
the row. Rows that are marked ``long`` are left out of a ``--quick`` run.
"""

from __future__ import annotations

import os

# Before torch starts its threads: for how long they spin, waiting for each other, before they sleep. To sleep at once
# (OMP_WAIT_POLICY=passive) makes loops over time, the rivals', slower by a tenth to a third. By default libgomp spins
# for much longer, and on when a contestant's turn is over, which slows those that bring threads of their own (OpenVINO,
# and what torch.compile builds). With this number all were as fast as with the default on a quiet machine. On a busy
# one no choice is fair to many short parallel regions, and the report says whether it was one.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import pytest
import torch

from bench import harness, machine
from bench.results import NOT_SELECTED

BYSTANDERS = pytest.StashKey[machine.Bystanders]()
SECTIONS = pytest.StashKey[list[tuple[str, str]]]()
NOT_RUN = pytest.StashKey[list[dict[str, str]]]()


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="few rounds, small rows, nothing that compiles")


def pytest_configure(config):
    config.addinivalue_line("markers", "long: a row that --quick leaves out")
    config.stash[NOT_RUN] = []
    config.stash[BYSTANDERS] = machine.Bystanders()


@pytest.hookimpl(tryfirst=True)  # before -k deselects
def pytest_collection_modifyitems(config, items):
    config.stash[SECTIONS] = list(dict.fromkeys((place(item)["column"], place(item)["section"]) for item in items))
    if config.getoption("--quick"):
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(pytest.mark.skip(reason="left out of a quick run"))


def place(item) -> dict[str, str]:
    """Where a row stands: column, section and case."""
    return {
        "column": item.module.__name__.rpartition("bench_")[2],
        "section": item.function.__doc__.partition("\n")[0].rstrip("."),
        "case": item.callspec.id.replace("-", ", ") if hasattr(item, "callspec") else "",
    }


@pytest.fixture
def bench(request, benchmark):
    torch.manual_seed(0)
    return harness.Bench(benchmark, **place(request.node), quick=request.config.getoption("--quick"))


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call():
    try:
        return (yield)
    except harness.Unavailable as reason:
        pytest.skip(str(reason))


# ------------------------------------------------------------------------------------- what the JSON says besides times


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.skipped or report.failed:
        if report.skipped:
            reason = report.longrepr[2].removeprefix("Skipped: ")
        else:
            reason = f"failed: {call.excinfo.exconly().splitlines()[0]}"
        item.config.stash[NOT_RUN].append(place(item) | {"reason": reason})
    return report


def pytest_deselected(items):
    for item in items:
        item.config.stash[NOT_RUN].append(place(item) | {"reason": NOT_SELECTED})


def pytest_benchmark_update_machine_info(config, machine_info):
    """What bears on speed, in the place of pytest-benchmark's own facts (host name, kernel build)."""
    machine_info.clear()
    machine_info.update(
        machine.facts(),
        bystanders=config.stash[BYSTANDERS].share(),
        ceilings=harness.ceilings(),
        quick=config.getoption("--quick"),
    )


def pytest_benchmark_update_commit_info(commit_info):
    for key in commit_info.keys() - {"id", "time", "dirty"}:
        del commit_info[key]


def pytest_benchmark_update_json(config, output_json):
    whole = [b for b in output_json["benchmarks"] if b["extra_info"]]  # a row that failed midway is in NOT_RUN
    output_json["benchmarks"] = [{key: b[key] for key in ("fullname", "extra_info")} for b in whole]
    output_json["not_run"] = config.stash[NOT_RUN]
    output_json["sections"] = config.stash[SECTIONS]
