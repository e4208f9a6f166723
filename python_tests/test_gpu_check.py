# SPDX-License-Identifier: Apache-2.0
"""The logic of ``make gpu-check`` where there is no GPU: which stages run, what is made of their output, what is left behind.
A runner that was written down plays the processes, except where a test says otherwise."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import (
    bench_activation_unit_cuda,
    bench_attention_cuda,
    bench_dice_cuda,
    bench_embedding_cuda,
    bench_gru_cuda,
    compiling,
    conftest,
    gpu,
    gpu_check,
    gpu_small,
    gpu_small_gru,
    harness,
    report,
    results,
)
from bench.gpu_check import Finished, Stage
from bench.results import CEILING, COPY, Check, Row, Target, Timing

ROOT = Path(gpu_check.__file__).parents[1]
FACTS = {"name": "NVIDIA Abacus 1", "architecture": "9.0a", "L2 cache": "50 MiB"}
NAMES = ["device", "build", "primitives", "tests", *gpu_check.TOOLS, "benchmarks"]

# ------------------------------------------------------------------------------------------------------------ verdicts


def finished(output: str, status: int | None = 0) -> Finished:
    return Finished(status, output, 1.0)


@pytest.mark.parametrize(
    "output, status, verdict",
    [
        ("....\n312 passed, 2 skipped, 5 warnings in 80.12s (0:01:20)", 0, (True, "312 passed, 2 skipped")),
        ("FAILED a\n1 failed, 3 passed in 2.00s", 1, (False, "1 failed, 3 passed")),
        ("ERROR a\n3 passed, 2 errors in 2s", 1, (False, "3 passed, 2 error")),
        ("3 skipped in 0.10s", 0, (False, "3 skipped")),
        ("3 passed in 0.10s\nSegmentation fault", -11, (False, "3 passed")),
        ("usage: pytest\nerror: unrecognized arguments: --device", 4, (False, "status 4: error: unrecognized arguments: --device")),
        ("tests.py .....", None, (False, "status None: tests.py .....")),
    ],
    ids=["passed", "failed", "errors", "all_skipped", "crashed", "refused", "stopped"],
)  # fmt: skip
def test_tests_pass_if_some_ran_and_none_failed(output, status, verdict):
    assert gpu_check.judge_tests(finished(output, status)) == verdict


@pytest.mark.parametrize(
    "output, status, verdict",
    [
        ("========= ERROR SUMMARY: 0 errors", 0, (True, "0 errors")),
        ("========= ERROR SUMMARY: 1 error", 99, (False, "1 error")),
        ("========= ERROR SUMMARY: 31 errors\n========= ERROR SUMMARY: 11 errors were not printed.", 99, (False, "31 errors")),
        ("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", 0, (True, "0 errors")),
        ("========= RACECHECK SUMMARY: 2 hazards displayed (0 errors, 2 warnings)", 0, (False, "2 errors")),
        ("========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)", 99, (False, "1 error")),
        ("Traceback\n========= ERROR SUMMARY: 0 errors", 1, (False, "0 errors, but the calls ended with status 1")),
        ("========= Device not supported", 1, (False, "no summary, status 1: ========= Device not supported")),
        ("", None, (False, "no summary, status None: it said nothing")),
    ],
    ids=["clean", "one", "many", "no_race", "warnings", "race", "calls_failed", "refused", "stopped"],
)  # fmt: skip
def test_a_sanitizer_passes_only_with_a_summary_of_no_errors(output, status, verdict):
    assert gpu_check.judge_sanitizer(finished(output, status)) == verdict


def test_the_gpu_is_what_the_last_line_of_json_says():
    said = f"a warning\n{json.dumps(FACTS)}\nanother"
    assert gpu_check.read_facts(said) == FACTS
    assert gpu_check.judge_device(finished(said)) == (True, "NVIDIA Abacus 1")
    assert gpu_check.judge_device(finished("no GPU", 1)) == (False, "no GPU")
    assert gpu_check.judge_device(finished("nothing of it")) == (False, "nothing of it")


# -------------------------------------------------------------------------------------------------------------- stages


def stage(name: str, limit: float = 50.0, **more) -> Stage:
    return Stage(name, lambda limit: [name, f"{limit:.0f}"], gpu_check.judge_status, limit, **more)


def run_stages(planned, fails=(), seconds_each=0.0, total=1000.0):
    """The checks, and the commands that ran."""
    commands, left = [], [total]

    def run(command, environment, limit, heard):
        commands.append(command)
        left[0] -= seconds_each
        return Finished(int(command[0] in fails), "said", seconds_each)

    checks = gpu_check.run_stages(planned, lambda: left[0], run, lambda line, shown: None)
    return checks, commands


def test_a_failed_stage_does_not_stop_the_later_ones():
    checks, commands = run_stages([stage("build"), stage("tests"), stage("benchmarks")], fails=["tests"])
    assert [(c.name, c.passed) for c in checks] == [("build", True), ("tests", False), ("benchmarks", True)]
    assert len(commands) == 3


def test_nothing_runs_on_what_an_earlier_build_left_behind():
    checks, commands = run_stages([stage("build"), stage("tests"), stage("benchmarks")], fails=["build"])
    assert commands == [["build", "50"]]
    assert [c.said for c in checks[1:]] == ["not run: the build failed"] * 2
    assert not any(c.passed for c in checks)


def test_a_stage_gets_what_is_left_and_the_benchmarks_have_time_reserved():
    for_benchmarks = gpu_check.FOR_BENCHMARKS
    planned = [stage("build", 100), stage("tests", 100), stage("memcheck", 100), stage("benchmarks", 500)]
    checks, commands = run_stages(planned, seconds_each=90, total=180 + for_benchmarks + 20)
    assert commands == [
        ["build", "100"],
        ["tests", "100"],
        ["memcheck", "20"],
        ["benchmarks", f"{for_benchmarks - 70:.0f}"],
    ]
    checks, commands = run_stages(planned, seconds_each=90, total=180 + for_benchmarks)
    assert [c[0] for c in commands] == ["build", "tests", "benchmarks"]
    assert checks[2] == Check("memcheck", False, "not run: 0 s were left for it", 0.0)


def test_a_stage_that_was_stopped_has_failed_even_if_it_said_that_all_was_well():
    def run(command, environment, limit, heard):
        return Finished(None, "5 passed in 2s", limit)

    planned = replace(stage("tests"), judge=gpu_check.judge_tests)
    check, _ = gpu_check.run_stage(planned, 50.0, run, lambda line, shown: None)
    assert (check.passed, check.said) == (False, "stopped after 50 s: 5 passed")


def test_a_program_that_is_not_there_is_a_failed_stage():
    planned = replace(stage("memcheck"), command=lambda _: ["no-such-sanitizer"])
    check, _ = gpu_check.run_stage(planned, 50.0, gpu_check.run_process, lambda line, shown: None)
    assert not check.passed and "no-such-sanitizer" in check.said


def test_a_quiet_stage_shows_its_own_lines_and_its_end_where_it_fails():
    lines = [f"Case {i}" for i in range(40)] + ["===== a race"]

    def run(command, environment, limit, heard):
        for line in lines:
            heard(line)
        return Finished(1, "\n".join(lines), 1.0)

    log, terminal = [], []

    def say(line, shown):
        log.append(line)
        terminal.extend([line] if shown else [])

    gpu_check.run_stage(stage("racecheck", shown="====="), 50.0, run, say)
    assert set(lines) <= set(log)
    assert "Case 5" not in terminal and "===== a race" in terminal and "  | Case 30" in terminal


@pytest.mark.skipif(sys.platform == "win32", reason="process groups are POSIX's")
def test_a_process_ends_with_its_children_at_the_limit():
    child = "import time; time.sleep(60)"
    parent = f"import subprocess, sys; print('begun', flush=True); subprocess.run([sys.executable, '-c', {child!r}])"
    heard = []
    begin = time.monotonic()
    done = gpu_check.run_process([sys.executable, "-c", parent], {}, 2.0, heard.append)
    assert done.status is None and heard == ["begun"] == done.output.splitlines()
    assert time.monotonic() - begin < 2.0 + gpu_check.ENDING_SECONDS  # the child holds the pipe: it ended too


def test_a_process_gets_its_environment_and_both_streams_are_heard():
    code = "import os, sys; print(os.environ['X']); print('wrong', file=sys.stderr); sys.exit(3)"
    done = gpu_check.run_process([sys.executable, "-c", code], {"X": "right"}, 30.0, lambda line: None)
    assert (done.status, done.output) == (3, "right\nwrong")


def test_the_build_is_for_this_gpu_alone_and_the_benchmarks_keep_to_their_time(tmp_path):
    planned = {s.name: s for s in gpu_check.stages("9.0a", tmp_path / "x.json")}
    targets = {"DIEN_OPS_TARGETS": "all dien_ops_cuda_test"}
    assert planned["build"].environment == {"DIEN_OPS_CUDA": "on", "TORCH_CUDA_ARCH_LIST": "9.0a"} | targets
    command = planned["benchmarks"].command(100.0)
    assert f"--seconds={100 - gpu_check.WRITING_SECONDS:.0f}" in command
    assert "bench/bench_gru_cuda.py" in command and "bench/bench_gru.py" not in command
    assert "python_tests/test_gru.py" in planned["tests"].command(1.0)
    assert list(planned)[-1] == "benchmarks"


def test_the_primitives_are_tested_first_of_all_with_the_library_that_was_built_for_it(tmp_path):
    first, second, *_ = gpu_check.stages("9.0a", tmp_path / "x.json")
    assert (first.name, second.name) == ("build", "primitives")
    command = second.command(1.0)
    assert "python_tests/test_cuda_primitives.py" in command and command[command.index("--device") + 1] == "cuda"
    library = Path(command[command.index("--cuda-test-library") + 1])
    assert library.name == "libdien_ops_cuda_test.so" and library.parents[1] == ROOT / "build"


# ---------------------------------------------------------------------------------------------------------- whole runs


def row(section="GRU, forward", case="B2 T3", **more) -> Row:
    times = {"dien_ops": 1.0, "nn.GRU": 3.0, CEILING: 1.0, COPY: 1.0}
    timings = {name: Timing([seconds * 1e-3] * 3, flops=10.0, bytes=10.0) for name, seconds in times.items()}
    return Row("gru-cuda", section, case, "dien_ops", timings, steps=10, **more)


RESULT = {
    "machine_info": {
        "cpu": "Abacus", "cores": 16, "threads": 16, "system": "Linux x86_64", "dien_ops": "0.1.0", "kernels": "avx512",
        "built_with": "torch 2.11.0", "versions": {"torch": "2.11.0"}, "environment": {}, "quick": False,
        "ceilings": {"mm GFLOP/s, tf32": 4e5, "copy GB/s": 3000.0}, "bystanders": 0.0, "gpu": FACTS,
    },
    "commit_info": {"id": "0123456789abcdef", "dirty": True},
    "datetime": "2026-01-02T03:04:05+00:00",
    "benchmarks": [
        {"fullname": "x", "extra_info": row(targets=[Target("nn.GRU", 2.0)], absent={"torch.compile of it": "left out"}).to_json()},
        {"fullname": "y", "extra_info": row("AUGRU, forward", "B4 T5").to_json()},
    ],
    "sections": [["gru-cuda", "GRU, forward"], ["gru-cuda", "AUGRU, forward"]],
    "not_run": [{"column": "gru-cuda", "section": "AUGRU, forward", "case": "B6 T7", "reason": "the time was used up"}],
}  # fmt: skip


class Processes:
    """A machine with a GPU, as far as anybody asks."""

    def __init__(self, **said):
        self.said = {
            "bench.gpu": json.dumps(FACTS),
            "setup.py": "built",
            "pytest": "5 passed in 2s",
            "compute-sanitizer": "========= ERROR SUMMARY: 0 errors",
            **said,
        }
        self.commands = []

    def __call__(self, command, environment, limit, heard):
        self.commands.append(command)
        if "--benchmark-json" in command:
            Path(command[command.index("--benchmark-json") + 1]).write_text(json.dumps(RESULT))
        words = next(said for word, said in self.said.items() if word in command)
        status = 0 if not isinstance(words, tuple) else words[1]
        output = words if status == 0 else words[0]
        for line in output.splitlines():
            heard(line)
        return Finished(status, output, 1.0)


@pytest.fixture
def folders(tmp_path):
    (tmp_path / "results").mkdir()
    return [tmp_path / "out", tmp_path / "more"], tmp_path / "results"


def test_a_whole_run_leaves_a_table_a_log_and_a_result_with_its_checks(folders, capsys):
    outs, committed = folders
    assert gpu_check.run_all([], Processes(), outs, committed)
    for folder in outs:
        assert {p.name for p in folder.iterdir()} == {"gpu-check.log", "gpu-check.txt", "nvidia-abacus-1.json"}
    assert [p.name for p in committed.iterdir()] == ["nvidia-abacus-1.json"]
    run = results.load(committed / "nvidia-abacus-1.json")
    assert [c.name for c in run.checks] == NAMES
    assert all(c.passed for c in run.checks)
    text = capsys.readouterr().out
    assert text.endswith((outs[1] / "gpu-check.txt").read_text())
    assert "5 passed" in (outs[1] / "gpu-check.log").read_text()


def test_the_table_has_the_stages_the_rows_and_what_is_missing(folders, capsys):
    outs, committed = folders
    assert not gpu_check.run_all(
        [], Processes(**{"compute-sanitizer": ("===== ERROR SUMMARY: 2 errors", 99)}), outs, committed
    )
    lines = (outs[0] / "gpu-check.txt").read_text().splitlines()
    assert lines[0] == "NVIDIA Abacus 1, commit 0123456789ab and changes that are not committed"
    assert ["memcheck", "FAILED", "1 s", "2 errors"] in [[w.strip() for w in line.split("  ") if w] for line in lines]
    begin = lines.index("GRU, forward")
    assert lines[begin + 1].split() == [
        "dien_ops",
        "nn.GRU",
        "of",
        "mm",
        "of",
        "copy",
        "a",
        "step",
        "memory",
        "verdict",
    ]
    assert lines[begin + 2].split() == ["B2", "T3", "1", "ms", "3x", "1.00", "1.00", "100", "µs", "reached"]
    assert "torch.compile of it, in 1 row: left out" in lines
    assert "AUGRU, forward, B6 T7: not measured: the time was used up" in lines
    assert lines[-1] == f"FAILED: {', '.join(gpu_check.TOOLS)}"


def test_without_a_gpu_nothing_runs(folders):
    outs, committed = folders
    machine = Processes(**{"bench.gpu": ("torch finds no GPU", 1)})
    assert not gpu_check.run_all([], machine, outs, committed)
    assert len(machine.commands) == 1 and not any(committed.iterdir())
    assert "torch finds no GPU" in (outs[1] / "gpu-check.txt").read_text()


def test_a_result_of_an_earlier_run_is_not_taken_for_this_ones(folders):
    outs, committed = folders
    outs[0].mkdir()
    (outs[0] / "nvidia-abacus-1.json").write_text(json.dumps(RESULT))
    assert not gpu_check.run_all([], Processes(**{"setup.py": ("error: no nvcc", 1)}), outs, committed)
    assert not any(committed.iterdir()) and not list(outs[1].glob("*.json"))
    assert "status 1: error: no nvcc" in (outs[0] / "gpu-check.txt").read_text()


def test_some_stages_are_nobodys_result(folders):
    outs, committed = folders
    machine = Processes()
    assert gpu_check.run_all(["build", "benchmarks"], machine, outs, committed)
    assert len(machine.commands) == 3 and not any(committed.iterdir())
    assert [c.name for c in results.load(outs[1] / "nvidia-abacus-1.json").checks] == ["device", "build", "benchmarks"]


def test_the_report_tells_of_a_gpu_its_checks_and_its_shares(folders, tmp_path):
    outs, committed = folders
    gpu_check.run_all([], Processes(), outs, committed)
    readme = tmp_path / "README.md"
    readme.write_text("<!-- bench:gru -->\n<!-- /bench:gru -->\n<!-- bench:gru-cuda -->\n<!-- /bench:gru-cuda -->\n")
    report.main([str(committed / "nvidia-abacus-1.json"), "--readme", str(readme), "--out", str(tmp_path / "tables")])
    text = readme.read_text()
    assert text.startswith(
        "<!-- bench:gru -->\n<!-- /bench:gru -->\n<!-- bench:gru-cuda -->\nNVIDIA Abacus 1: architecture 9.0a"
    )
    assert "between two events of the GPU" in text and "memcheck: 0 errors" in text
    assert "| 1.00 | 1.00 | 100 µs |" in text
    assert (tmp_path / "tables" / "nvidia-abacus-1" / "gru-cuda_ratios.png").exists()


# ------------------------------------------------------------------------------------------------ the benchmarks' rows


class Asked:
    """In the place of the fixture ``bench``: what would be measured."""

    def __init__(self):
        self.calls = []

    def measure(self, problem, ours, others, targets, **more):
        self.calls.append((problem, ours, others, targets, more))


def asked() -> list:
    bench = Asked()
    for train in (False, True):
        bench_gru_cuda.test_gru_latency_of_a_step(bench, train)
    for name in (
        "test_gru_training",
        "test_augru_training",
        "test_augru_of_many_targets",
        "test_gru_forward",
        "test_augru_forward",
    ):
        test = getattr(bench_gru_cuda, name)
        for parameters in test.pytestmark[0].args[1]:
            test(bench, *parameters.values)
    return bench.calls


def test_every_row_is_on_the_gpu_and_its_targets_are_against_somebody_who_takes_part():
    rows = asked()
    assert len({call[0] for call in rows}) == len(rows) == 2 + 4 * 2 * len(bench_gru_cuda.SHAPES) + 2
    for problem, ours, others, targets, more in rows:
        assert problem.device == "cuda" and more["steps"] == problem.steps
        assert {t.against for t in targets} <= {*others, results.PER_SECOND}
        assert list(ours) == ["dien_ops"] and bench_gru_cuda.FROM_A_GRAPH in others
        assert all(problem.train for t in targets if t.against != results.PER_SECOND)


def test_every_row_of_dice_is_on_the_gpu_and_its_targets_are_shares_of_the_copy():
    bench = Asked()
    for name in ("test_dice_training", "test_dice_training_forward", "test_dice_evaluation"):
        test = getattr(bench_dice_cuda, name)
        for parameters in test.pytestmark[0].args[1]:
            test(bench, *parameters.values)
    assert len({call[0] for call in bench.calls}) == len(bench.calls) == 3 * 2 * len(bench_dice_cuda.SHAPES)
    for problem, ours, others, targets, _ in bench.calls:
        assert problem.device == "cuda" and list(ours) == ["dien_ops"]
        assert {t.against for t in targets} <= {results.COPY}
        assert "F.batch_norm" in others and ("torch.compile" in others) <= problem.train


def cases(test):
    """The arguments of each of a test's rows."""
    every = []
    for mark in test.pytestmark if hasattr(test, "pytestmark") else ():
        names = [name.strip() for name in mark.args[0].split(",")]
        values = [getattr(value, "values", (value,)) for value in mark.args[1]]
        every.append([dict(zip(names, some, strict=True)) for some in values])
    return [{k: v for some in chosen for k, v in some.items()} for chosen in itertools.product(*every)]


def test_every_row_of_the_embedding_column_is_on_the_gpu_and_its_targets_are_against_somebody_who_takes_part():
    bench = Asked()
    tests = [f for name, f in vars(bench_embedding_cuda).items() if name.startswith("test_")]
    for test in tests:
        assert test.__doc__
        for arguments in cases(test):
            test(bench, **arguments)
    assert len(tests) == 10 and len(bench.calls) == 43
    for problem, ours, others, targets, more in bench.calls:
        assert problem.device == "cuda" and problem.batches == 1 and len(ours) == 1
        assert {t.against for t in targets} <= {*others, results.COPY, results.FLAT}
        assert targets or more["sweep"]
        assert not (problem.lookup and "dien_ops, graph" in others)


def test_compilations_stop_when_one_more_might_not_fit(monkeypatch):
    now = [0.0]

    def compile(_):
        now[0] += 25.0
        return "compiled"

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    factory = compiling.WithinSeconds(compile, 60.0)
    assert [factory(None) for _ in range(2)] == ["compiled"] * 2
    with pytest.raises(harness.Unavailable, match="left out: 2 compilations took 50 s"):
        factory(None)


@pytest.mark.parametrize("size", gpu_small_gru.SIZES, ids=str)
def test_the_sanitizers_calls_run_on_the_cpu_too(size):
    cases = [case for case in gpu_small_gru.cases() if case.sizes == size and case.precision in ("float32", "bfloat16")]
    assert {case.gate for case in cases} >= {"none", "paper"}
    for case in cases:
        gpu_small_gru.run(case, "cpu")


def test_the_sanitizers_calls_are_of_every_cell_in_every_precision():
    cells = {(c.precision, c.gate, c.reset_after) for c in gpu_small_gru.cases()}
    assert len(cells) == len(gpu_small_gru.PRECISIONS) * len(gpu_small_gru.GATES) * 2


@pytest.mark.parametrize("column", [x for x in gpu_small.COLUMNS if x is not gpu_small_gru], ids=lambda x: x.__name__)
def test_the_sanitizers_calls_of_the_other_columns_run_on_the_cpu_too(column):
    cases = list(column.cases())
    assert len(cases) == len(set(cases)) > 0
    for case in cases:
        column.run(case, "cpu")


def test_the_sanitizer_watches_every_column_that_has_cuda_kernels():
    columns = {path.stem for path in (ROOT / "bench").glob("gpu_small_*.py")}
    assert {x.__name__.removeprefix("bench.") for x in gpu_small.COLUMNS} == columns


@pytest.mark.parametrize("file, tests", [(bench_attention_cuda, 4), (bench_activation_unit_cuda, 4)])
def test_every_row_of_the_attention_columns_is_on_the_gpu_and_has_rivals(file, tests):
    bench = Asked()
    found = [f for name, f in vars(file).items() if name.startswith("test_")]
    for test in found:
        assert test.__doc__
        for parameters in test.pytestmark[0].args[1]:
            test(bench, *parameters.values)
    assert len(found) == tests and len(bench.calls) == len({call[0] for call in bench.calls})
    for problem, ours, others, targets, more in bench.calls:
        assert problem.device == "cuda" and (problem.bytes or problem.flops) > 0
        assert targets and {t.against for t in targets} <= others.keys()
        assert list(ours) == ["dien_ops"] and len(others) == 4 and set(more["without_memory"]) <= others.keys()


def run_pytest(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_rows_that_would_begin_too_late_are_left_out_and_the_reason_is_said():
    pytest.importorskip("pytest_benchmark")
    done = run_pytest("-rs", "bench/bench_gru.py", "-k", "one_user", "--quick", "--seconds=0")
    assert done.returncode == 0 and "left out: the 0 s for all rows were used up" in done.stdout


@pytest.mark.parametrize("named, dirty", [("abc", False), ("abc-dirty", True)])
def test_the_commit_of_a_tree_without_its_history_can_be_named(monkeypatch, named, dirty):
    monkeypatch.setenv("BENCH_COMMIT", named)
    found = {"id": "unversioned", "time": None, "dirty": False, "branch": "(unknown)"}
    conftest.pytest_benchmark_update_commit_info(found)
    assert found == {"id": "abc", "time": None, "dirty": dirty}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    "files, said",
    [(["_cuda"], "needs a GPU that torch can use"), (["", "_cuda"], "files of their own: run bench/bench_*_cuda.py apart")],
    ids=["gpu", "both"],
)  # fmt: skip
def test_rows_of_a_gpu_need_one_and_stand_in_a_file_of_their_own(files, said):
    pytest.importorskip("pytest_benchmark")
    done = run_pytest("--collect-only", *(f"bench/bench_gru{suffix}.py" for suffix in files))
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert said in done.stderr + done.stdout


# ------------------------------------------------------------------------------------------------------------- the GPU


class Properties:
    uuid = "11-22"


@pytest.mark.parametrize(
    "output, status, temperature",
    [
        ("GPU-11-22, 345 MHz, 30\n", 0, "30"),
        ("GPU-0-0, 1980 MHz, 70\nGPU-11-22, 345 MHz, 30\n", 0, "30"),
        ("GPU-0-0, 1980 MHz, 70\nGPU-0-1, 345 MHz, 30\n", 0, "unknown"),
        ("NVIDIA-SMI has failed", 9, "unknown"),
        ("GPU-11-22, 345 MHz\n", 0, "unknown"),
    ],
    ids=["one", "several", "not_among_them", "failed", "fewer_fields"],
)
def test_what_the_driver_says_is_of_the_gpu_that_torch_sees(monkeypatch, output, status, temperature):
    monkeypatch.setattr(gpu.shutil, "which", lambda _: "nvidia-smi")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    monkeypatch.setattr(
        gpu.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], status, stdout=output, stderr="")
    )
    assert gpu.nvidia_smi("clocks.sm", "temperature.gpu")["temperature.gpu"] == temperature


def test_the_architecture_is_as_torch_names_it():
    assert [gpu.architecture(*c) for c in ((8, 0), (8, 9), (9, 0), (12, 0))] == ["8.0", "8.9", "9.0a", "12.0a"]
    assert gpu.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
def test_make_gpu_check_takes_python_as_it_is():
    command = ["make", "--no-print-directory", "--dry-run", "gpu-check", "PYTHON=some-python", "STAGES=build tests"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert said.strip() == "some-python -m bench.gpu_check build tests"
