# SPDX-License-Identifier: Apache-2.0
"""Trains the base model, DIN and DIEN on the same behaviours and compares them: `python -m examples.demo`."""

from __future__ import annotations

import argparse
import dataclasses
import platform
import sys
import time
from pathlib import Path

import numpy as np
import torch

import dien_ops
from examples import evolution, plots, report
from examples.data import BehaviourLog, Protocol, generate_synthetic, load_movielens
from examples.data.download import DownloadError
from examples.data.movielens import DataError
from examples.data.synthetic import oracle_scores
from examples.metrics import auc_with_standard_error, gauc, jackknife_error, leave_one_user_out, relaimpr
from examples.models import DIEN, MODELS, BaseModel, Vocabulary
from examples.speed import Comparison, compare_with_reference
from examples.training import HELD_OUT_NEGATIVES, TEST_STREAM, Settings, TrainingRun, fit, score

QUICK_USERS = 40


def main(arguments: list[str] | None = None) -> int:
    """Runs the demo; returns the exit status."""
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        run(options)
    except (DownloadError, DataError, OSError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    defaults = Settings()
    parser = argparse.ArgumentParser(
        prog="python -m examples.demo",
        description="Trains a base model, DIN and DIEN on the same data; writes metrics, checkpoints and pictures.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--dataset",
        choices=("ml-100k", "synthetic"),
        default="ml-100k",
        help="MovieLens-100K (2 MB, downloaded once), or generated data with a known right answer (no download)",
    )
    parser.add_argument("--out", type=Path, default=Path("out"), metavar="FOLDER", help="where the results go")
    parser.add_argument("--epochs", type=positive, default=defaults.epochs, metavar="N", help="per model")
    parser.add_argument(
        "--batch-size", type=positive, default=defaults.batch_size, metavar="N", help="histories per step"
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the sampling, the weights and the synthetic data"
    )
    parser.add_argument(
        "--threads", type=positive, default=None, metavar="N", help="CPU threads; without it, what PyTorch takes"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"try the machinery: {QUICK_USERS} users and one epoch, figures mean little",
    )
    options = parser.parse_args(arguments)
    if options.seed < 0:
        parser.error(f"--seed must not be negative, got {options.seed}")
    if options.quick:
        options.epochs = 1
    return options


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def run(options: argparse.Namespace) -> None:
    began = time.perf_counter()
    settings = Settings(epochs=options.epochs, batch_size=options.batch_size)
    log = load(options)
    options.out.mkdir(parents=True, exist_ok=True)  # what cannot be written to shows before the training, not after it
    protocol = Protocol(log, seed=options.seed)
    describe(log, protocol)

    vocabulary = Vocabulary.of(log, protocol)
    models: dict[str, BaseModel] = {}
    runs: dict[str, TrainingRun] = {}
    for name, build in MODELS.items():
        torch.manual_seed(options.seed)
        models[name] = build(vocabulary)
        runs[name] = fit(name, models[name], protocol, settings)
    results, gains = evaluate(models, runs, protocol)
    comparison = compare_with_reference(models["dien"].state_dict(), vocabulary, protocol, settings)

    print_results(results, gains, comparison, log, protocol)
    write(options, settings, log, protocol, models, runs, results, gains, comparison)
    print(f"Everything is in {options.out}/ ({time.perf_counter() - began:.0f} s).")


def load(options: argparse.Namespace) -> BehaviourLog:
    if options.dataset == "synthetic":
        return generate_synthetic(QUICK_USERS if options.quick else 1000, seed=options.seed)
    log = load_movielens()
    return log.first_users(QUICK_USERS) if options.quick else log


def describe(log: BehaviourLog, protocol: Protocol) -> None:
    print(
        f"{log.name}: {len(log.sequences):,} users, {log.num_items:,} items in {log.num_categories} categories, "
        f"{log.num_behaviours:,} behaviours; {len(protocol.train):,} examples to train, "
        f"{len(protocol.validation):,} to validate, {len(protocol.test):,} to test"
    )
    if log.rejected.count:
        print(f"{log.rejected.count} lines could not be used:", *log.rejected.first, sep="\n  ")
    if protocol.users_without_test:
        print(f"{protocol.users_without_test} users have too few behaviours to be tested and are only trained on")


def evaluate(
    models: dict[str, BaseModel], runs: dict[str, TrainingRun], protocol: Protocol
) -> tuple[dict[str, report.Result], dict[str, tuple[float, float]]]:
    """The one look at the test: each model's result, and its gain in AUC over the base model ± that one's error."""
    results: dict[str, report.Result] = {}
    replicates: dict[str, np.ndarray] = {}
    for name, model in models.items():
        scores = score(model, protocol, protocol.test, (TEST_STREAM,), label=f"{name}: test")
        positives, negatives = by_user(protocol, *scores)
        value, error = auc_with_standard_error(positives, negatives)
        base = results["base"].auc if results else value
        results[name] = report.Result(
            value, error, gauc(positives, negatives), relaimpr(value, base), runs[name].samples_per_s
        )
        replicates[name] = leave_one_user_out(positives, negatives)
    gains = {
        name: (result.auc - results["base"].auc, jackknife_error(replicates[name] - replicates["base"]))
        for name, result in results.items()
        if name != "base"
    }
    return results, gains


def by_user(protocol: Protocol, positives: np.ndarray, negatives: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scores of the test examples, which come user by user and equally many of each, as [U, P] and [U, P, n]."""
    users = len(np.unique(protocol.test.user))
    return positives.reshape(users, -1), negatives.reshape(users, -1, negatives.shape[1])


def print_results(
    results: dict[str, report.Result],
    gains: dict[str, tuple[float, float]],
    comparison: Comparison,
    log: BehaviourLog,
    protocol: Protocol,
) -> None:
    print(f"\n{report.table(results)}\n")
    for name, (gain, error) in gains.items():
        print(f"{name} over base: AUC {gain:+.4f} ± {error:.4f} (same users and candidates)")
    if log.interests is not None:
        test = protocol.test
        rng = np.random.default_rng([protocol.seed, TEST_STREAM])
        candidates = np.column_stack([protocol.positives(test), protocol.negatives(test, HELD_OUT_NEGATIVES, rng)])
        scores = oracle_scores(log, test.user, test.position, candidates)
        best, error = auc_with_standard_error(*by_user(protocol, scores[:, 0], scores[:, 1:]))
        print(f"the best that any model can do on this data: AUC {best:.4f} ± {error:.4f}")
    print(
        f"\ndien_speedup_over_reference: {comparison.speedup:.1f}x "
        f"({comparison.samples_per_s:,.0f} samples/s in training, {comparison.reference_samples_per_s:,.0f} in plain "
        f"PyTorch; relative difference of the losses {comparison.loss_difference:.0e})"
    )


def write(
    options: argparse.Namespace,
    settings: Settings,
    log: BehaviourLog,
    protocol: Protocol,
    models: dict[str, BaseModel],
    runs: dict[str, TrainingRun],
    results: dict[str, report.Result],
    gains: dict[str, tuple[float, float]],
    comparison: Comparison,
) -> None:
    out: Path = options.out
    for name, model in models.items():
        about = {"model": name, "dataset": log.name, "seed": options.seed, "settings": dataclasses.asdict(settings)}
        report.save_checkpoint(out / f"{name}.pt", model, about)
    report.save_json(
        out / "metrics.json",
        {
            "models": {name: dataclasses.asdict(result) for name, result in results.items()},
            "dien_speedup_over_reference": comparison.speedup,
            "auc_gain_over_base": {
                name: {"gain": gain, "standard_error": error} for name, (gain, error) in gains.items()
            },
            "dataset": log.name,
            "seed": options.seed,
            "settings": dataclasses.asdict(settings) | {"best_epoch": {name: r.best_epoch for name, r in runs.items()}},
            "protocol": {
                "users": len(log.sequences),
                "users_without_test": protocol.users_without_test,
                "items": log.num_items,
                "categories": log.num_categories,
                "behaviours": log.num_behaviours,
                "rejected_lines": log.rejected.count,
                "max_history": protocol.max_history,
                "train_examples": len(protocol.train),
                "validation_examples": len(protocol.validation),
                "test_examples": len(protocol.test),
                "negatives_per_held_out_example": HELD_OUT_NEGATIVES,
            },
            "versions": {
                "dien_ops": dien_ops.__version__,
                "torch": torch.__version__,
                "numpy": np.__version__,
                "python": platform.python_version(),
            },
        },
    )
    plots.learning_curves(out / "learning_curves.png", runs)
    dien = models["dien"]
    assert isinstance(dien, DIEN)
    seen = evolution.evolve(dien, *evolution.choose_case(log, protocol))
    plots.attention_heatmap(out / "attention_heatmap.png", seen, log)
    plots.augru_pca(out / "augru_pca.png", seen, log)


if __name__ == "__main__":
    sys.exit(main())
