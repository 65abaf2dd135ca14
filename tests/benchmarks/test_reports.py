"""What is made of measured times, from fabricated ones."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from rich.progress import Progress

from tidewright.bench import chart, compare, tables
from tidewright.bench.sweep import Goal, percentile, summary, sweep
from tidewright.bench.targets import TargetError
from tidewright.bench.workloads import ONE_BY_ONE, SHORT, WORKLOADS, Outcome, Request, Run, failed
from tidewright.engine.messages import EngineStats

PNG = b"\x89PNG\r\n\x1a\n"


class Fabricated:
    """A system of constant speed that computes one request after the other, without taking any time for it."""

    def __init__(self, name: str, first: float, token: float, log: list[str] | None = None) -> None:
        self.name, self._first, self._token = name, first, token
        self._log = log if log is not None else []

    def run(self, requests: Sequence[Request]) -> list[Outcome]:
        self._log.append(self.name)
        outcomes, free = [], 0.0
        for request in requests:
            begin = max(free, request.at)
            free = begin + self._first + self._token * (request.max_tokens - 1)
            first = begin + self._first - request.at
            outcomes.append(Outcome(first, free - request.at, request.max_tokens, request.max_tokens))
        return outcomes

    def close(self) -> None:
        pass


class Failing(Fabricated):
    def run(self, requests: Sequence[Request]) -> list[Outcome]:
        return [failed("too busy")] * len(requests)


@pytest.fixture(autouse=True)
def _idle_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("compare", "sweep"):
        monkeypatch.setattr(f"tidewright.bench.{module}.wait_idle", lambda: True)


def quiet() -> Progress:
    return Progress(console=Console(file=io.StringIO()))


def test_percentiles() -> None:
    assert [percentile(range(1, 102), p) for p in (50, 90, 99)] == [51, 91, 100]
    values = [random.Random(n).random() for n in range(37)]
    for p in (0, 12.5, 50, 90, 99, 100):
        assert percentile(values, p) == pytest.approx(np.percentile(values, p))
    assert percentile([], 50) != percentile([], 50)  # not a number


def test_systems_take_turns_and_the_first_repetition_is_not_counted() -> None:
    log: list[str] = []
    targets = [Fabricated(compare.OURS, 1, 1, log), Fabricated("peer", 1, 1, log)]
    measured = compare.measure(targets, 2, range(9), quiet(), {"W1": WORKLOADS["W1"]})
    assert log == [compare.OURS, "peer", "peer", compare.OURS, compare.OURS, "peer"]
    assert {name: len(runs) for name, runs in measured["W1"].items()} == {compare.OURS: 2, "peer": 2}
    assert measured.disturbed == 0


def test_comparison() -> None:
    targets = [
        Fabricated(compare.OURS, 0.2, 0.01),
        Fabricated(compare.ENGINE, 0.15, 0.008),
        Fabricated("peer", 0.1, 0.02),
    ]
    measured = compare.measure(targets, 3, range(9), quiet(), WORKLOADS)
    before = EngineStats(0, 0, 1, 1, 0, 0, 0, 0)
    after = EngineStats(
        0, 0, 1, 1, 9, 0, 0, 0, schedule_seconds=1.0, forward_seconds=7.0, sample_seconds=1.5, send_seconds=0.5
    )
    measured.engine.append((before, after))
    report = compare.report(measured)
    figures = report["figures"]
    assert figures["W1 TTFT, ms"][compare.OURS] == pytest.approx({"median": 200, "min": 200, "max": 200})
    assert figures["W1 decode, tokens/s"]["peer"]["median"] == pytest.approx(50)
    assert figures["W2 throughput, tokens/s"][compare.OURS]["median"] == pytest.approx(16 * 64 / (16 * (0.2 + 0.63)))
    assert figures["W4 time, ms"]["peer"]["median"] == pytest.approx(100)
    # This system computes nothing at once, so batching gains nothing and costs the wait.
    batching = report["continuous batching"]
    assert batching["throughput ratio"] == pytest.approx(1)
    assert batching["latency of a request, at once / alone"] == pytest.approx(8.5)
    overhead = report["overhead of Triton and bridge"]
    assert overhead["a request (TTFT of short ones), ms"] == pytest.approx(50)
    assert overhead["a token (W1), ms"] == pytest.approx(2)
    assert overhead["tokens a response (W2)"] == 1
    engine = report["engine"]
    assert engine["schedule, % of step time"] == 10
    assert engine["forward, % of step time"] == 70
    assert 0 < engine["one block for each request, % of a step"] < 100
    assert ONE_BY_ONE not in figures
    assert set(measured[ONE_BY_ONE]) == {compare.OURS}
    assert set(measured[SHORT]) == {compare.OURS, compare.ENGINE}


def test_an_engine_that_keeps_no_time_has_no_shares() -> None:
    stats = EngineStats(0, 0, 1, 1, 0, 0, 0, 0)
    assert compare.step_shares([(stats, stats)]) == {}


def test_spread() -> None:
    assert compare.spread([3.0, 1.0, 2.0, 9.0]) == {"median": 2.5, "min": 1.0, "max": 9.0}


def test_a_failed_request_ends_the_comparison() -> None:
    with pytest.raises(TargetError, match="ours failed a request: too busy"):
        compare.measure([Failing("ours", 1, 1)], 1, range(9), quiet(), WORKLOADS)


def test_the_best_peer_is_the_one_that_we_look_worst_against() -> None:
    values = {
        name: {"median": median}
        for name, median in ((compare.OURS, 10.0), (compare.ENGINE, 99.0), ("slow", 5.0), ("fast", 20.0))
    }
    assert tables.against_best_peer(values, more_is_better=True) == "0.50x fast"
    assert tables.against_best_peer(values, more_is_better=False) == "0.50x slow"
    assert tables.against_best_peer({compare.OURS: {"median": 1.0}}, more_is_better=True) == ""


def test_tables_say_what_is_missing_and_disturbed() -> None:
    targets = [Fabricated(compare.OURS, 0.2, 0.01), Fabricated("peer", 0.1, 0.02)]
    made = compare.report(compare.measure(targets, 1, range(9), quiet(), WORKLOADS))
    made["runs begun on busy cores"] = 3
    machine = {"cpu": "abacus", "cores": 2}
    console = Console(file=io.StringIO(), width=200)
    missing = {"llama.cpp": "is not installed; run: something"}
    tables.print_comparison(
        {"machine": machine, "dtype": "bf16", "repetitions": 1, "missing": missing, **made}, console
    )
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "llama.cpp: is not installed; run: something" in text
    assert "not idle before 3 runs" in text
    assert "200 (200 - 200)" in text
    assert "2.00x peer" in text  # decode


def test_quantized_weights_have_a_table_of_their_own() -> None:
    """With the peers of the same precision, and beside our plain weights."""
    ours = f"{compare.OURS} int8"
    speeds = {compare.OURS: 0.02, "peer": 0.01, ours: 0.01, "peer Q8_0": 0.04}
    targets = [Fabricated(name, 0.1, token) for name, token in speeds.items()]
    made = compare.report(compare.measure(targets, 1, range(9), quiet(), {"W1": WORKLOADS["W1"]}))
    made["figures"] = {label: values for label, values in made["figures"].items() if values}
    made["quantized"] = {"int8": {"ours": ours, "peers": ["peer Q8_0"]}}
    made["missing"] = {"other": "is not there", "other int8": "is not there, either"}
    machine = {"cpu": "abacus", "cores": 2}
    console = Console(file=io.StringIO(), width=200)
    tables.print_comparison({"machine": machine, "dtype": "bf16", "repetitions": 1, **made}, console)
    plain, quantized = console.file.getvalue().split("int8, median")[:2]  # type: ignore[attr-defined]
    (decode,) = (line for line in plain.splitlines() if "W1 decode" in line)
    assert "0.50x peer" in decode
    assert "Q8_0" not in plain
    (decode,) = (line for line in quantized.splitlines() if "W1 decode" in line)
    assert "4.00x peer Q8_0" in decode
    assert decode.rstrip(" │|").endswith("2.00x")


def test_sweep_measures_every_rate_and_draws(tmp_path: Path) -> None:
    targets = [Fabricated("ours", 0.2, 0.01), Fabricated("peer", 0.4, 0.01)]
    goal = Goal(ttft=0.3, tpot=0.1)
    made = sweep(targets, [(8, 1)], [], 200, 0, range(9), goal, quiet())
    assert made["capacity, requests/s"] == pytest.approx({"ours": 5.0, "peer": 2.5})
    points = {(p["system"], p["rate"]): p for p in made["points"]}
    assert sorted({rate for _, rate in points}) == [1.0, 2.0, 3.0, 4.0, 4.5, 5.0]
    calm, busy = points["ours", 1.0], points["ours", 5.0]
    assert calm["TTFT, ms"]["p50"] == pytest.approx(200)
    assert busy["TTFT, ms"]["p99"] > 2 * calm["TTFT, ms"]["p99"]
    assert calm["goodput, requests/s"] > 0.5
    assert points["peer", 1.0]["goodput, requests/s"] == 0  # 0.4 s to the first token is never within 0.3
    assert points["peer", 5.0]["achieved, requests/s"] == pytest.approx(2.5, rel=0.02)
    file = tmp_path / "sweep.png"
    chart.draw(made["points"], "a title", file)
    assert file.read_bytes().startswith(PNG)
    assert file.stat().st_size > 20_000
    console = Console(file=io.StringIO(), width=250)
    machine = {"cpu": "abacus", "cores": 2}
    rest = {"machine": machine, "requests": 200, "mix": "8:1", "goal": {"ttft": 0.3, "tpot": 0.1}}
    tables.print_sweep({**rest, "missing": {"vLLM": "is not there"}, **made}, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert text.count("peer") == 6
    assert "vLLM: is not there" in text
    json.dumps(made)


def test_summary_counts_errors_and_goodput() -> None:
    requests = [Request([1], 11, at=float(n)) for n in range(4)]
    outcomes = [Outcome(0.1, 1.1, 11), Outcome(0.1, 3.1, 11), Outcome(0.5, 1.5, 11), failed("refused")]
    made = summary(requests, outcomes, Goal(ttft=0.2, tpot=0.2))
    assert made["errors"] == 1
    assert made["achieved, requests/s"] == pytest.approx(3 / 4.1)
    assert made["goodput, requests/s"] == pytest.approx(1 / 4.1)  # the second is slow to go on, the third to begin
    assert made["TPOT, ms"]["p50"] == pytest.approx(100)


def test_summary_of_nothing_but_errors() -> None:
    requests = [Request([1], 2)]
    made = summary(requests, [failed("refused")], Goal(1, 1))
    assert (made["errors"], made["achieved, requests/s"], made["tokens/s"]) == (1, 0, 0)


def test_capacity_needs_answers() -> None:
    with pytest.raises(TargetError, match="busy failed a request"):
        sweep([Failing("busy", 1, 1)], [(1, 1)], [1.0], 2, 0, range(9), Goal(1, 1), quiet())


def test_run_by_run_figures() -> None:
    run = Run([Outcome(0.5, 2.5, 5)], 2.5)
    assert (compare.ttft_ms(run), compare.decode_rate(run), compare.throughput(run)) == (500, 2.0, 2.0)
