"""The Go client: its own tests, with the scripted gateway and with a real one, and its examples."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from helpers.golang import FOLDER, run_go, run_go_tests
from helpers.keyed_gateway import Keyed
from helpers.triton import RunningServer

# What each example prints, beside the model's words.
EXAMPLES = {
    "chat": ("tokens",),
    "stream": ("tokens",),
    "tools": ('get_weather({"city"',),
    "errors-and-retries": ("no such model", "gpt-9", "model_not_found"),
    "cancel": ("...",),
}


def test_it_is_formatted_and_vetted() -> None:
    assert run_go("gofmt", "-l", ".") == ""
    run_go("go", "vet", "-race", "./...")  # with -race, what it compiles is of use to the tests


def test_its_own_tests_pass() -> None:
    run_go_tests("./...")


def test_with_a_real_gateway(keyed: Keyed, server: RunningServer) -> None:
    triton = server.settings
    wrong = {
        "http": f"http://127.0.0.1:{triton.http_port}",
        "grpc": f"http://127.0.0.1:{triton.grpc_port}",
        "metrics": f"http://127.0.0.1:{triton.metrics_port}",
        "expired": keyed.expired,
    }
    said = run_go_tests(
        "-run=WithGateway|WithRealServers",
        "-v",
        ".",
        TIDEWRIGHT_URL=keyed.gateway.url,
        TIDEWRIGHT_KEY=keyed.key,
        TIDEWRIGHT_WRONG=json.dumps(wrong),
    )
    assert "SKIP" not in said
    assert "--- PASS: TestConformanceWithGateway/gateway_chat" in said
    assert "--- PASS: TestWithRealServers" in said


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The examples, compiled."""
    folder = tmp_path_factory.mktemp("examples")
    run_go("go", "build", "-race", "-o", f"{folder}/", "./examples/...")
    return folder


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_works(programs: Path, keyed: Keyed, example: str) -> None:
    environment = {**os.environ, "TIDEWRIGHT_URL": keyed.gateway.url, "TIDEWRIGHT_KEY": keyed.key}
    done = subprocess.run(
        [programs / example], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    for words in EXAMPLES[example]:
        assert words in done.stdout


def test_every_example_is_run() -> None:
    assert {path.name for path in (FOLDER / "examples").iterdir()} == set(EXAMPLES)
