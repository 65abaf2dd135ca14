"""aiperf and our own load test agree about one server: a scripted replica with a fixed pace; and a real Triton."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from helpers.echo_replica import EchoReplica
from helpers.gateway import RunningGateway
from helpers.load_tests import load_test
from helpers.needs import needs
from helpers.triton import RunningServer

REQUESTS, TOKENS = 30, 16
PAUSE = 0.02  # seconds before each token
FACTOR = 1.5
"""Of latencies: both measure the same pace and load, one after the other, on a machine that does other things."""


@needs("clients")
def measured(folder: Path, *options: str) -> dict[str, dict[str, Any]]:
    """The rows of `python -m loadtests aiperf`, by name."""
    lengths = ("--requests", str(REQUESTS), "--concurrency", "2", "--fixed", f"20:{TOKENS}")
    done = load_test(folder, *options, *lengths, kind="aiperf")
    assert done.status == 0, done.words
    assert "aiperf" in (folder / "aiperf.html").read_text()
    return {row["name"]: row for row in json.loads((folder / "aiperf.json").read_text())}


@pytest.mark.slow
@pytest.mark.timeout(1500)  # the first one makes the environment
def test_aiperf_and_ours_agree_about_a_fixed_pace(model_dir: Path, tmp_path: Path) -> None:
    with EchoReplica() as replica:
        replica.pause = PAUSE
        with RunningGateway(model_dir, replica) as gateway:
            rows = measured(tmp_path, "--url", gateway.url, "--tokenizer", str(model_dir))
    for name, expected in {"requests": REQUESTS, "failed": 0, "output tokens": REQUESTS * TOKENS}.items():
        assert rows[name]["ours"] == rows[name]["aiperf"] == expected, name
    for name, tokens in {"TTFT p50, ms": 1, "TPOT p50, ms": 1, "whole p50, ms": TOKENS}.items():
        for which in ("ours", "aiperf"):
            assert rows[name][which] > 0.9 * 1000 * PAUSE * tokens, name
        assert 1 / FACTOR < rows[name]["ratio"] < FACTOR, name


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_aiperf_measures_triton_itself(server: RunningServer, model_dir: Path, tmp_path: Path) -> None:
    rows = measured(tmp_path, "--triton", f"127.0.0.1:{server.settings.http_port}", "--tokenizer", str(model_dir))
    assert rows["requests"]["aiperf"] == REQUESTS
    assert rows["failed"]["aiperf"] == 0
    assert 0 < rows["TTFT p50, ms"]["aiperf"] < rows["whole p50, ms"]["aiperf"]
    assert rows["requests"]["ours"] is None
