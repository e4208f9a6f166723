# SPDX-License-Identifier: Apache-2.0
"""All that is known of the CUDA kernels only on a GPU, in one go and in under 8 minutes: ``make gpu-check``.

It builds for the GPU that is there, tests the primitives and then the recurrent column on it, lets compute-sanitizer
watch small calls, and measures the column beside its rivals. It installs nothing, needs no network and sets nothing of
the GPU; Python must have torch, pytest, pytest-benchmark, matplotlib, setuptools, cmake, ninja and pybind11. Tests run
side by side where pytest-xdist is there.

Each stage is a process of its own and is stopped at its limit. A stage that fails does not keep later ones from
running, except that nothing runs without a GPU, or on what an earlier build left behind where this one failed. The end
is a table, and the exit status says whether all passed. The log as it grows, the table, and <gpu>.json, which
bench.report reads, are in out/gpu-check, and where GPU_CHECK_OUT names a folder, in that one too. Where all stages were
asked for, the JSON goes to bench/results as well. BENCH_COMMIT names the commit of a tree without its history.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from threading import Thread
from typing import TextIO

from bench import gpu
from bench.report import seconds, share_cell, size, step_cell, terminal_table
from bench.results import Check, Row, Run, load, three_digits

ROOT = Path(__file__).parents[1]
OUT = ROOT / "out" / "gpu-check"
TEST_TARGET = "dien_ops_cuda_test"  # of the primitives' own tests: it stays where setup.py builds
TEST_LIBRARY = ROOT / "build" / f"{sys.implementation.cache_tag}-sanitize0" / f"lib{TEST_TARGET}.so"
TOTAL_SECONDS = 465.0
FOR_BENCHMARKS = 120.0  # what the stages before them leave of it
LEAST_SECONDS = 15.0  # with less left, a stage is not begun
WRITING_SECONDS = 40.0  # of the benchmarks' time, for the row that is under way at the end, the ceilings and the JSON
TEST_PROCESSES = 8
TOOLS = {"memcheck": 70.0, "racecheck": 70.0, "synccheck": 35.0, "initcheck": 35.0}  # the sanitizer's; seconds for each
SANITIZER_ERRORS = 99  # the exit status where it found some
ENDING_SECONDS = 10.0  # a process that is killed may have to wait for the GPU


@dataclass(frozen=True)
class Finished:
    """A process that has ended."""

    status: int | None  # None: it was stopped at its limit
    output: str
    seconds: float

    @property
    def last_line(self) -> str:
        return next((line.strip() for line in reversed(self.output.splitlines()) if line.strip()), "it said nothing")


@dataclass(frozen=True)
class Stage:
    name: str
    command: Callable[[float], list[str]]  # for the seconds that it may take
    judge: Callable[[Finished], tuple[bool, str]]  # whether it passed, and what is said of it
    limit: float
    environment: dict[str, str] = field(default_factory=dict)
    shown: str = ""  # lines that begin with it go to the terminal; the log has all


# Runs a command with more environment, for so many seconds at most, and calls back with each line.
Runner = Callable[[list[str], dict[str, str], float, Callable[[str], None]], Finished]


# ------------------------------------------------------------------------------------------------------------ verdicts


def judge_status(done: Finished) -> tuple[bool, str]:
    return done.status == 0, done.last_line if done.status == 0 else f"status {done.status}: {done.last_line}"


def read_facts(output: str) -> dict[str, str] | None:
    """What bench.gpu prints; warnings may stand around it."""
    lines = [line for line in output.splitlines() if line.startswith("{")]
    return json.loads(lines[-1]) if lines else None


def judge_device(done: Finished) -> tuple[bool, str]:
    facts = read_facts(done.output) if done.status == 0 else None
    return (True, facts["name"]) if facts else (False, done.last_line)


def count_tests(output: str) -> dict[str, int]:
    """What pytest's last line counts."""
    lines = [line for line in output.splitlines() if re.search(r"\bin \d+(\.\d+)?s\b", line)]
    found = re.findall(r"(\d+) (passed|failed|error|skipped|xfailed|xpassed)", lines[-1]) if lines else []
    return {kind: int(number) for number, kind in found}


def judge_tests(done: Finished) -> tuple[bool, str]:
    counts = count_tests(done.output)
    if not counts:
        return False, f"status {done.status}: {done.last_line}"
    return done.status == 0 and "passed" in counts, ", ".join(f"{number} {kind}" for kind, number in counts.items())


def count_sanitizer_errors(output: str) -> int | None:
    """Errors, or hazards of whatever weight, as the summary counts them; None where there is no summary."""
    summary = r"RACECHECK SUMMARY: (\d+) hazards? displayed|ERROR SUMMARY: (\d+) errors?\b(?! were not printed)"
    found = re.findall(summary, output)
    return sum(int(hazards or errors) for hazards, errors in found) if found else None


def judge_sanitizer(done: Finished) -> tuple[bool, str]:
    errors = count_sanitizer_errors(done.output)
    if errors is None:
        return False, f"no summary, status {done.status}: {done.last_line}"
    said = f"{errors} error{'s' * (errors != 1)}"
    if done.status not in (0, SANITIZER_ERRORS):
        return False, f"{said}, but the calls ended with status {done.status}"
    return errors == 0 and done.status == 0, said


# -------------------------------------------------------------------------------------------------------------- stages


def pytest(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-o", "faulthandler_timeout=60", *arguments]


def on_device(*arguments: str) -> list[str]:
    return pytest("--device", "cuda", "--tb=short", "-rfE", "--durations=5", *arguments)


def side_by_side() -> list[str]:
    return ["-n", str(TEST_PROCESSES)] if importlib.util.find_spec("xdist") else []


def sanitized(tool: str) -> list[str]:
    """Our kernels alone are watched: torch's would take minutes."""
    return [
        "compute-sanitizer",
        *("--tool", tool),
        *("--kernel-name", "kernel_substring=dien_ops"),
        *("--report-api-errors", "no"),
        *("--print-limit", "20"),
        *("--error-exitcode", str(SANITIZER_ERRORS)),
        *(sys.executable, "-m", "bench.gpu_small"),
    ]


DEVICE = Stage("device", lambda _: [sys.executable, "-m", "bench.gpu"], judge_device, limit=60)


def stages(architecture: str, result: Path) -> list[Stage]:
    """What comes after DEVICE; the benchmarks, which are last, write their result."""
    names = (
        f"test_{column}.py"
        for column in ("gru*", "attention*", "activation_unit*", "dice*", "aux_loss", "embedding*", "optim*")
    )
    tests = sorted(str(path.relative_to(ROOT)) for name in names for path in (ROOT / "python_tests").glob(name))
    primitives = ["--cuda-test-library", str(TEST_LIBRARY), "python_tests/test_cuda_primitives.py"]
    build = {"DIEN_OPS_CUDA": "on", "TORCH_CUDA_ARCH_LIST": architecture, "DIEN_OPS_TARGETS": f"all {TEST_TARGET}"}
    one_thread = {"OMP_NUM_THREADS": "1"}
    one_by_one = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # each tensor an allocation, whose end memcheck knows
    benchmarks = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "bench").glob("bench_*_cuda.py"))]
    return [
        Stage("build", lambda _: [sys.executable, "setup.py", "build_ext", "--inplace"], judge_status, 200, build),
        Stage("primitives", lambda _: on_device(*primitives), judge_tests, 60),
        Stage("tests", lambda _: on_device(*side_by_side(), *tests), judge_tests, 150, one_thread),
        *(
            Stage(tool, lambda _, tool=tool: sanitized(tool), judge_sanitizer, limit, one_by_one, shown="=====")
            for tool, limit in TOOLS.items()
        ),
        Stage(
            "benchmarks",
            lambda limit: pytest(
                *(
                    "-vv",
                    "--benchmark-quiet",
                    f"--seconds={limit - WRITING_SECONDS:.0f}",
                    "--benchmark-json",
                    str(result),
                ),
                *benchmarks,
            ),
            judge_tests,
            limit=230,
        ),
    ]


def run_stage(stage: Stage, limit: float, run: Runner, say: Callable[[str, bool], None]) -> tuple[Check, Finished]:
    """``say`` gets a line and whether it is for the terminal too."""
    say(f"=== {stage.name}: at most {limit:.0f} s", True)
    try:
        done = run(stage.command(limit), stage.environment, limit, lambda x: say(x, x.startswith(stage.shown)))
    except OSError as failure:  # there is no such program
        done = Finished(127, str(failure), 0.0)
    passed, said = stage.judge(done)
    if done.status is None:
        passed, said = False, f"stopped after {done.seconds:.0f} s: {said}"
    if not passed and stage.shown:
        for line in done.output.splitlines()[-30:]:
            say(f"  | {line}", True)
    say(f"=== {stage.name}: {'passed' if passed else 'FAILED'} in {done.seconds:.0f} s: {said}", True)
    return Check(stage.name, passed, said, done.seconds), done


def run_stages(
    planned: Sequence[Stage], left: Callable[[], float], run: Runner, say: Callable[[str, bool], None]
) -> list[Check]:
    """One after the other; ``left`` says how many seconds there are for all that come."""
    checks: list[Check] = []
    for stage in planned:
        reserved = FOR_BENCHMARKS if stage is not planned[-1] and planned[-1].name == "benchmarks" else 0.0
        limit = min(stage.limit, left() - reserved)
        if any(check.name == "build" and not check.passed for check in checks):
            checks.append(Check(stage.name, False, "not run: the build failed", 0.0))
        elif limit < LEAST_SECONDS:
            checks.append(Check(stage.name, False, f"not run: {max(limit, 0.0):.0f} s were left for it", 0.0))
        else:
            checks.append(run_stage(stage, limit, run, say)[0])
            continue
        say(f"=== {stage.name}: {checks[-1].said}", True)
    return checks


def run_process(
    command: list[str], environment: dict[str, str], limit: float, heard: Callable[[str], None]
) -> Finished:
    """A process in a group of its own, which ends with all its children at the limit."""
    cuda = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"  # where nvcc and the sanitizer are
    paths = {"PATH": f"{os.environ.get('PATH', os.defpath)}{os.pathsep}{cuda}", "PYTHONUNBUFFERED": "1"}
    paths["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    program = shutil.which(command[0], path=paths["PATH"]) or command[0]
    begin = time.monotonic()
    process = subprocess.Popen(
        [program, *command[1:]],
        cwd=ROOT,
        env={**os.environ, **paths, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    lines: list[str] = []

    def listen() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line.rstrip("\n"))
            heard(lines[-1])

    listener = Thread(target=listen, daemon=True)  # not waited for in vain: who holds the pipe may outlive the process
    listener.start()
    status = None
    try:
        status = process.wait(limit)
    except BaseException as reason:
        os.killpg(process.pid, signal.SIGKILL)
        if not isinstance(reason, subprocess.TimeoutExpired):
            raise
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(ENDING_SECONDS)
    listener.join(ENDING_SECONDS)
    return Finished(status, "\n".join(lines), time.monotonic() - begin)


# --------------------------------------------------------------------------------------------------------------- table


def rows_of_section(rows: Sequence[Row]) -> str:
    """Ours, how many times as fast as each rival that is, what share of the ceilings, and whether that is enough."""
    rivals = list(dict.fromkeys(rival for row in rows for rival in row.rivals))
    shares = ["of mm", "of copy", "a step", "memory", "verdict"]
    lines = [["", rows[0].ours, *rivals, *shares]]
    for row in rows:
        ours = row.timings[row.ours]
        lines.append(
            [
                row.case,
                seconds(median(ours.seconds)),
                *(f"{three_digits(row.ratio(r))}x" if r in row.timings else "" for r in rivals),
                share_cell(row.share_of_ceiling()),
                share_cell(row.share_of_copy()),
                step_cell(row),
                "" if ours.peak_bytes is None else size(ours.peak_bytes),
                row.verdict() if row.targets else "",
            ]
        )
    return terminal_table(lines)


def summary(checks: Sequence[Check], run: Run | None) -> str:
    """The table at the end: the stages, then the rows, then what is not there and why."""
    verdicts = [[c.name, "passed" if c.passed else "FAILED", f"{c.seconds:.0f} s", c.said] for c in checks]
    parts = [terminal_table(verdicts)]
    if run is not None:
        parts[0] = f"{run.machine['gpu']['name']}, commit {run.commit}\n{parts[0]}"
        for section in dict.fromkeys(row.section for row in run.rows):
            parts.append(f"{section}\n{rows_of_section([r for r in run.rows if r.section == section])}")
        absent = Counter((rival, why) for row in run.rows for rival, why in row.absent.items())
        missing = [f"{rival}, in {count} row{'s' * (count > 1)}: {why}" for (rival, why), count in absent.items()]
        missing += [f"{n.section}, {n.case}: not measured: {n.reason}" for n in run.not_run]
        parts += ["\n".join(missing)] if missing else []
    failed = [c.name for c in checks if not c.passed]
    parts.append(f"FAILED: {', '.join(failed)}" if failed else "all passed")
    return "\n\n".join(parts)


# ---------------------------------------------------------------------------------------------------------------- main


def write_checks(result: Path, checks: Sequence[Check]) -> None:
    """Into the benchmarks' JSON: what else is known of the kernels that were measured."""
    content = json.loads(result.read_text(encoding="utf-8"))
    content["checks"] = [asdict(check) for check in checks]
    result.write_text(json.dumps(content, indent=4) + "\n", encoding="utf-8")


def run_all(wanted: Sequence[str], run: Runner, folders: Sequence[Path], results: Path) -> bool:
    """Runs the stages that are wanted (all, where none is named), writes what is known, and says whether all passed."""
    end = time.monotonic() + TOTAL_SECONDS
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    logs: list[TextIO] = [(folder / "gpu-check.log").open("w", encoding="utf-8") for folder in folders]

    def say(line: str, on_terminal: bool = True) -> None:
        for log in logs:
            print(line, file=log, flush=True)
        if on_terminal:
            print(line, flush=True)

    device, done = run_stage(DEVICE, DEVICE.limit, run, say)
    checks, measured = [device], None
    facts = read_facts(done.output)
    if device.passed and facts:
        result = folders[0] / f"{gpu.slug(facts['name'])}.json"
        result.unlink(missing_ok=True)
        planned = [s for s in stages(facts["architecture"], result) if not wanted or s.name in wanted]
        checks += run_stages(planned, lambda: end - time.monotonic(), run, say)
        if result.exists():
            write_checks(result, checks)
            measured = load(result)
            for folder in [*folders[1:], *([] if wanted else [results])]:
                shutil.copy(result, folder)
    text = summary(checks, measured)
    say(f"\n{text}")
    for folder, log in zip(folders, logs, strict=True):
        log.close()
        (folder / "gpu-check.txt").write_text(text + "\n", encoding="utf-8")
    return all(check.passed for check in checks)


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.gpu_check", description="All that is known only on a GPU.")
    names = ["build", "primitives", "tests", *TOOLS, "benchmarks"]
    parser.add_argument("stages", nargs="*", metavar="stage", help=f"{', '.join(names)} (default: all)")
    wanted = parser.parse_args().stages
    if strangers := [name for name in wanted if name not in names]:
        parser.error(f"stage must be one of {', '.join(names)}, got {strangers[0]}")
    more = os.environ.get("GPU_CHECK_OUT")
    folders = [OUT, *([Path(more)] if more else [])]
    sys.exit(not run_all(wanted, run_process, folders, ROOT / "bench" / "results"))


if __name__ == "__main__":
    main()
