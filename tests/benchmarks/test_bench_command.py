"""`tidewright bench` against the real server, on workloads small enough for a test."""

from __future__ import annotations

import contextlib
import json
import random
import socket
from collections.abc import Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner

from helpers.triton import RunningServer
from tidewright.bench import machine
from tidewright.bench.targets import TransformersTarget, TritonTarget
from tidewright.bench.workloads import ONE_BY_ONE, SHORT, Request, Run, Workload
from tidewright.devices.cpu.build import build
from tidewright.launch import bench_command
from tidewright.launch.cli import main


def small(count: int, tokens_in: int, out: int, one_by_one: bool = False, engine_too: bool = True) -> Workload:
    def requests(rng: random.Random, ids: Sequence[int]) -> list[Request]:
        return [Request(rng.choices(ids, k=tokens_in), out) for _ in range(count)]

    return Workload("", requests, one_by_one, engine_too)


# The tokens of W1 must not all leave together, as few do where the sender waits for a core: their distance is measured.
SMALL = {"W1": small(1, 8, 24), "W2": small(3, 8, 3), "W3": small(2, 9, 2), "W4": small(1, 20, 1)}


@pytest.fixture(autouse=True)
def _never_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tidewright.bench.compare.wait_idle", lambda: False)
    monkeypatch.setattr("tidewright.bench.sweep.wait_idle", lambda: False)
    # Other work on the cores must not make an engine look dead.
    monkeypatch.setenv("TIDEWRIGHT_HEARTBEAT_TIMEOUT", "200")
    monkeypatch.setenv("TIDEWRIGHT_THREADS", "1")


def test_requests_go_out_when_they_are_due(server: RunningServer) -> None:
    target = TritonTarget(server.grpc_url)
    rng = random.Random(0)
    requests = [Request(rng.choices(range(100, 9000), k=6), out, at) for out, at in ((2, 0.0), (5, 0.5), (1, 2.0))]
    try:
        outcomes = target.run(requests)
    finally:
        target.close()
    assert [outcome.tokens for outcome in outcomes] == [2, 5, 1]
    assert not any(outcome.error for outcome in outcomes)
    assert all(0 < outcome.first <= outcome.last for outcome in outcomes)
    assert Run.of(requests, outcomes).seconds > 2


def test_a_refused_request_is_one_error_and_leaves_the_others(server: RunningServer) -> None:
    target = TritonTarget(server.grpc_url)
    try:
        outcomes = target.run([Request([500], 2), Request([500], 100_000), Request([501], 2)])
    finally:
        target.close()
    assert [outcome.tokens for outcome in outcomes] == [2, 0, 2]
    assert outcomes[1].error


@pytest.mark.server
def test_comparison_with_what_is_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model_dir: Path) -> None:
    # No peers are installed there, but the kernels are: compiling them takes longer than all the rest.
    (tmp_path / "kernels").symlink_to(build().parent)
    monkeypatch.setenv("TIDEWRIGHT_CACHE", str(tmp_path))
    monkeypatch.setattr(bench_command, "prepare", lambda model: model_dir)
    alone = {ONE_BY_ONE: small(3, 8, 3, True, engine_too=False), SHORT: small(3, 4, 1, True)}
    monkeypatch.setattr(bench_command, "WORKLOADS", {**SMALL, **alone})
    options = [
        "--repetitions",
        "1",
        "--starts",
        "1",
        "--against",
        "vllm,llama.cpp,transformers",
        "--quantization",
        "int8",
    ]
    options += ["--output", str(tmp_path)]
    result = CliRunner().invoke(main, ["bench", *options])
    assert result.exit_code == 0, result.output
    (file,) = tmp_path.glob("bench-*.json")
    report = json.loads(file.read_text())
    systems = {"tidewright", "engine alone", "transformers", "tidewright int8"}
    assert set(report["figures"]["W2 throughput, tokens/s"]) == systems
    assert report["quantized"] == {"int8": {"ours": "tidewright int8", "peers": []}}
    assert (report["quantization"], report["kv_cache_dtype"]) == ("auto", "auto")
    assert all(value["min"] > 0 for values in report["figures"].values() for value in values.values())
    for name in ("vLLM", "llama.cpp"):
        reason = f"{name} is not installed; to compare with it: make bench-peers"
        assert report["missing"][name.lower()] == report["missing"][f"{name.lower()} int8"] == reason
    assert report["continuous batching"]["throughput ratio"] > 0
    assert report["runs begun on busy cores"] == 4 * 4 + 1 + 2
    assert report["start"]["start to first token through Triton, s"] > 0
    assert report["memory, MiB (proportional set size)"]["engine"] > 100


@pytest.mark.server
def test_sweep_writes_figures_and_chart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model_dir: Path) -> None:
    monkeypatch.setattr(bench_command, "prepare", lambda model: model_dir)
    options = ["--rates", "5,10", "--requests", "4", "--mix", "6:2,9:1", "--output", str(tmp_path)]
    result = CliRunner().invoke(main, ["bench", "sweep", *options])
    assert result.exit_code == 0, result.output
    (file,) = tmp_path.glob("sweep-*.json")
    points = json.loads(file.read_text())["points"]
    assert [(point["system"], point["rate"], point["errors"]) for point in points] == [
        ("tidewright", 5.0, 0),
        ("tidewright", 10.0, 0),
    ]
    assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--against", "vllm,ours"], "'ours' is none of vllm, llama.cpp, transformers"),
        (["--quantization", "int8,int3"], "'int3' is none of int8, w8a8"),
        (["sweep", "--mix", "many"], "a mix is written like 128:64"),
        (["sweep", "--rates", "1,-2"], "rates are numbers above 0"),
        (["sweep", "--rates", "fast"], "rates are numbers above 0"),
    ],
)
def test_wrong_options_say_what_is_right(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(main, ["bench", *arguments])
    assert result.exit_code
    assert message in result.output


def test_help_teaches() -> None:
    assert "W3  16 at once sharing 512 tokens" in CliRunner().invoke(main, ["bench", "--help"]).output
    assert "Arrivals are Poisson" in CliRunner().invoke(main, ["bench", "sweep", "--help"]).output


def test_transformers_generates_what_is_asked_for(model_dir: Path) -> None:
    outcomes = TransformersTarget(model_dir).run([Request([500, 501, 502], 4), Request([600, 601, 602], 4)])
    assert [outcome.tokens for outcome in outcomes] == [4, 4]
    assert 0 < outcomes[0].first < outcomes[0].last


def test_the_machine_has_a_name_and_gets_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.description()["cpu"]
    loads = iter([90.0, 50.0, 3.0])
    monkeypatch.setattr(machine.psutil, "cpu_percent", lambda interval: next(loads))
    assert machine.wait_idle()
    assert next(loads, None) is None
    monkeypatch.setattr(machine.psutil, "cpu_percent", lambda interval: 90.0)
    assert not machine.wait_idle(timeout=0.05)


def test_ports_are_free_and_none_that_connections_take() -> None:
    ports = [port for _ in range(3) for port in machine.free_ports(4)]
    assert len(set(ports)) == len(ports)
    assert max(ports) < int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    with socket.socket() as taken:
        with contextlib.suppress(OSError):  # somebody else has it
            taken.bind(("127.0.0.1", ports[-1] + 1))
        assert ports[-1] + 1 not in machine.free_ports(2)
