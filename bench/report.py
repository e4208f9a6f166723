# SPDX-License-Identifier: Apache-2.0
"""Tables and pictures of benchmark runs: ``python -m bench.report RESULTS.json ... [--readme README.md] [--out DIR]``.

Prints the tables; writes them as Markdown and the pictures under ``--out``, a folder for each file of results; and,
where ``--readme`` is given, puts each column's tables between its markers there, ``<!-- bench:gru -->`` and
``<!-- /bench:gru -->``; those of a GPU between ``<!-- bench:gru-cuda -->`` and its end. Only whole runs go there: no
quick ones, and none with rows that were not selected.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median

from bench import plots
from bench.results import CEILING, COPY, Row, Run, Timing, load, percentile, three_digits

OUT = Path("out/bench")
BUSY = 0.03  # of the cores; above it, whoever waits for another thread may wait for a stranger


# --------------------------------------------------------------------------------------------------------------- cells


def seconds(value: float) -> str:
    """In the unit that keeps the digits before or just behind the point."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        number = three_digits(value / size)
        if float(number) >= 1:
            return f"{number} {unit}"
    return f"{three_digits(value / 1e-9)} ns"


def size(value: int) -> str:
    """Bytes in MiB, from 1024 of them on in GiB."""
    return f"{three_digits(value / 2**30)} GiB" if value >= 2**30 else f"{three_digits(value / 2**20)} MiB"


def time_cell(timing: Timing) -> str:
    """Median, and in brackets the 20th and the 80th percentile."""
    low, middle, high = (percentile(timing.seconds, p) for p in (20, 50, 80))
    return f"{seconds(middle)} [{seconds(low)}, {seconds(high)}]"


def rival_cell(row: Row, rival: str) -> str:
    if rival in row.timings:
        ratio = row.ratio(rival)
        slower = ", we are slower" if ratio < 1 else ""
        return f"{time_cell(row.timings[rival])}: {three_digits(ratio)}x{slower}"
    return row.absent.get(rival, "")


def memory_cell(row: Row) -> str:
    measured = {name: t.peak_bytes for name, t in row.timings.items() if t.peak_bytes is not None}
    if row.ours not in measured:
        return ""
    others = [f"{name} {size(peak)}" for name, peak in measured.items() if name != row.ours]
    return "; ".join([size(measured[row.ours]), *others])


def share_cell(share: float | None) -> str:
    return "" if share is None else f"{share:.2f}"


def flatness_cell(row: Row) -> str:
    flatness = row.flatness()
    return "" if flatness is None else three_digits(1 / flatness)


def step_cell(row: Row) -> str:
    per_step = row.seconds_per_step()
    return "" if per_step is None else seconds(per_step)


def brief(row: Row) -> str:
    """Ours, and how many times as fast as whom."""
    ratios = ", ".join(f"{three_digits(row.ratio(rival))}x {rival}" for rival in row.rivals)
    return f"{seconds(median(row.timings[row.ours].seconds))}: {ratios}"


def table(run: Run, column: str, section: str) -> list[list[str]]:
    """Header and rows of one section; columns that would stay empty are left out."""
    rows = [r for r in run.rows if (r.column, r.section) == (column, section)]
    not_run = [n for n in run.not_run if (n.column, n.section) == (column, section)]
    ours = list(dict.fromkeys(r.ours for r in rows))
    rivals = list(dict.fromkeys(name for r in rows for name in (*r.rivals, *r.absent)))
    shares = [f"of {CEILING}", f"of {COPY}", "slowest / fastest", "a step"]
    header = ["", " / ".join(ours) or "ours", *rivals, *shares, "peak memory", "target", "verdict"]
    lines = []
    for row in rows:
        lines.append(
            [
                row.case,
                time_cell(row.timings[row.ours]),
                *(rival_cell(row, rival) for rival in rivals),
                share_cell(row.share_of_ceiling()),
                share_cell(row.share_of_copy()),
                flatness_cell(row),
                step_cell(row),
                memory_cell(row),
                "; ".join(map(str, row.targets)),
                row.verdict() if row.targets else "",
            ]
        )
    lines += [[n.case, f"not measured: {n.reason}", *[""] * (len(header) - 2)] for n in not_run]
    kept = [i for i in range(len(header)) if i < 2 or any(line[i] for line in lines)]
    return [[line[i] for i in kept] for line in (header, *lines)]


# ---------------------------------------------------------------------------------------------------------------- text


def markdown_table(lines: Sequence[Sequence[str]]) -> str:
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    head, *body = ["| " + " | ".join(line) + " |" for line in escaped]
    return "\n".join([head, "|" + "---|" * len(lines[0]), *body])


def terminal_table(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def disturbance(bystanders: float | None) -> str:
    """What other processes did meanwhile."""
    if bystanders is None:
        return "What other processes took of the machine is not known."
    if bystanders > BUSY:
        return f"**Other processes took {bystanders:.0%} of the cores meanwhile: these times tell little.**"
    return f"Other processes took {bystanders:.1%} of the cores meanwhile."


MEASURED_HERE = (
    "Times: median [20th, 80th percentile] of one call; in each round every contestant is timed once, in random "
    f"order. Ratios: how many times as fast ours is, median of the rounds. Of {CEILING}: share of a large float32 "
    "matrix product's rate in the same rounds, above 1 where torch's product is not the best the processor can do. "
    f"Of {COPY}: share of the rate of a large copy, larger than any cache, in the same rounds, if a call moves no byte "
    "that it need not; above 1 where its tensors stay in a cache. "
    "Peak memory: what one call needs above its inputs and parameters."
)
MEASURED_ON_A_GPU = (
    "Times: median [20th, 80th percentile] of one call between two events of the GPU, its L2 cache full of other data; "
    "where it waits for the host, that counts, but who is replayed from a CUDA graph need not wait. In each round "
    "every contestant is timed once, in random order. Ratios: how many times as fast ours is, median of the rounds. "
    f"Of {CEILING}: share of the rate of a large matrix product of the same dtype in the same rounds, tf32's for "
    f"float32. Of {COPY}: share of a large copy's rate, if a call moves no byte that it need not. A step: the time "
    "divided by T. Peak memory: what one call needs above its inputs and parameters, from torch's allocator."
)


def gpu_facts(gpu: dict[str, str]) -> str:
    return f"{gpu['name']}: " + ", ".join(f"{name} {value}" for name, value in gpu.items() if name != "name")


def about(run: Run) -> list[str]:
    """Where and how it was measured, a paragraph for each string."""
    m = run.machine
    versions = ", ".join(f"{name} {version}" for name, version in m["versions"].items())
    ceilings = ", ".join(f"{name} {value:.0f}" for name, value in m["ceilings"].items())
    environment = ", ".join(f"{name} {value}" for name, value in m["environment"].items())
    quick = " A quick run: few rounds; large rows, peak memory and what compiles are left out." if m["quick"] else ""
    gpu = f"{gpu_facts(m['gpu'])}. Host: " if "gpu" in m else ""
    checks = "; ".join(f"{check.name}: {check.said}" for check in run.checks)
    return [
        f"{gpu}{m['cpu']}, {m['cores']} cores, {m['threads']} threads, {m['system']}, {m['kernels']} kernels; dien_ops "
        f"{m['dien_ops']} at {run.commit}, {versions}; {run.date}.{quick}",
        f"Ceilings: {ceilings}. {environment}. {disturbance(m['bystanders'])}"
        + (f" On this device: {checks}." if checks else ""),
        MEASURED_ON_A_GPU if gpu else MEASURED_HERE,
    ]


def summary(rows: Iterable[Row], not_run: int) -> str:
    verdicts = [r.verdict() for r in rows if r.targets]
    reached = sum(v == "reached" for v in verdicts)
    not_measured = "1 row was" if not_run == 1 else f"{not_run} rows were"
    return f"{reached} of {len(verdicts)} rows with a target reach it; {not_measured} not measured."


def notes(rows: Iterable[Row]) -> list[str]:
    """What a contestant's timing has to say of itself, each thing once."""
    return [
        f"{r.section}, {r.case}: {name}: {timing.note}"
        for r in rows
        for name, timing in r.timings.items()
        if timing.note
    ]


def is_sweep(run: Run, column: str, section: str) -> bool:
    return any(r.sweep for r in run.rows if (r.column, r.section) == (column, section))


def markdown(run: Run, column: str) -> str:
    """One column of one run: where, tables, how the cost grows (folded), notes."""
    rows = [r for r in run.rows if r.column == column]
    parts = [*about(run)[:2], summary(rows, sum(n.column == column for n in run.not_run)), about(run)[2]]
    sections = run.sections(column)
    for section in sorted(sections, key=lambda s: is_sweep(run, column, s)):
        text = markdown_table(table(run, column, section))
        if is_sweep(run, column, section):
            parts.append(f"<details><summary>{section}</summary>\n\n{text}\n\n</details>")
        else:
            parts.append(f"**{section}**\n\n{text}")
    said = notes(rows)
    if said:
        parts.append("\n".join(f"- {note}" for note in said))
    return "\n\n".join(parts)


def terminal(run: Run) -> str:
    parts = [f"=== {run.name}", *about(run)]
    for column in run.columns:
        for section in run.sections(column):
            parts.append(f"{section}\n{terminal_table(table(run, column, section))}")
        rows = [r for r in run.rows if r.column == column]
        parts += [*notes(rows), f"{column}: {summary(rows, sum(n.column == column for n in run.not_run))}"]
    return "\n\n".join(parts)


def put_between_markers(text: str, column: str, content: str) -> str:
    """The text with the content between the column's markers.

    Raises:
        ValueError: the markers are not there, once each and in this order.
    """
    begin, end = f"<!-- bench:{column} -->", f"<!-- /bench:{column} -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"expected {begin} and, behind it, {end}, once each")
    before, _, rest = text.partition(begin)
    return f"{before}{begin}\n{content}\n{end}{rest.partition(end)[2]}"


# ---------------------------------------------------------------------------------------------------------------- main


def write(runs: Sequence[Run], out: Path, readme: Path | None) -> list[Path]:
    """Writes the Markdown tables, the pictures and the README; returns what was written."""
    written: list[Path] = []
    for run in runs:
        folder = out / run.name
        folder.mkdir(parents=True, exist_ok=True)
        for column in run.columns:
            path = folder / f"{column}.md"
            path.write_text(markdown(run, column) + "\n", encoding="utf-8")
            written += [path, *plots.draw(run, column, folder)]
    if readme is not None:
        text = readme.read_text(encoding="utf-8")
        for column in dict.fromkeys(c for run in runs for c in run.columns):
            content = "\n\n".join(markdown(run, column) for run in runs if column in run.columns)
            text = put_between_markers(text, column, content)
        readme.write_text(text, encoding="utf-8")
        written.append(readme)
    return written


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="bench.report", description="Tables and pictures of benchmark runs.")
    parser.add_argument("results", nargs="+", type=Path, help="what --benchmark-json wrote")
    parser.add_argument("--readme", type=Path, help="file whose tables are to be replaced")
    parser.add_argument("--out", type=Path, default=OUT, help="folder for Markdown and PNG (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        runs = [load(path) for path in options.results]
        print("\n\n".join(terminal(run) for run in runs))
        for run in runs:
            if options.readme is not None and not run.is_whole:
                raise ValueError(f"{run.name} must not go into {options.readme}: it is quick, or a run of some rows")
        written = write(runs, options.out, options.readme)
    except (OSError, ValueError) as mistake:
        sys.exit(f"bench.report: {mistake}")
    print("\nwritten: " + " ".join(map(str, written)))


if __name__ == "__main__":
    main()
