# SPDX-License-Identifier: Apache-2.0
"""One run of benchmarks: ``python -m pytest bench/bench_<column>.py --benchmark-json FILE``.

A bench file holds one test per section; its docstring's first line is the section's title, and a parameter's id names
the row. Rows that are marked ``long`` are left out of a ``--quick`` run. Files that end in ``_cuda`` are about a GPU,
and their columns end in ``-cuda``; a run is about a GPU or it is not.
"""

from __future__ import annotations

import os

# Before torch starts its threads: for how long they spin, waiting for each other, before they sleep. To sleep at once
# (OMP_WAIT_POLICY=passive) makes loops over time, the rivals', slower by a tenth to a third. By default libgomp spins
# for much longer, and on when a contestant's turn is over, which slows those that bring threads of their own (OpenVINO,
# and what torch.compile builds). With this number all were as fast as with the default on a quiet machine. On a busy
# one no choice is fair to many short parallel regions, and the report says whether it was one.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import time

import pytest
import torch

from bench import gpu, harness, machine
from bench import report as tables
from bench.results import NOT_SELECTED, Row

BYSTANDERS = pytest.StashKey[machine.Bystanders]()
SECTIONS = pytest.StashKey[list[tuple[str, str]]]()
NOT_RUN = pytest.StashKey[list[dict[str, str]]]()
GPU = pytest.StashKey[dict[str, str]]()  # what it was before the run; there is no entry where the run is not about one
BEGIN = pytest.StashKey[float]()


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="few rounds, small rows, nothing that compiles")
    parser.addoption("--seconds", type=float, help="rows that would begin later than that are left out")


def pytest_configure(config):
    config.addinivalue_line("markers", "long: a row that --quick leaves out")
    config.stash[NOT_RUN] = []
    config.stash[BYSTANDERS] = machine.Bystanders()
    config.stash[BEGIN] = time.monotonic()


@pytest.hookimpl(tryfirst=True)  # before -k deselects
def pytest_collection_modifyitems(config, items):
    config.stash[SECTIONS] = list(dict.fromkeys((place(item)["column"], place(item)["section"]) for item in items))
    about_gpu = {place(item)["column"].endswith("-cuda") for item in items}
    if about_gpu == {True, False}:
        raise pytest.UsageError(
            "times of a GPU and of the CPU go into files of their own: run bench/bench_*_cuda.py apart"
        )
    if about_gpu == {True}:
        if not torch.cuda.is_available():
            raise pytest.UsageError("bench/bench_*_cuda.py needs a GPU that torch can use")
        torch.backends.cuda.matmul.allow_tf32 = True  # for the rivals' products, as torch allows cuDNN's by default
        config.stash[GPU] = gpu.facts()
    if config.getoption("--quick"):
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(pytest.mark.skip(reason="left out of a quick run"))


def place(item) -> dict[str, str]:
    """Where a row stands: column, section and case."""
    return {
        "column": item.module.__name__.rpartition("bench_")[2].replace("_cuda", "-cuda"),
        "section": item.function.__doc__.partition("\n")[0].rstrip("."),
        "case": item.callspec.id.replace("-", ", ") if hasattr(item, "callspec") else "",
    }


@pytest.fixture
def bench(request, benchmark):
    config = request.config
    limit = config.getoption("--seconds")
    if limit is not None and time.monotonic() - config.stash[BEGIN] > limit:
        pytest.skip(f"left out: the {limit:.0f} s for all rows were used up")
    torch.manual_seed(0)
    return harness.Bench(benchmark, **place(request.node), quick=config.getoption("--quick"))


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call():
    try:
        return (yield)
    except harness.Unavailable as reason:
        pytest.skip(str(reason))


# ------------------------------------------------------------------------------------- what the JSON says besides times


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    result = yield
    if result.skipped or result.failed:
        if result.skipped:
            reason = result.longrepr[2].removeprefix("Skipped: ")
        else:
            reason = f"failed: {call.excinfo.exconly().splitlines()[0]}"
        item.config.stash[NOT_RUN].append(place(item) | {"reason": reason})
    elif call.when == "call" and item.funcargs["benchmark"].extra_info:
        result.measured = Row.from_json(item.funcargs["benchmark"].extra_info)
    return result


def pytest_report_teststatus(report):  # pytest's name for it; a row's figures are said as soon as they are there
    if report.when == "call" and report.passed and hasattr(report, "measured"):
        return "passed", ".", tables.brief(report.measured)
    return None


def pytest_deselected(items):
    for item in items:
        item.config.stash[NOT_RUN].append(place(item) | {"reason": NOT_SELECTED})


def pytest_benchmark_update_machine_info(config, machine_info):
    """What bears on speed, in the place of pytest-benchmark's own facts (host name, kernel build)."""
    before = config.stash.get(GPU, None)
    machine_info.clear()
    machine_info.update(
        machine.facts(),
        bystanders=config.stash[BYSTANDERS].share(),
        ceilings=harness.ceilings() if before is None else harness.ceilings_of_gpu(),
        quick=config.getoption("--quick"),
    )
    if before is not None:
        machine_info["gpu"] = before | {"clocks after the run": gpu.clocks()}


def pytest_benchmark_update_commit_info(commit_info):
    for key in commit_info.keys() - {"id", "time", "dirty"}:
        del commit_info[key]
    if named := os.environ.get("BENCH_COMMIT"):  # of a tree that was copied without its history
        commit_info.update(id=named.removesuffix("-dirty"), dirty=named.endswith("-dirty"))


def pytest_benchmark_update_json(config, output_json):
    whole = [b for b in output_json["benchmarks"] if b["extra_info"]]  # a row that failed midway is in NOT_RUN
    output_json["benchmarks"] = [{key: b[key] for key in ("fullname", "extra_info")} for b in whole]
    output_json["not_run"] = config.stash[NOT_RUN]
    output_json["sections"] = config.stash[SECTIONS]
