# SPDX-License-Identifier: Apache-2.0
"""What a run leaves behind: the table, metrics.json and checkpoints. Files appear whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Result:
    """One model's line in the table; the fields are the keys of metrics.json."""

    auc: float
    auc_standard_error: float
    gauc: float
    relaimpr: float  # percent
    samples_per_s: float


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a path to write to; if the block ends without error, what was written there replaces `path` at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    os.close(handle)
    fresh = Path(name)
    try:
        yield fresh
        fresh.chmod(0o644)  # mkstemp's files are for the owner alone
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)


def save_json(path: Path, content: dict[str, Any]) -> None:
    with replacing(path) as fresh:
        fresh.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def save_checkpoint(path: Path, model: nn.Module, about: dict[str, Any]) -> None:
    """Saves the weights and what is needed to build the model again; `torch.load(path, weights_only=True)` reads it."""
    with replacing(path) as fresh:
        torch.save({"state_dict": model.state_dict(), **about}, fresh)


def table(results: dict[str, Result]) -> str:
    rows = [f"{'model':<6} {'AUC ± standard error':>21} {'GAUC':>8} {'RelaImpr':>9} {'samples/s':>10}"]
    for name, result in results.items():
        auc = f"{result.auc:.4f} ± {result.auc_standard_error:.4f}"
        rows.append(f"{name:<6} {auc:>21} {result.gauc:>8.4f} {result.relaimpr:>8.2f}% {result.samples_per_s:>10,.0f}")
    return "\n".join(rows)
