# SPDX-License-Identifier: Apache-2.0
"""Pictures of a run: how many times as fast ours is, with the targets, and how the cost grows."""

from __future__ import annotations

import re
from pathlib import Path
from statistics import median

import matplotlib
from matplotlib.figure import Figure

from bench.results import CEILING, COPY, Row, Run, percentile

matplotlib.use("Agg")  # files only: works where there is no screen

REACHED, MISSED, FREE = "#2ca02c", "#d62728", "#7f9fbf"  # free: no target


def draw(run: Run, column: str, folder: Path) -> list[Path]:
    """Writes ``<column>_ratios.png`` and ``<column>_<axis>.png`` for each sweep, where there are rows for it."""
    rows = [r for r in run.rows if r.column == column]
    compared = [r for r in rows if r.sweep is None and r.rivals]
    written = []
    if compared:
        written.append(_save(ratio_bars(compared), folder / f"{column}_ratios.png"))
    for section in dict.fromkeys(r.section for r in rows if r.sweep):
        swept = [r for r in rows if r.section == section]
        axis = re.sub(r"\W+", "_", swept[0].sweep.axis)
        written.append(_save(curves(section, swept), folder / f"{column}_{axis}.png"))
    return written


def ratio_bars(rows: list[Row]) -> Figure:
    """A bar for each rival of each row, from 1 to the ratio; thin line: 20th to 80th percentile; thick mark: target."""
    sections = list(dict.fromkeys(row.section for row in rows))
    bars = {s: [(row, rival) for row in rows if row.section == s for rival in row.rivals] for s in sections}
    heights = [len(some) for some in bars.values()]
    figure = Figure(figsize=(10, 1.2 + 0.5 * len(sections) + 0.25 * sum(heights)), layout="constrained")
    every = figure.subplots(len(sections), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for axes, section in zip(every, sections, strict=True):
        for place, (row, rival) in enumerate(bars[section]):
            ratios = row.ratios(rival)
            middle = median(ratios)
            target = next((t.at_least for t in row.targets if t.against == rival), None)
            colour = FREE if target is None else REACHED if middle >= target else MISSED
            axes.barh(place, middle - 1, left=1, color=colour, height=0.7)
            axes.plot([percentile(ratios, 20), percentile(ratios, 80)], [place, place], color="black", linewidth=1)
            if target is not None:
                axes.plot([target, target], [place - 0.45, place + 0.45], color="black", linewidth=2.5)
        axes.set_yticks(range(len(bars[section])), [f"{row.case}: {rival}" for row, rival in bars[section]], fontsize=7)
        axes.set_title(section, loc="left", fontsize=9)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}x")
        axes.axvline(1, color="black", linewidth=0.8)
        axes.grid(axis="x", which="both", alpha=0.3)
        axes.invert_yaxis()
    figure.supxlabel("times as fast as the rival; thick: target (green: reached, red: not, blue: none); thin: 20-80 %")
    return figure


def curves(section: str, rows: list[Row]) -> Figure:
    """Time against the swept size, on logarithmic axes; the band is the 20th to 80th percentile."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name in dict.fromkeys(name for row in rows for name in row.timings if name not in (CEILING, COPY)):
        points = sorted((row.sweep.value, row.timings[name].seconds) for row in rows if name in row.timings)
        sizes = [size for size, _ in points]
        low, middle, high = ([percentile(s, p) * 1e3 for _, s in points] for p in (20, 50, 80))
        (line,) = axes.plot(sizes, middle, "o-", label=name)
        axes.fill_between(sizes, low, high, alpha=0.2, color=line.get_color())
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = sorted({row.sweep.value for row in rows})
    axes.set_xticks(ticks, [f"{t:,.12g}" for t in ticks], rotation=60)
    axes.minorticks_off()
    axes.set(xlabel=rows[0].sweep.axis, ylabel="milliseconds", title=section)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=120)
    return path
