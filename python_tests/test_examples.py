# SPDX-License-Identifier: Apache-2.0
"""The demo: its data, protocol, measures and models, and one small run from end to end."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from examples import demo, evolution, metrics, report
from examples.data import BehaviourLog, Examples, Protocol, generate_synthetic
from examples.data import download as downloads
from examples.data.movielens import DataError, parse_movielens
from examples.data.synthetic import DRIFT, NOISE, oracle_scores
from examples.models import DIEN, MODELS, Vocabulary, reference_layers
from examples.training import Settings, Trainer, fit


@pytest.fixture(scope="module")
def log() -> BehaviourLog:
    return generate_synthetic(num_users=60, items_per_category=40, num_categories=6, mean_length=24, seed=3)


@pytest.fixture(scope="module")
def protocol(log: BehaviourLog) -> Protocol:
    return Protocol(log, max_history=12, holdout=4, validation=2, seed=5)


def every(examples: Examples) -> set[tuple[int, int]]:
    return set(zip(examples.user.tolist(), examples.position.tolist(), strict=True))


# ------------------------------------------------------------------------------------------------------------ metrics


def scores_with_ties(users: int, positives: int, negatives: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    offset = rng.normal(size=(users, 1))
    return (
        np.round(offset + rng.normal(0.5, 1, (users, positives)), 1),
        np.round(offset[..., None] + rng.normal(0, 1, (users, positives, negatives)), 1),
    )


def sklearns_auc(positives: np.ndarray, negatives: np.ndarray) -> float:
    labels = np.r_[np.ones(positives.size), np.zeros(negatives.size)]
    return roc_auc_score(labels, np.r_[positives.ravel(), negatives.ravel()])


def test_auc_of_hand_worked_numbers():
    # pairs (0.8, 0.5) and (0.8, 0.2) are won, (0.5, 0.5) is a tie, (0.5, 0.2) is won
    assert metrics.auc(np.array([0.8, 0.5]), np.array([0.5, 0.2])) == 3.5 / 4


def test_auc_is_sklearns():
    positives, negatives = scores_with_ties(20, 3, 5)
    assert metrics.auc(positives.ravel(), negatives.ravel()) == pytest.approx(
        sklearns_auc(positives, negatives), abs=1e-12
    )


def test_leaving_one_user_out_is_the_auc_without_that_user():
    positives, negatives = scores_with_ties(12, 3, 5)
    expected = [sklearns_auc(np.delete(positives, u, 0), np.delete(negatives, u, 0)) for u in range(12)]
    np.testing.assert_allclose(metrics.leave_one_user_out(positives, negatives), expected, atol=1e-12)


def test_jackknife_error_of_a_mean_is_its_standard_error():
    values = np.random.default_rng(0).normal(size=30)
    leave_one_out = (values.sum() - values) / 29
    assert metrics.jackknife_error(leave_one_out) == pytest.approx(values.std(ddof=1) / math.sqrt(30), rel=1e-12)


def test_standard_error_tells_the_spread_between_samples_of_users():
    """Users differ (an offset common to all scores of a user), so that resampling scores would tell too small a spread."""
    rng = np.random.default_rng(2)

    def sample() -> tuple[float, float]:
        skill = rng.normal(0.8, 0.8, (50, 1))
        return metrics.auc_with_standard_error(skill + rng.normal(size=(50, 4)), rng.normal(size=(50, 4, 5)))

    values, errors = np.array([sample() for _ in range(200)]).T
    assert errors.mean() == pytest.approx(values.std(), rel=0.2)  # the spread of 200 values is itself known to 5 %


def test_gauc_weighs_users_by_impressions():
    # user 1: one pair, won; user 2: positives 2 and 0 against 1 and 1, half of the pairs won; 2 and 4 impressions
    positives, negatives = [[3.0], [2.0, 0.0]], [[1.0], [1.0, 1.0]]
    assert metrics.gauc(positives, negatives) == pytest.approx((2 * 1.0 + 4 * 0.5) / 6)


def test_relaimpr_of_hand_worked_numbers():
    assert metrics.relaimpr(0.75, 0.70) == pytest.approx(25.0)
    assert metrics.relaimpr(0.60, 0.60) == 0


# ----------------------------------------------------------------------------------------------------------- protocol


def test_each_behaviour_with_a_history_is_an_example_once(log, protocol):
    parts = [every(protocol.train), every(protocol.validation), every(protocol.test)]
    assert sum(map(len, parts)) == len(set.union(*parts)) == sum(len(sequence) - 1 for sequence in log.sequences)
    for user, sequence in enumerate(log.sequences):
        positions = [sorted(position for u, position in part if u == user) for part in parts]
        assert positions[2] == list(range(len(sequence) - 4, len(sequence)))
        assert positions[1] == list(range(len(sequence) - 6, len(sequence) - 4))
        assert positions[0] == list(range(1, len(sequence) - 6))


def test_a_history_is_what_came_right_before(log, protocol):
    for batch, begin in zip(protocol.batches(protocol.test, 7, 1, (0,)), range(0, 10**6, 7), strict=False):
        for row in range(len(batch.history)):
            user, position = protocol.test.user[begin + row], protocol.test.position[begin + row]
            past = log.sequences[user][max(0, position - 12) : position]
            assert batch.lengths[row] == len(past)
            assert batch.history[row, : len(past)].tolist() == past.tolist()
            assert batch.history[row, len(past) :].eq(0).all()
            assert batch.targets[row, 0] == log.sequences[user][position]


def test_nothing_held_out_changes_anything_in_training(log, protocol):
    """Other items in the place of all held-out ones: the same training batches, negatives and counts, bit for bit."""
    rng = np.random.default_rng(0)
    sequences = [np.r_[s[:-6], rng.integers(1, log.num_items + 1, 6)] for s in log.sequences]
    other = Protocol(dataclasses.replace(log, sequences=sequences), max_history=12, holdout=4, validation=2, seed=5)
    ours, theirs = (p.batches(p.train, 32, 3, (0,), shuffle=True) for p in (protocol, other))
    for a, b in zip(ours, theirs, strict=True):
        for field in dataclasses.fields(a):
            assert torch.equal(getattr(a, field.name), getattr(b, field.name)), field.name


def test_users_with_few_behaviours_are_only_trained_on(log):
    short = dataclasses.replace(log, sequences=[log.sequences[0][:7], log.sequences[1]])
    protocol = Protocol(short, holdout=4, validation=2)
    assert protocol.users_without_test == 1
    assert set(protocol.test.user) == set(protocol.validation.user) == {1}
    assert (protocol.train.user == 0).sum() == 6


def test_negatives_are_uniform_over_the_items_not_met_so_far():
    sequence = np.array([3, 1, 7, 2, 9, 4])
    log = BehaviourLog("x", [sequence], np.r_[0, np.ones(10, dtype=np.int64)], [""] * 11, ["", "all"])
    protocol = Protocol(log, holdout=1, validation=0)
    position = 3  # met: 3, 1, 7; the positive: 2; still to come, so allowed: 9 and 4
    draws = protocol.negatives(Examples(np.array([0]), np.array([position])), 60_000, np.random.default_rng(0))
    counts = np.bincount(draws[0], minlength=11)
    assert np.flatnonzero(counts).tolist() == [4, 5, 6, 8, 9, 10]
    chi_squared = ((counts[counts > 0] - 10_000) ** 2 / 10_000).sum()
    assert chi_squared < 20.5  # 5 degrees of freedom, one time in a thousand above


def test_a_user_who_has_met_all_items_is_refused():
    log = BehaviourLog("x", [np.array([1, 2, 3])], np.array([0, 1, 1, 1]), [""] * 4, ["", "all"])
    with pytest.raises(ValueError, match="has met all 3 items"):
        Protocol(log)


def test_the_sampled_item_beside_a_behaviour_is_another_one(log, protocol):
    for batch in protocol.batches(protocol.train, 64, 1, (0,)):
        padding = batch.history == 0
        assert batch.unclicked[padding].eq(0).all()
        assert batch.unclicked[~padding].ne(batch.history[~padding]).all()
        assert batch.unclicked.max() <= log.num_items and batch.unclicked[~padding].min() >= 1


def test_the_same_stream_repeats_its_draws_and_another_does_not(protocol):
    first, again, other = (next(protocol.batches(protocol.train, 64, 4, (s,), shuffle=True)) for s in (1, 1, 2))
    assert torch.equal(first.targets, again.targets) and torch.equal(first.history, again.history)
    assert not torch.equal(first.targets, other.targets)


# --------------------------------------------------------------------------------------------------------------- files

ITEMS = "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
RATINGS = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
GOOD_ITEMS = ITEMS + "1\tToy Story\t1995\tAnimation Children's Comedy\n2\tGoldenEye\t1995\tAction\n3\tunknown\t\t\n"


def test_movielens_files_are_read_in_order_of_time():
    ratings = "196\t3\t3\t881250949\n22\t2\t1\t878887116\n196\t1\t5\t881250940\n196\t2\t5\t881250949\n"
    log = parse_movielens((RATINGS + ratings).encode(), GOOD_ITEMS.encode())
    assert [sequence.tolist() for sequence in log.sequences] == [[1, 3, 2], [2]]  # ties keep the order of the file
    assert log.item_names[1:] == ["Toy Story (1995)", "GoldenEye (1995)", "unknown"]
    assert [log.category_names[k] for k in log.item_category[1:]] == ["Animation", "Action", "unknown"]
    assert log.rejected.count == 0


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"196\t1\t3", "3 fields, expected 4"),
        (b"196\t1\t3\t881250949\textra", "5 fields, expected 4"),
        (b"196\t9\t3\t881250949", "item '9' is not in ml-100k.item"),
        (b"196\t1\t3\tyesterday", "time 'yesterday' is not a whole number"),
        (b"196\t1\t3\t", "time '' is not a whole number"),
        (b"196\t1\t\xff\xfe\t881250949", "not UTF-8"),
        (b"", "1 fields, expected 4"),
    ],
)
def test_a_bad_line_is_counted_and_the_others_are_used(line: bytes, reason: str):
    content = RATINGS.encode() + b"196\t1\t3\t5\n" + line + b"\n196\t2\t3\t6\n"
    log = parse_movielens(content, GOOD_ITEMS.encode())
    assert log.sequences[0].tolist() == [1, 2]
    assert log.rejected.count == 1
    assert log.rejected.first[0].startswith("ml-100k.inter line 3: ") and reason in log.rejected.first[0]


def test_an_item_listed_twice_is_counted_once():
    log = parse_movielens((RATINGS + "1\t1\t3\t5\n").encode(), (GOOD_ITEMS + "1\tAgain\t1990\tDrama\n").encode())
    assert log.num_items == 3 and log.rejected.count == 1


def test_files_without_a_usable_line_are_refused():
    with pytest.raises(DataError, match=r"ml-100k\.inter holds no usable line"):
        parse_movielens(RATINGS.encode(), GOOD_ITEMS.encode())
    with pytest.raises(DataError, match=r"ml-100k\.item holds no usable line"):
        parse_movielens(RATINGS.encode(), b"<html>not found</html>")


class FakeIndex:
    """Stands in for the package index; counts how often it is asked."""

    def __init__(self, content: bytes) -> None:
        self.content, self.asked = content, 0

    def __call__(self, folder: Path) -> None:
        self.asked += 1
        (folder / downloads.WHEEL_NAME).write_bytes(self.content)


def test_a_good_file_is_not_fetched_again_and_a_damaged_one_is_replaced(tmp_path):
    index = FakeIndex(b"the wheel")
    expected = hashlib.sha256(b"the wheel").hexdigest()
    for asked, damage in [(1, None), (1, None), (2, b"the whe"), (2, None)]:
        if damage is not None:
            (tmp_path / downloads.WHEEL_NAME).write_bytes(damage)
        assert downloads.fetch_wheel(tmp_path, index, expected).read_bytes() == b"the wheel"
        assert index.asked == asked
    assert [path.name for path in tmp_path.iterdir()] == [downloads.WHEEL_NAME]


def test_a_file_that_is_not_the_pinned_one_is_refused_and_not_kept(tmp_path):
    with pytest.raises(downloads.DownloadError, match=r"SHA-256 .* expected (?s:.*)--dataset synthetic"):
        downloads.fetch_wheel(tmp_path, FakeIndex(b"something else"))
    assert list(tmp_path.iterdir()) == []


def test_without_a_network_the_demo_says_what_to_do(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(downloads.CACHE_VARIABLE, str(tmp_path / "cache"))
    answer = SimpleNamespace(returncode=1, stderr="WARNING: retrying\nERROR: No matching distribution found\n")
    monkeypatch.setattr(downloads.subprocess, "run", lambda *_, **__: answer)
    assert demo.main(["--out", str(tmp_path / "out")]) == 1
    message = capsys.readouterr().err
    assert "No matching distribution" in message and "--dataset synthetic" in message
    assert not (tmp_path / "out").exists()


# ----------------------------------------------------------------------------------------------------- synthetic data


def test_interest_drifts_along_the_ring_as_often_as_planted(log):
    before = np.concatenate([interest[:-1] for interest in log.interests])
    after = np.concatenate([interest[1:] for interest in log.interests])
    moved = before != after
    assert np.all(after[moved] == 1 + before[moved] % log.num_categories)
    assert moved.mean() == pytest.approx(DRIFT, abs=4 * math.sqrt(DRIFT * (1 - DRIFT) / len(moved)))


def test_behaviours_follow_the_interest_except_for_the_noise(log):
    of_interest = np.concatenate(
        [log.item_category[items] == wanted for items, wanted in zip(log.sequences, log.interests, strict=True)]
    )
    expected = 1 - NOISE * (1 - 1 / log.num_categories)
    assert of_interest.mean() == pytest.approx(
        expected, abs=4 * math.sqrt(expected * (1 - expected) / len(of_interest))
    )
    assert all(len(np.unique(items)) == len(items) for items in log.sequences)


def test_the_oracles_probabilities_of_all_unmet_items_sum_to_one(log):
    user, position = 7, 15
    unmet = np.setdiff1d(np.arange(1, log.num_items + 1), log.sequences[user][:position])
    scores = oracle_scores(log, np.array([user]), np.array([position]), unmet[None])
    assert scores.sum() == pytest.approx(1)


def test_the_oracles_probabilities_are_the_planted_ones(log):
    user, position, sizes = 7, 15, 40
    before = log.interests[user][position - 1]
    after, elsewhere = 1 + before % 6, 1 + (before + 2) % 6
    met = np.bincount(log.item_category[log.sequences[user][:position]], minlength=7)
    items = [
        np.setdiff1d(np.flatnonzero(log.item_category == k), log.sequences[user][:position])[0] for k in range(1, 7)
    ]
    scores = oracle_scores(log, np.array([user]), np.array([position]), np.array([items]))[0] * (sizes - met[1:])
    assert scores[before - 1] == pytest.approx(0.9 * 0.8 + 0.1 / 6)
    assert scores[after - 1] == pytest.approx(0.9 * 0.2 + 0.1 / 6)
    assert scores[elsewhere - 1] == pytest.approx(0.1 / 6)


def test_the_oracle_beats_counting_categories(log, protocol):
    """The planted answer cannot be had without the order of the history."""
    test = protocol.test
    targets = np.column_stack([protocol.positives(test), protocol.negatives(test, 10, np.random.default_rng(0))])
    history, _ = protocol.histories(test)
    of_same_category = (log.item_category[history][:, None] == log.item_category[targets][:, :, None]).sum(-1)
    counting, oracle = of_same_category, oracle_scores(log, test.user, test.position, targets)
    auc_of = {k: metrics.auc(s[:, 0], s[:, 1:].ravel()) for k, s in {"counting": counting, "oracle": oracle}.items()}
    assert auc_of["oracle"] > auc_of["counting"] + 0.05


def test_synthetic_data_depends_on_the_seed_alone():
    first, again, other = (generate_synthetic(5, 40, 4, 20, seed=seed) for seed in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(first.sequences, again.sequences, strict=True))
    assert any(not np.array_equal(a, b) for a, b in zip(first.sequences, other.sequences, strict=True))


# ---------------------------------------------------------------------------------------------------- models, training


@pytest.mark.parametrize("name", MODELS)
def test_training_lowers_the_loss(name, log, protocol):
    model = MODELS[name](Vocabulary.of(log, protocol), dim=8, mlp=(16, 8))
    model.items.count_(protocol.batches(protocol.train, 256, 0, (0,)))
    trainer = Trainer(model, Settings())
    batches = list(protocol.batches(protocol.train, 128, 2, (0,), shuffle=True))
    losses = [sum(trainer.step(batch).values()) for batch in (batches * 20)[:40]]
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])


@pytest.mark.parametrize("name", MODELS)
def test_a_targets_score_depends_on_no_other_target(name, log, protocol):
    model = MODELS[name](Vocabulary.of(log, protocol), dim=8, mlp=(16, 8)).eval()
    batch = next(protocol.batches(protocol.train, 16, 3, (0,), shuffle=True))
    alone = [dataclasses.replace(batch, targets=batch.targets[:, c : c + 1]) for c in range(4)]
    with torch.no_grad():
        torch.testing.assert_close(torch.cat([model(one) for one in alone], dim=1), model(batch))


def test_a_training_run_depends_on_the_seed_alone(log, protocol):
    def weights() -> dict[str, torch.Tensor]:
        torch.manual_seed(1)
        model = DIEN(Vocabulary.of(log, protocol), dim=4, mlp=(8,))
        run = fit("dien", model, protocol, Settings(epochs=1, batch_size=256))
        assert run.best_epoch == len(run.validation_auc) == 1
        return model.state_dict()

    first, again = weights(), weights()
    assert all(torch.equal(first[key], again[key]) for key in first)


def test_the_twin_in_plain_pytorch_is_the_same_model(log, protocol):
    vocabulary = Vocabulary.of(log, protocol)
    ours, twin = DIEN(vocabulary, dim=8), DIEN(vocabulary, dim=8, layers=reference_layers)
    ours.items.count_(protocol.batches(protocol.train, 256, 0, (0,)))
    twin.load_state_dict(ours.state_dict())
    settings = Settings(l2=1.0)  # so strong that forgotten decay or counts show
    trainers = [
        Trainer(ours, settings),
        Trainer(twin, settings, reference_layers.RowAdam(twin.items, settings.lr, settings.l2)),
    ]
    batches = list(islice(protocol.batches(protocol.train, 32, 2, (0,), shuffle=True), 2))
    for batch in batches:  # the second loss also shows that the first update was the same
        first, second = (trainer.step(batch) for trainer in trainers)
        assert first == pytest.approx(second, rel=1e-4)
    assert first.keys() == {"target", "auxiliary"}


def test_the_last_state_of_the_evolution_is_the_final_interest(log, protocol):
    model = DIEN(Vocabulary.of(log, protocol), dim=8).eval()
    history, targets = evolution.choose_case(log, protocol)
    seen = evolution.evolve(model, history, targets)
    steps = evolution.BEHAVIOURS
    assert seen.attention.shape == (4, steps) and seen.states.shape == (4, steps, 16)
    np.testing.assert_allclose(seen.attention.sum(1), 1, rtol=1e-5)
    np.testing.assert_allclose(seen.attention[-1], 1 / steps)
    with torch.no_grad():
        items = torch.tensor([[target.item for target in targets[:-1]]])
        behaviours, candidates = model.items(torch.from_numpy(history)[None], items)
        (final,) = model.interest(behaviours, torch.tensor([steps]), candidates)
    np.testing.assert_allclose(seen.states[:-1, -1], final[0], atol=1e-6)


# ------------------------------------------------------------------------------------------------------------- results


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "metrics.json"
    report.save_json(path, {"auc": 0.9})
    with pytest.raises(TypeError):
        report.save_json(path, {"auc": object()})
    with pytest.raises(RuntimeError), report.replacing(path) as fresh:
        fresh.write_text("half of")
        raise RuntimeError
    assert json.loads(path.read_text()) == {"auc": 0.9}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("arguments", [["--epochs", "0"], ["--seed", "-1"], ["--threads", "x"], ["--dataset", "books"]])
def test_wrong_options_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as refused:
        demo.main(arguments)
    assert refused.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_a_quick_run_leaves_metrics_checkpoints_and_pictures(tmp_path, capsys):
    assert demo.main(["--quick", "--dataset", "synthetic", "--out", str(tmp_path / "out")]) == 0
    out = tmp_path / "out"
    checkpoints, pictures = {"base.pt", "din.pt", "dien.pt"}, {"learning_curves", "attention_heatmap", "augru_pca"}
    assert {path.name for path in out.iterdir()} == checkpoints | {"metrics.json"} | {f"{p}.png" for p in pictures}
    assert all((out / f"{picture}.png").read_bytes().startswith(b"\x89PNG") for picture in pictures)

    written = json.loads((out / "metrics.json").read_text())
    assert written["models"].keys() == {"base", "din", "dien"}
    for model in written["models"].values():
        assert model.keys() == {"auc", "auc_standard_error", "gauc", "relaimpr", "samples_per_s"}
        assert all(math.isfinite(value) for value in model.values())
        assert 0 < model["auc"] < 1 and model["auc_standard_error"] > 0 and model["samples_per_s"] > 0
    assert written["models"]["base"]["relaimpr"] == 0
    assert written["dien_speedup_over_reference"] > 0
    assert written["dataset"] == "synthetic" and written["seed"] == 0
    assert written["protocol"]["test_examples"] == 10 * written["protocol"]["users"]
    assert written["versions"]["torch"] == torch.__version__

    saved = torch.load(out / "dien.pt", weights_only=True)
    log = generate_synthetic(demo.QUICK_USERS)
    DIEN(Vocabulary.of(log, Protocol(log))).load_state_dict(saved["state_dict"])

    shown = capsys.readouterr()
    assert "dien_speedup_over_reference" in shown.out and "AUC ± standard error" in shown.out
    assert "dien: training" in shown.err and "dien: test" in shown.err  # the progress bars
