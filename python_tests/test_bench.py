# SPDX-License-Identifier: Apache-2.0
"""The benchmarks' own logic, on made-up numbers: what is compared, what is called reached, what is written. Nothing here
is timed."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from bench import harness, machine, report, results, rivals
from bench.results import CEILING, COPY, FLAT, PER_SECOND, NotRun, Row, Run, Sweep, Target, Timing

ROOT = Path(report.__file__).parents[1]
MARKERS = "<!-- bench:gru -->", "<!-- /bench:gru -->"


def row(ours=(1.0, 1.0, 1.0), theirs=(3.0, 3.0, 3.0), targets=(), **more) -> Row:
    timings = {"dien_ops": Timing(list(ours)), "nn.GRU": Timing(list(theirs))}
    return Row("gru", "GRU, forward", "B2 T3", "dien_ops", timings, targets=list(targets), **more)


MACHINE = {
    "cpu": "Abacus 1",
    "cores": 2,
    "threads": 2,
    "system": "Linux x86_64",
    "dien_ops": "0.1.0",
    "kernels": "avx2",
    "built_with": "torch 2.13.0",
    "versions": {"torch": "2.13.0", "openvino": "not installed"},
    "environment": {"GOMP_SPINCOUNT": "10000"},
    "ceilings": {"mm GFLOP/s, 1 thread": 100.0},
    "bystanders": 0.001,
    "quick": False,
}


@pytest.fixture
def result_file(tmp_path):
    """What a run of three rows, one of them skipped, and of two sweep points leaves behind."""
    written = [
        row(targets=[Target("nn.GRU", 2.0)], absent={"OpenVINO": "not installed here"}),
        replace(row(theirs=(0.5, 0.5, 0.5), targets=[Target("nn.GRU", 2.0)]), case="B4 T5"),
        *(replace(row(ours=[n * 1e-3] * 3), section="as H grows", case=f"H{n}", sweep=Sweep("H", n)) for n in (16, 32)),
    ]
    path = tmp_path / "abacus.json"
    content = {
        "machine_info": MACHINE,
        "commit_info": {"id": "0123456789abcdef", "dirty": False},
        "datetime": "2026-01-02T03:04:05+00:00",
        "benchmarks": [{"fullname": "x", "extra_info": r.to_json()} for r in written],
        "sections": [["gru", "GRU, forward"], ["gru", "GRU in bfloat16"], ["gru", "as H grows"]],
        "not_run": [{"column": "gru", "section": "GRU in bfloat16", "case": "B2 T3", "reason": "dien_ops refuses it"}],
    }
    path.write_text(json.dumps(content))
    return path


# ------------------------------------------------------------------------------------------------------------- results


def test_percentiles_lie_between_the_nearest_values():
    values = [40.0, 10.0, 20.0, 30.0]
    assert [results.percentile(values, p) for p in (0, 20, 50, 100)] == pytest.approx([10, 16, 25, 40])
    assert results.percentile([7.0], 80) == 7


def test_a_ratio_is_the_median_of_the_rounds_ratios():
    # the machine was ten times slower in the second round, for both: the ratio does not see it
    assert row(ours=(1.0, 10.0, 1.0), theirs=(2.0, 20.0, 8.0)).ratio("nn.GRU") == 2


def test_a_ratio_is_of_the_time_for_one_unit_of_work():
    half = row(ours=(1.0,), theirs=(2.0,))
    half.timings["dien_ops"] = Timing([1.0], work=50)
    half.timings["nn.GRU"] = Timing([2.0], work=100)
    assert half.ratio("nn.GRU") == 1


def test_the_share_of_the_ceiling_is_one_of_rates():
    one = row(ours=(2.0, 2.0))
    assert one.share_of_ceiling() is None
    one.timings["dien_ops"] = Timing([2.0, 2.0], flops=30.0)
    one.timings[CEILING] = Timing([1.0, 1.0], flops=20.0)
    assert one.share_of_ceiling() == 0.75
    assert CEILING not in one.rivals


def test_the_share_of_the_copy_is_one_of_rates():
    one = row(ours=(2.0, 2.0))
    assert one.share_of_copy() is None
    one.timings["dien_ops"] = Timing([2.0, 2.0], bytes=30.0)
    one.timings[COPY] = Timing([1.0, 1.0], bytes=20.0)
    assert one.share_of_copy() == 0.75
    assert COPY not in one.rivals


@pytest.mark.parametrize(
    "targets, verdict",
    [
        ([], "no target"),
        ([Target("nn.GRU", 3.0)], "reached"),
        ([Target("nn.GRU", 3.01)], "not reached: 3x nn.GRU"),
        ([Target("nn.GRU", 3.0), Target(CEILING, 0.5)], "not reached: mm not measured: it took no part"),
        ([Target("OpenVINO", 1.0)], "not reached: OpenVINO not measured: not installed"),
        ([Target(PER_SECOND, 1.0)], "reached"),
        ([Target(PER_SECOND, 1000)], "not reached: 1 per second"),
    ],
    ids=["none", "met", "missed", "one_unknown", "absent", "often", "seldom"],
)
def test_a_row_is_reached_only_if_every_target_was_measured_and_met(targets, verdict):
    assert row(targets=targets, absent={"OpenVINO": "not installed"}).verdict() == verdict


def test_a_missed_share_of_the_ceiling_is_told_as_a_share():
    one = row(ours=(2.0,), theirs=(2.0,), targets=[Target(CEILING, 0.8)])
    one.timings["dien_ops"] = Timing([2.0], flops=30.0)
    one.timings[CEILING] = Timing([1.0], flops=20.0)
    assert one.verdict() == "not reached: 0.75 of mm"


@pytest.mark.parametrize("at_least, verdict", [(0.75, "reached"), (0.8, "not reached: 0.75 of copy")])
def test_a_target_may_be_a_share_of_the_copy(at_least, verdict):
    one = row(ours=(2.0,), targets=[Target(COPY, at_least)])
    assert one.verdict() == "not reached: copy not measured: it took no part"
    one.timings["dien_ops"], one.timings[COPY] = Timing([2.0], bytes=30.0), Timing([1.0], bytes=20.0)
    assert (str(one.targets[0]), one.verdict()) == (f"≥ {at_least:.2f} of copy", verdict)


@pytest.mark.parametrize(
    "allowed, verdict", [(1.25, "reached"), (1.2, "not reached: slowest 1.25x fastest")], ids=["met", "missed"]
)
def test_a_target_may_be_how_much_the_contestants_differ(allowed, verdict):
    # the machine was ten times slower in the second round: the ratios do not see it
    one = row(ours=(1.0, 10.0, 1.0), theirs=(0.8, 8.0, 0.8), targets=[Target(FLAT, 1 / allowed)])
    one.timings["between"] = Timing([0.9, 9.0, 0.9])
    one.timings[COPY] = Timing([0.01, 0.1, 0.01], bytes=1.0)  # no contestant
    assert (str(one.targets[0]), one.verdict()) == (f"slowest ≤ {allowed}x fastest", verdict)
    assert report.flatness_cell(one) == "1.25"
    one.timings["between"] = Timing([1.6, 16.0, 1.6])
    assert report.flatness_cell(one) == "2"
    assert report.flatness_cell(row()) == ""


@pytest.mark.parametrize("peak, verdict", [(25, "reached"), (50, "not reached: 2x less memory than nn.GRU")])
def test_a_target_may_be_a_share_of_the_rivals_memory(peak, verdict):
    one = row(targets=[Target("nn.GRU", 4.0, of_memory=True)])
    assert str(one.targets[0]) == "≥ 4x less memory than nn.GRU"
    assert one.verdict() == "not reached: memory not measured"
    for name, peak_bytes in (("dien_ops", peak), ("nn.GRU", 100)):
        one.timings[name] = replace(one.timings[name], peak_bytes=peak_bytes)
    assert one.verdict() == verdict
    assert Row.from_json(json.loads(json.dumps(one.to_json()))) == one


def test_rows_survive_json():
    one = row(targets=[Target("nn.GRU", 2.0)], absent={"OpenVINO": "no"}, unit="valid step", sweep=Sweep("H", 16))
    assert Row.from_json(json.loads(json.dumps(one.to_json()))) == one
    assert Row.from_json(row().to_json()) == row()


def test_a_file_that_is_no_benchmark_result_is_refused(tmp_path):
    path = tmp_path / "other.json"
    path.write_text('{"benchmarks": []}')
    with pytest.raises(ValueError, match=r"other.json must be the --benchmark-json of a run of bench/"):
        results.load(path)


# ------------------------------------------------------------------------------------------------------------- harness


def test_in_each_round_everybody_has_one_turn_in_a_new_order():
    names, draw = ["ours", "a", "b", "c"], random.Random(0)
    orders = []
    for _ in range(200):
        before, after = harness.turns(names, "ours", draw)
        orders.append((*before, "ours", *after))
    assert all(sorted(order) == sorted(names) for order in orders)
    assert len(set(orders)) == 24


def test_a_sample_is_as_many_calls_as_fill_its_time():
    assert harness.calls_per_sample(1.0) == 1
    assert harness.calls_per_sample(harness.MIN_SAMPLE_SECONDS / 9.5) == 10


def test_rounds_follow_from_the_time_within_limits():
    pace = harness.Pace(warm_up=0, seconds=10, min_rounds=3, max_rounds=50)
    assert [pace.rounds(s) for s in (0.001, 1.0, 100.0)] == [50, 10, 3]


class Pedantic:
    """Runs rounds as pytest-benchmark does."""

    def __init__(self):
        self.extra_info = {}

    def pedantic(self, target, setup, teardown, rounds):
        for _ in range(rounds):
            setup(), target(), teardown()
        self.stats = "there are some"


def test_times_are_of_one_call_and_of_the_same_rounds_for_all():
    called = {"ours": 0, "theirs": 0}
    contestants = {n: harness.Contestant(lambda n=n: called.__setitem__(n, called[n] + 1)) for n in called}
    pace = harness.Pace(warm_up=0, seconds=0, min_rounds=4, max_rounds=4)
    millisecond = 1e-3

    def timer(call, times):
        for _ in range(times):
            call()
        return millisecond

    samples = harness.time_in_turns(Pedantic(), contestants, "ours", pace, timer)
    assert samples == {"ours": [millisecond] * 4, "theirs": [millisecond] * 4}
    calls = harness.calls_per_sample(millisecond)
    assert called == dict.fromkeys(
        called, harness.WARM_UP_CALLS + 4 * (1 + calls)
    )  # an untimed call before each sample


def test_the_clock_gives_the_seconds_of_one_call(monkeypatch):
    now = iter([10.0, 16.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    calls = []
    assert harness.clock(lambda: calls.append(1), 3) == 2.0
    assert len(calls) == 3


class Device:
    """Stands in for torch.cuda: a clock that only calls move on, and what happened in order."""

    L2_cache_size = 4096

    def __init__(self, monkeypatch):
        self.now, self.happened = 0.0, []
        device = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = device.now
                device.happened.append("event")

            def synchronize(self):
                device.happened.append("wait")

            def elapsed_time(self, end):
                return (end.at - self.at) * 1e3

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: self)
        monkeypatch.setattr(torch.Tensor, "sum", lambda x: self.does(f"read {x.nbytes}", 100.0))

    def does(self, what, seconds):
        self.happened.append(what)
        self.now += seconds


def test_a_gpu_is_timed_by_its_events_with_other_data_in_its_cache(monkeypatch):
    device = Device(monkeypatch)
    seconds = iter([1.0, 5.0])
    timer = harness.CudaEvents("cpu")
    assert timer(lambda: device.does("call", next(seconds)), 2) == 3.0
    assert device.happened == [f"read {2 * device.L2_cache_size}", "event", "call", "event"] * 2 + ["wait"]


def test_a_replayed_contestant_is_captured_once_and_not_called_again(monkeypatch):
    graph = type("Graph", (), {"replay": lambda self: happened.append("replay")})
    stream = type("Stream", (), {"wait_stream": lambda self, other: None})
    monkeypatch.setattr(torch.cuda, "Stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", graph)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "graph", contextlib.nullcontext)
    happened = []
    plain = harness.Contestant(lambda: happened.append("call") or [len(happened)], note="kept")
    replayed = rivals.from_a_graph(lambda _: plain)(None)
    calls = ["call"] * (rivals.GRAPH_WARM_UP_CALLS + 1)
    assert happened == calls and replayed.note == "kept"
    assert replayed.call() == replayed.call() == [len(calls)]
    assert happened == [*calls, "replay", "replay"]


@dataclass(frozen=True)
class Piece:
    """A problem for contestants that need none."""

    device: str = "cpu"
    dtype: torch.dtype = torch.float32


def contestant(value=1.0, **more):
    def make(_):
        return harness.Contestant(
            lambda: [torch.tensor([value])], exact=lambda: [torch.ones(1, dtype=torch.float64)], **more
        )

    return make


def measured(problem, ours, others, **more) -> Row:
    benchmark = Pedantic()
    bench = harness.Bench(benchmark, "gru", "GRU, forward", "B2 T3", quick=True)
    bench.measure(problem, {"dien_ops": ours}, others, **more)
    return Row.from_json(json.loads(json.dumps(benchmark.extra_info)))


def test_a_rival_that_fails_or_is_wrong_does_not_take_part_and_the_row_says_why():
    def broken(_):
        raise RuntimeError("no such kernel\nand a trace")

    def absent(_):
        raise harness.Unavailable("not installed")

    others = {"good": contestant(), "wrong": contestant(2.0), "broken": broken, "absent": absent}
    row = measured(Piece(), contestant(), others)
    assert row.rivals == ["good"]
    assert row.absent == {
        "wrong": "wrong is 1.0e+00 away from float64, allowed 1e-04",
        "broken": "failed: RuntimeError: no such kernel",
        "absent": "not installed",
    }
    with pytest.raises(harness.WrongResult, match="dien_ops is 1"):
        measured(Piece(), contestant(2.0), {})


def test_on_a_gpu_a_row_has_its_ceilings_its_memory_and_the_time_of_a_step(monkeypatch):
    monkeypatch.setattr(harness, "timer_for", lambda device: {"cuda": lambda call, times: call() and 4e-3}[device])
    monkeypatch.setattr(harness, "matrix_product", lambda _, device, dtype: contestant(flops=8.0)(None))
    monkeypatch.setattr(harness, "large_copy", lambda _, device: contestant(bytes=2.0)(None))
    monkeypatch.setattr(harness, "peak_on_gpu", lambda c: 42)
    ours = contestant(flops=4.0, bytes=1.0)
    row = measured(Piece("cuda"), ours, {"graph": ours}, without_memory=["graph"], steps=4)
    assert (row.share_of_ceiling(), row.share_of_copy(), row.seconds_per_step()) == (0.5, 0.5, 1e-3)
    assert {name: t.peak_bytes for name, t in row.timings.items() if t.peak_bytes} == {"dien_ops": 42}
    assert row.rivals == ["graph"]


def test_a_contestant_that_computes_something_else_is_not_timed():
    exact = [torch.tensor([100.0, 1.0], dtype=torch.float64)]
    near = harness.Contestant(lambda: [torch.tensor([100.001, 1.0])], exact=lambda: exact)
    assert harness.check("near", near) == pytest.approx(1e-5, rel=0.1)
    for wrong in ([101.0, 1.0], [100.0, float("nan")], [100.0]):
        with pytest.raises(harness.WrongResult):
            harness.check("wrong", harness.Contestant(lambda w=wrong: [torch.tensor(w)], exact=lambda: exact))


def test_what_an_update_starts_from_is_noted_before_the_call_that_is_compared():
    happened = []
    one = contestant()(None)
    one = replace(one, before=lambda: happened.append("before"), call=lambda: happened.append("call") or one.exact())
    harness.check("one", one)
    assert happened == ["before", "call"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="read from /proc")
def test_peak_memory_is_that_of_the_call_alone():
    small = rivals.Recurrence(2, 2, 8, 64)
    large = replace(small, batch=512, steps=64)
    output = 4 * large.batch * large.steps * large.hidden_size
    try:
        peaks = [harness.peak_bytes(rivals.ours, problem, small) for problem in (large, small)]
    except harness.Unavailable as reason:
        pytest.skip(str(reason))
    assert peaks[0] >= output and peaks[1] < output / 8


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="read from /proc")
@pytest.mark.parametrize(
    "factory, small, said",
    [
        (os._exit, 9, "peak memory: its process ended with status 9"),  # as one that is killed, without a word
        (time.sleep, 60, "peak memory: not done after 0.1 s"),
        (abs, "x", "peak memory: TypeError: bad operand type"),
    ],
    ids=["ends", "hangs", "fails"],
)
def test_peak_memory_that_cannot_be_measured_is_unavailable(monkeypatch, factory, small, said):
    if factory is time.sleep:
        monkeypatch.setattr(harness, "MEMORY_SECONDS", 0.1)
    with pytest.raises(harness.Unavailable, match=said):
        harness.peak_bytes(factory, small, small)


def test_the_last_level_cache_is_said_in_bytes(monkeypatch, tmp_path):
    for i, size in enumerate(("32K", "2M", "")):
        (tmp_path / f"index{i}").mkdir()
        (tmp_path / f"index{i}" / "size").write_text(size + "\n")
    monkeypatch.setattr(machine, "CACHES", tmp_path)
    assert machine.last_level_cache() == 2 * 2**20
    monkeypatch.setattr(machine, "CACHES", tmp_path / "none")
    assert machine.last_level_cache() is None


# -------------------------------------------------------------------------------------------------------------- report


@pytest.mark.parametrize(
    "write, value, text",
    [
        (report.seconds, 2.0, "2 s"),
        (report.seconds, 0.9996, "1 s"),
        (report.seconds, 0.9994, "999 ms"),
        (report.seconds, 0.0123456, "12.3 ms"),
        (report.seconds, 4.56e-5, "45.6 µs"),
        (report.seconds, 9.996e-7, "1 µs"),
        (report.seconds, 9e-8, "90 ns"),
        (report.seconds, 1234.0, "1230 s"),
        (report.size, 3 * 2**19, "1.5 MiB"),
        (report.size, 1023 * 2**20, "1020 MiB"),
        (report.size, 1024 * 2**20, "1 GiB"),
        (report.size, 1500 * 2**20, "1.46 GiB"),
        (report.size, 0, "0 MiB"),
        (report.three_digits, 1234.0, "1230"),
        (report.three_digits, 1.236e-5, "0.0000124"),
    ],
)
def test_numbers_have_three_digits_and_no_exponent(write, value, text):
    assert write(value) == text


def test_a_large_ratio_has_no_exponent():
    one = row(ours=(1e-3,), theirs=(1.234,), targets=[Target("nn.GRU", 2000)])
    assert report.rival_cell(one, "nn.GRU") == "1.23 s [1.23 s, 1.23 s]: 1230x"
    assert (str(one.targets[0]), one.verdict()) == ("≥ 2000x nn.GRU", "not reached: 1230x nn.GRU")


def test_a_table_shows_every_row_every_rival_and_why_some_are_missing(result_file):
    run = results.load(result_file)
    header, first, second = report.table(run, "gru", "GRU, forward")
    assert header == ["", "dien_ops", "nn.GRU", "OpenVINO", "target", "verdict"]
    assert first == ["B2 T3", "1 s [1 s, 1 s]", "3 s [3 s, 3 s]: 3x", "not installed here", "≥ 2x nn.GRU", "reached"]
    assert second[2] == "500 ms [500 ms, 500 ms]: 0.5x, we are slower"
    assert second[-1] == "not reached: 0.5x nn.GRU"
    assert report.table(run, "gru", "GRU in bfloat16") == [["", "ours"], ["B2 T3", "not measured: dien_ops refuses it"]]


def test_peak_memory_stands_beside_the_times():
    one = row()
    one.timings = {name: replace(t, peak_bytes=n * 2**20) for n, (name, t) in enumerate(one.timings.items(), 3)}
    run = Run("x", MACHINE, "0123", "2026-01-02", [one], [], [("gru", "GRU, forward")])
    header, line = report.table(run, "gru", "GRU, forward")
    assert line[header.index("peak memory")] == "3 MiB; nn.GRU 4 MiB"


def test_the_report_says_where_and_when_and_how_many_targets_are_reached(result_file):
    text = report.markdown(results.load(result_file), "gru")
    for said in ("Abacus 1, 2 cores", "0123456789ab", "torch 2.13.0", "2026-01-02", "mm GFLOP/s, 1 thread 100"):
        assert said in text
    assert "1 of 2 rows with a target reach it; 1 row was not measured." in text
    assert "<details><summary>as H grows</summary>" in text


@pytest.mark.parametrize(
    "share, said", [(None, "is not known"), (0.001, "took 0.1%"), (0.4, "**Other processes took 40%")]
)
def test_the_report_says_whether_the_machine_was_busy(share, said):
    run = Run(
        "x",
        MACHINE | {"bystanders": share},
        "0123",
        "2026-01-02",
        [row()],
        [NotRun("gru", "s", "c", "r")],
        [("gru", "s")],
    )
    assert said in report.markdown(run, "gru")


def test_one_command_writes_tables_pictures_and_the_readme(result_file, tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{MARKERS[0]}\nold\n{MARKERS[1]}\nafter\n")
    report.main([str(result_file), "--readme", str(readme), "--out", str(tmp_path / "out")])
    out = tmp_path / "out" / "abacus"
    assert {p.name for p in out.iterdir()} == {"gru.md", "gru_ratios.png", "gru_H.png"}
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in out.glob("*.png"))
    tables = (out / "gru.md").read_text()
    assert readme.read_text() == f"before\n{MARKERS[0]}\n{tables}{MARKERS[1]}\nafter\n"
    assert "not reached: 0.5x nn.GRU" in capsys.readouterr().out
    before = readme.read_text()
    report.main([str(result_file), "--readme", str(readme), "--out", str(tmp_path / "out")])
    assert readme.read_text() == before


@pytest.mark.parametrize("file", [p.stem.removeprefix("bench_") for p in (ROOT / "bench").glob("bench_*.py")])
def test_the_readme_has_a_place_for_every_column(file):
    column = file.replace("_cuda", "-cuda")
    assert "a table" in report.put_between_markers((ROOT / "README.md").read_text(), column, "a table")


@pytest.mark.parametrize("text", ["no markers", MARKERS[0], "".join(reversed(MARKERS)), 2 * "".join(MARKERS)])
def test_a_readme_without_its_markers_is_left_as_it_is(result_file, tmp_path, text):
    readme = tmp_path / "README.md"
    readme.write_text(text)
    with pytest.raises(SystemExit, match="expected <!-- bench:gru --> and, behind it, <!-- /bench:gru -->, once each"):
        report.main([str(result_file), "--readme", str(readme), "--out", str(tmp_path / "out")])
    assert readme.read_text() == text


@pytest.mark.parametrize(
    "changed",
    [
        {"machine_info": MACHINE | {"quick": True}},
        {"not_run": [{"column": "gru", "section": "GRU, forward", "case": "B8 T9", "reason": results.NOT_SELECTED}]},
    ],
    ids=["quick", "some_rows"],
)
def test_a_run_that_is_not_whole_does_not_go_into_the_readme(result_file, tmp_path, changed):
    result_file.write_text(json.dumps(json.loads(result_file.read_text()) | changed))
    readme = tmp_path / "README.md"
    readme.write_text("".join(MARKERS))
    with pytest.raises(SystemExit, match=r"abacus must not go into .*: it is quick, or a run of some rows"):
        report.main([str(result_file), "--readme", str(readme), "--out", str(tmp_path / "out")])
    assert readme.read_text() == "".join(MARKERS)
    report.main([str(result_file), "--out", str(tmp_path / "out")])


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
@pytest.mark.parametrize("selection, committed", [("", True), ("-k augru", False)], ids=["all_rows", "some_rows"])
def test_make_bench_leaves_committed_results_alone_where_rows_are_selected(selection, committed):
    command = ["make", "--dry-run", "bench", f"BENCH={selection}"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert ("bench/results" in said) == ("--readme" in said) == committed
