"""The scorecard: its page is made of its figures, which are read from what benchmarks print; verdicts are right."""

from __future__ import annotations

import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import psutil
import pydantic
import pytest

from benchmarks.scorecard import __main__ as command
from benchmarks.scorecard.criteria import Criteria, Figure, Score, load_criteria, load_scores, save_scores
from benchmarks.scorecard.page import page

# What each benchmark printed when it ran, as far as its figures stand in it.
PRINTED = {
    "tensor_parallel": (
        "1 rank(s): prefill of 512 4.78 s (1.00x, 100 %)   decode of 16 57.3 tokens/s (1.00x, 100 %)"
        "   agreement 0.00 ms a step   load 13.90 s   memory of each rank 4894 MiB\n"
        "2 rank(s): prefill of 512 2.52 s (1.90x, 95 %)   decode of 16 108.9 tokens/s (1.90x, 94 %)"
        "   agreement 0.31 ms a step   load 7.50 s   memory of each rank 2523, 2523 MiB\n",
        {"D1.prefill": 95, "D1.decode": 94, "K1.agreement": 0.31},
    ),
    "recovery": (
        "median of 3: 0.64 s to the first token, 0.86 s until all 16 go on; no request failed\n",
        {"D2.all": 0.86},
    ),
    "health": ("7 minutes, 900 requests (0 failed), 780 health checks: 2 false alarms; a check", {"S2.false": 2}),
    "gateway": (
        "│ short answer: added, p50                   │ 1.13 ms │ <= 2 ms │ yes │\n"
        "│ short answer: added, p99                   │ 4.73 ms │ <= 5 ms │ yes │\n"
        "│ stream of 16 responses: added, p99         │ 8.90 ms │ <= 5 ms │ NO  │\n"
        "│ short answers, workers: 1                  │  2694/s │ >= 1000/s │ yes │\n"
        "│ cached short answers, workers: 1           │  4388/s │ >= 1000/s │ yes │\n"
        "│ 1000 requests at the same time: errors     │       0 │ 0 │ yes │\n"
        "│ 2 replicas, round_robin: most and least busy apart by │ 0.1% │ < 5% │ yes │\n"
        "│ 3 replicas, round_robin: most and least busy apart by │ 0.4% │ < 5% │ yes │\n"
        "│ 2 replicas, least_load: most and least busy apart by  │ 2.3% │ < 5% │ yes │\n",
        {"A1.p50": 1.13, "A1.p99": 4.73, "A1.rate": 2694, "A1.errors": 0, "S1.round_robin": 0.4, "S1.least_load": 2.3},
    ),
    "gateway_triton": (
        "│ from the kill to the first byte of a new request │ 124 ms │ < 100 ms │ NO │\n"
        "│ from the kill until all 8 running streams go on  │ 184 ms │ < 1000 ms │ yes │\n"
        "│ 100 streams, one each 100 ms; WebSocket, p99 │ 48 ms │ < 500 ms │ yes │\n"
        "│ 100 streams, all at once; WebSocket, p99 │ 3491 ms │ < 500 ms │ NO │\n",
        {"S2.new": 124, "S2.running": 184, "A2.first": 48, "A2.burst": 3491},
    ),
    "failsafe": (
        "engine stopped, 16 streams that begin: first token of the fallback after 0.51 s, of the median stream 0.80 s, "
        "of the last 0.81 s\n"
        "engine stopped, 16 streams that run: first token of the fallback after 0.65 s, of the median stream 1.09 s, "
        "of the last 1.19 s\n"
        "engine killed, 16 streams that run: first token of the fallback after 0.88 s, of the median stream 1.38 s, "
        "of the last 1.52 s\n",
        {"R2.begin": 0.81, "R2.run": 1.19, "R2.killed": 1.52},
    ),
    "kills": (
        "5 minutes, 14 kills, 1222 streams, 16 at a time: 1 failed (0.082%); {'decoder': 1221}",
        {"R3.errors": 0.082},
    ),
    "resilience": ("  works 1 ms         1      999       993      3.3   0.60 %  \n", {"R1.overhead": 0.6}),
    "alerting": (
        "engine killed        EngineRestarted (warning): 6.7 s\n"
        "stub killed          ModelProcessDead (critical): 5.5 s",
        {"O1.alert": 6.7},
    ),
    "dashboards": (
        "engine      32 queries, 0 empty: 0.52 s (first 0.80 s)\nservice     29 queries, 0 empty: 0.28 s (first 0.9 s)",
        {"O1.dashboard": 0.52},
    ),
    "log_pipeline": (
        "│   p99 │ 0.91 s │ │ │\n│   most │ 1.20 s │ < 5 s │ yes │\n"
        "│ lines lost of 2500, the sink away for 5 s │ 0 │ 0 │ yes │\n",
        {"O2.visible": 1.2, "O2.lost": 0},
    ),
    "protocols": (
        "│ server is live: gRPC's p50 is lower than of REST/JSON by        │ -900% │ >= 30% │ NO  │\n"
        "│   its bytes are fewer by                                        │    4% │ >= 70% │ NO  │\n"
        "│ tokenize 14 tokens: gRPC's p50 is lower than of REST/JSON by    │  -63% │ >= 30% │ NO  │\n"
        "│ tokenize 14 tokens: gRPC's p50 is lower than of REST/JSON, httpx by │ 66% │ >= 30% │ yes │\n"
        "│   its bytes are fewer by                                        │   26% │ >= 70% │ NO  │\n"
        "│ 2000 ids (cached), 1 token: gRPC's p50 is lower than of REST/JSON by │ -9% │ >= 30% │ NO  │\n"
        "│ 2000 ids (cached), 1 token: gRPC's p50 is lower than of REST/JSON, httpx by │ -15% │ >= 30% │ NO  │\n"
        "│   its bytes are fewer by                                        │   34% │ >= 70% │ NO  │\n"
        "│ text, 16 tokens, whole: gRPC's p50 is lower than of REST/JSON, httpx by │ 14% │ >= 30% │ NO  │\n"
        "│   its bytes are fewer by                                        │  -15% │ >= 70% │ NO  │\n"
        "│ the embedding of 14 tokens: gRPC's p50 is lower than of REST/JSON, httpx by │ 10% │ >= 30% │ NO │\n"
        "│   its bytes are fewer by                                        │   78% │ >= 70% │ yes │\n"
        "│ server is live: gRPC, answers without a model     │ 5829/s │ >= 5000/s │ yes │\n"
        "│ control: health: gRPC, answers without a model    │ 2247/s │ >= 5000/s │ NO  │\n"
        "│ tokenize 14 tokens: gRPC, answers without a model │ 4848/s │ >= 5000/s │ NO  │\n",
        {
            "A3.latency": 66,
            "A3.sockets": -63,
            "A3.model": 14,
            "A3.embedding": 78,
            "A3.ids": 34,
            "A3.rate": 5829,
            "A3.tokenizer": 4848,
        },
    ),
    "root_cause": ("10 of 10 causes named by the first command", {"B9.found": 10}),
    "tool_calls": ("399 of 400 forced calls were parsed and follow their schema", {"B1.calls": 399}),
    "idle": ("  serve                    0.22 %\n  all                      3.47 %\n", {"idle.all": 3.47}),
    "deployment": (
        "  until the pod is ready  p50  4.23  min  4.23  max  4.23\n"
        "  undisturbed    124 requests, 0 failed, 0 with another text; longest gap 1.01 s\n"
        "  during it     1113 requests, 0 failed, 1 with another text; longest gap 1.54 s\n"
        "  during it      338 requests, 2 failed, 0 with another text; longest gap 1.25 s\n",
        {"X1.start": 4.23, "B8.failed": 2, "B8.texts": 1},
    ),
    "server_memory": (
        "| tritonserver | 310.0 | 313.1 | +0.055 |\n| gateway | 120.0 | 123.0 | -0.052 |\n",
        {"memory.triton": 0.055, "memory.gateway": -0.052},
    ),
    "soak": (
        "met    availability: one token, once a second: 0.9997 (>= 99.9%)\n"
        "met    requests that failed: 5e-05 (< 0.1%)\n"
        "MISSED streams without an end: 1 (0)\n",
        {"soak.availability": 0.9997, "soak.failed": 5e-5, "soak.unended": 1},
    ),
    "quantized_engine": (
        "W1 decode, tokens/s        int8             median     171.8  best     177.1   1.55x\n"
        "W1 decode, tokens/s        int4-g64         median     229.3  best     233.4   2.06x\n"
        "W1 decode, tokens/s        stored           median     216.2  best     237.7   1.89x\n"
        "W2 throughput, tokens/s    int8             median     608.4  best     622.0   1.39x\n"
        "W4 time, ms                int8             median     611.9  best     580.7   1.27x\n",
        {"Q1.int8_w1": 1.55, "Q1.int4_w1": 2.06, "B3.gguf_w1": 1.89, "Q1.int8_w2": 1.39, "Q1.int8_w4": 1.27},
    ),
    "tenancy_ttft": (
        "prompt  step time  beside the flood    p50, s   p99, s   p99 / alone\n"
        "    64       0.25  with fairness        0.477    1.304         16.61   over the target\n"
        "    64       0.25  without fairness    20.208   24.062        306.54\n"
        "   512       0.25  with fairness        0.935    1.267          3.12   over the target\n",
        {"B6.short_engine": 16.61, "B6.long_engine": 3.12},
    ),
    "tenancy_shares": (
        "1:1                      yes          0.5%    0.2%   0.498 0.502\n"
        "1:1                      no          35.8%   17.9%   0.679 0.321\n"
        "1:2:4                    yes          2.0%    0.3%   0.140 0.287 0.573\n",
        {"G2.share_engine": 2.0},
    ),
    "tenancy_scheduling": (
        "running  tenants  schedule, ms  commit, ms\n"
        "     64        8         0.213       0.145\n"
        "    256        1         0.676       0.553   over the target\n"
        "    256       64         0.796       0.564   over the target\n"
        "engine: 64 running of 8 tenants, 71.4 ms a step, of which 0.59 ms, 0.83%, for scheduling\n",
        {"G2.plan": 0.796, "G2.scheduling": 0.83},
    ),
    "tenancy_latency": ("refused, 0 late at first, 7.37/s\nratio 5.26\n", {"G2.goodput": 5.26}),
    "tenancy_memory": (
        "24 resizes between 5.6 MiB and 47.8 MiB: 12.5 s, 0 failed, 24 of 24 outputs equal, 84 preemptions\n"
        "budget 480.0 MiB (weights 256.7 MiB, workspace 138.2 MiB, KV cache 85.1 MiB): "
        "99.0% in use while requests wait\n",
        {"G1.failed": 0, "G1.used": 99.0},
    ),
    "tenancy_lora": (
        "8 sequences, prompts : base   1621.9 tokens/s, 8 adapters of rank 16   1239.5: 0.77\n"
        "8 sequences, decoding: base    679.5 tokens/s, 8 adapters of rank 16    442.7: 0.65 (goal 0.8)\n"
        "16 sequences, decoding: base    862.5 tokens/s, 8 adapters of rank 16    631.1: 0.81 (goal 0.8)\n"
        "32 sequences, decoding: base    945.2 tokens/s, 8 adapters of rank 16    756.9: 0.78 (goal 0.8)\n"
        "load beside 16 streams: median 172 ms, longest 241 (goal 200); longest step meanwhile 215 ms\n",
        {"B4.8": 0.65, "B4.16": 0.81, "B4.32": 0.78, "B4.load": 172},
    ),
    "quantization_quality": (
        "perplexity           32.31         32.51     32.35\n                                  +0.6%     +0.1%\n",
        {"Q1.perplexity": 0.6},
    ),
    "kv_cache_dtypes": (
        "bfloat16      25.09    24.81     1.00                      768\n"
        "int8          21.42    21.27     0.85                      408\n"
        "fp8           23.09    22.94     0.92                      408\n",
        {"K2.bytes": 408, "K2.int8_time": 0.85, "K2.fp8_time": 0.92},
    ),
    "coverage": ("TOTAL     18000    540    97%", {"T1.lines": 97}),
}


def test_the_page_is_what_the_figures_give() -> None:
    """After a change of either: make scorecard."""
    assert page(load_criteria(), load_scores()) == command.PAGE.read_text()


def test_scores_are_of_figures_that_there_are() -> None:
    assert load_scores().keys() <= load_criteria().figures.keys()


@pytest.mark.parametrize("name", PRINTED)
def test_figures_are_read_from_what_a_benchmark_prints(name: str) -> None:
    text, expected = PRINTED[name]
    figures = {key: one for key, one in load_criteria().figures.items() if one.benchmark == name and one.find}
    assert {key: figure.read(text) for key, figure in figures.items()} == expected


def test_each_benchmark_whose_figures_are_read_has_such_an_output() -> None:
    assert {one.benchmark for one in load_criteria().figures.values() if one.find} == PRINTED.keys()


def figure(**fields: Any) -> Figure:
    return Figure(**{"what": "it takes", "unit": "s", "benchmark": "b", "find": r"took ([\d.]+)", **fields})


@pytest.mark.parametrize(
    ("bounds", "value", "met"),
    [
        ({"most": 5}, 5, True),
        ({"most": 5}, 5.01, False),
        ({"least": 5}, 4.99, False),
        ({"least": 5}, 5, True),
        ({"least": 2, "most": 5}, 6, False),
        ({}, 6, None),
    ],
)
def test_a_bound_itself_is_met(bounds: dict[str, float], value: float, met: bool | None) -> None:
    assert figure(**bounds).is_met(value) is met


@pytest.mark.parametrize(("how", "value"), [("first", 3), ("last", 2), ("max", 9), ("min", 2), ("median", 3)])
def test_of_several_numbers_the_one_that_is_asked_for(how: str, value: float) -> None:
    assert figure(of_several=how).read("took 3, took 9, took 2") == value


def criteria(**fields: Any) -> Criteria:
    benchmark = {"command": "python -c \"print('took 7')\"", "minutes": 1}
    one = {"promise": "fast", "figures": {"F": figure(most=5).model_dump()}, **fields}
    return Criteria.model_validate({"benchmarks": {"b": benchmark}, "criteria": {"X": one}})


def test_what_is_missed_stands_out_and_what_is_not_measured_is_said() -> None:
    made, score = criteria(tests=["tests/a.py"], not_here="no GPU"), Score(value=7, day=date(2026, 1, 2), machine="m")
    rows = page(made, {"F": score}).splitlines()[-3:]
    assert [row.rsplit("|", 2)[1].strip() for row in rows] == ["**missed**", "met", "not measured"]
    assert "| X | fast | ≤ 5 s | it takes: 7 s | 2026-01-02, m |" in rows[0]
    assert page(made, {}).splitlines()[-3].endswith("| not measured |")
    assert "1 met, 1 missed, 1 not measured, 0 not built." in page(made, {"F": score})


@pytest.mark.parametrize(
    "fields",
    [
        {"figures": {"F": {"what": "a", "benchmark": "other"}}},
        {"figures": {"F": {"what": "a", "benchmark": "b", "find": "no group"}}},
        {"figures": {}},
        {"figures": {}, "tset": ["a"]},
    ],
)
def test_criteria_that_judge_nothing_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(pydantic.ValidationError):
        criteria(**fields)


@pytest.mark.parametrize(
    ("script", "passed", "value"),
    [
        ("print('took 7')", True, 7),
        ("print('took long')", False, 1),
        ("print('took 7'); raise SystemExit(3)", False, 1),
    ],
)
def test_a_run_keeps_figures_and_a_failed_one_leaves_them(
    script: str, passed: bool, value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "scores.yaml"
    save_scores({"F": Score(value=1, day=date(2026, 1, 2), machine="m")}, file)
    monkeypatch.setattr(command, "SCORES", file)
    monkeypatch.setattr(command, "load_scores", lambda: load_scores(file))
    made = criteria()
    made.benchmarks["b"] = made.benchmarks["b"].model_copy(update={"command": f'python -c "{script}"'})
    assert command.run("b", made, tmp_path / "outputs") is passed
    assert load_scores(file)["F"].value == value
    assert (tmp_path / "outputs" / "b.txt").read_text().startswith("took")


@pytest.mark.parametrize("program", ["make", "tidewright", "python"])
def test_commands_are_those_of_this_environment_or_the_machine_s(program: str, tmp_path: Path) -> None:
    assert {one.command.split()[0] for one in load_criteria().benchmarks.values()} == {"make", "tidewright", "python"}
    assert command.finished(f"{program} --version", tmp_path / "output") == 0
    assert (tmp_path / "output").read_text()


def test_ctrl_c_lets_a_benchmark_end_what_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "benchmark.py"
    script.write_text(
        "import signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell has it ignored\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True)\n"
        "try:\n    print(child.pid, flush=True)\n    time.sleep(600)\nfinally:\n    child.kill()\n    child.wait()\n"
    )
    file = tmp_path / "output"

    class Interrupted(subprocess.Popen):  # type: ignore[type-arg]
        def wait(self, timeout: float | None = None) -> int:
            if timeout is None:
                while not file.read_text():
                    time.sleep(0.01)
                raise KeyboardInterrupt
            return super().wait(timeout)

    monkeypatch.setattr(subprocess, "Popen", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        command.finished(f"python {script}", file)
    assert not psutil.pid_exists(int(file.read_text().split()[0]))


def test_an_unknown_benchmark_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["scorecard", "--run", "idle,nothing"])
    with pytest.raises(SystemExit, match="2"):
        command.main()
    assert "no such benchmark: nothing; there are" in capsys.readouterr().err
