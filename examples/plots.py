# SPDX-License-Identifier: Apache-2.0
"""The demo's pictures."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from sklearn.decomposition import PCA

from examples.data.behaviours import BehaviourLog
from examples.evolution import Evolution, Target
from examples.report import replacing
from examples.training import TrainingRun

matplotlib.use("Agg")  # files only: works where there is no screen

MODEL_COLOURS = {"base": "#777777", "din": "#1f77b4", "dien": "#d62728"}
TARGET_COLOURS = ("#d62728", "#2ca02c", "#1f77b4", "#e6a700")  # the paper's red, blue and yellow, and one more


def learning_curves(path: Path, runs: dict[str, TrainingRun]) -> None:
    """Training loss and validation AUC of every model; DIEN's auxiliary loss beside them (DIEN Fig. 2)."""
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    loss_axes, auc_axes = figure.subplots(1, 2)
    for name, run in runs.items():
        for term, losses in run.losses.items():
            style, label = ("-", name) if term == "target" else (":", f"{name}, {term} loss (weighted)")
            loss_axes.plot(run.loss_steps, losses, style, label=label, color=MODEL_COLOURS[name], linewidth=1.4)
        auc_axes.plot(run.epoch_steps, run.validation_auc, "o-", label=name, color=MODEL_COLOURS[name])
        kept = run.best_epoch - 1
        auc_axes.plot(
            run.epoch_steps[kept],
            run.validation_auc[kept],
            "o",
            markersize=13,
            fillstyle="none",
            color=MODEL_COLOURS[name],
        )
    loss_axes.set(xlabel="training step", ylabel="cross-entropy", title="Training loss")
    auc_axes.set(xlabel="training step", ylabel="AUC", title="Validation after each epoch (ringed: the one kept)")
    for axes in (loss_axes, auc_axes):
        axes.grid(alpha=0.3)
        axes.legend()
    _save(figure, path)


def attention_heatmap(path: Path, evolution: Evolution, log: BehaviourLog) -> None:
    """How much each behaviour of one history has to do with different targets (DIEN Fig. 3b)."""
    shown = evolution.attention[:-1]  # of "none" all are equal
    figure = Figure(figsize=(13, 5.2), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shown, cmap="Reds", vmin=0, aspect="auto")
    for row, column in np.ndindex(*shown.shape):
        dark = shown[row, column] > 0.6 * shown.max()
        axes.text(
            column, row, f"{shown[row, column]:.2f}", ha="center", va="center", color="white" if dark else "black"
        )
    behaviours = [f"{item_name(log, item)}\n{category_name(log, item)}" for item in evolution.history]
    axes.set_xticks(range(len(behaviours)), behaviours, rotation=40, ha="right", rotation_mode="anchor", fontsize=8)
    axes.set_yticks(range(len(shown)), [describe(log, target) for target in evolution.targets[:-1]], fontsize=9)
    axes.set_xlabel("the user's behaviours, oldest first")
    axes.set_title("DIEN's attention: how much each behaviour has to do with a target")
    figure.colorbar(image, ax=axes, label="attention score (each row sums to 1)", pad=0.01)
    _save(figure, path)


def augru_pca(path: Path, evolution: Evolution, log: BehaviourLog) -> None:
    """The way of the AUGRU's state through one history, for different targets, in two dimensions (DIEN Fig. 3a)."""
    _, steps, hidden = evolution.states.shape
    pca = PCA(n_components=2).fit(evolution.states.reshape(-1, hidden))
    start = pca.transform(np.zeros((1, hidden)))
    figure = Figure(figsize=(10, 7), layout="constrained")
    axes = figure.subplots()
    for target, states, colour in zip(evolution.targets, evolution.states, TARGET_COLOURS, strict=True):
        way = np.concatenate([start, pca.transform(states)])
        axes.plot(way[:, 0], way[:, 1], "o-", color=colour, label=describe(log, target), linewidth=1.6, markersize=4)
        axes.annotate(str(steps), way[-1], xytext=(5, 5), textcoords="offset points", color=colour, weight="bold")
        longest = 1 + int(np.argmax(np.linalg.norm(np.diff(way, axis=0), axis=1)))
        if longest != steps:
            axes.annotate(str(longest), way[longest], xytext=(5, -12), textcoords="offset points", color=colour)
    axes.plot(*start[0], "s", color="black", markersize=9)
    axes.annotate("start", start[0], xytext=(8, -4), textcoords="offset points")
    shares = pca.explained_variance_ratio_
    axes.set(
        xlabel=f"first principal component ({shares[0]:.0%} of the variance)",
        ylabel=f"second principal component ({shares[1]:.0%})",
        title="The interest state of DIEN's AUGRU over the same behaviours, for different targets\n"
        "(numbered: the behaviour after the longest step, and the last one)",
    )
    axes.grid(alpha=0.3)
    axes.legend(loc="best", fontsize=9)
    _save(figure, path)


def item_name(log: BehaviourLog, item: int, longest: int = 26) -> str:
    name = log.item_names[item]
    return name if len(name) <= longest else name[: longest - 1].rstrip() + "…"


def category_name(log: BehaviourLog, item: int) -> str:
    return f"[{log.category_names[log.item_category[item]]}]"


def describe(log: BehaviourLog, target: Target) -> str:
    if target.item == 0:
        return "none: all attention scores equal"
    return f"{target.role}:\n{item_name(log, target.item, longest=40)} {category_name(log, target.item)}"


def _save(figure: Figure, path: Path) -> None:
    with replacing(path) as fresh:
        figure.savefig(fresh, format="png", dpi=130)
