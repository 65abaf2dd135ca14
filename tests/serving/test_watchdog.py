"""What `tidewright serve` does for a server that can't help itself: real processes, real signals.

Triton may abort by itself when a stub is killed with a lock of their shared memory: then all of it is started again,
which is allowed here.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from helpers.triton import RunningServer
from serving.test_health import stub_of
from tidewright.launch import model_watch, watchdog
from tidewright.launch.leftovers import SHARED_MEMORY
from tidewright.launch.watchdog import Watchdog

LONG = {"temperature": 0, "max_tokens": 4000, "ignore_eos": True}
PATIENCE = 120.0  # seconds


@contextlib.contextmanager
def watched(model_dir: Path, **options: Any) -> Iterator[tuple[RunningServer, list[str]]]:
    said: list[str] = []
    with RunningServer(model_dir, **options) as server:
        thread = threading.Thread(target=Watchdog(server.triton, None, said.append).run, daemon=True)
        thread.start()
        yield server, said
        server.triton.stop()
        thread.join(30)
        assert not thread.is_alive()


def until(what: Callable[[], object], said: list[str]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not what():
        assert time.monotonic() < deadline, said
        time.sleep(0.1)


def answers(server: RunningServer, *models: str) -> bool:
    body = {"text_input": "Once", "max_tokens": 1}
    try:
        return all(
            httpx.post(
                f"{server.triton.http_url}/v2/models/{model}/generate", json=body, timeout=10, trust_env=False
            ).status_code
            == 200
            for model in models
        )
    except httpx.TransportError:
        return False


def regions(server: RunningServer) -> int:
    leftovers = server.triton._leftovers
    return len(list(SHARED_MEMORY.glob(f"{leftovers.region_prefix}*"))) if leftovers else 0


@pytest.mark.parametrize("streams", [1, 4])
def test_a_killed_failsafe_takes_nobody_down(model_dir: Path, streams: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The decoder's responses to it would wait for ever for somebody to take them."""
    monkeypatch.setattr(model_watch, "PROBE_INTERVAL", 0.1)
    with watched(model_dir) as (server, said), server.stream() as stream:
        before = regions(server)
        for number in range(streams):
            stream.send(str(number), "failsafe", text_input="Once", stream=True, sampling_parameters=LONG)
        while not all(generation.responses for generation in stream.generations.values()):
            stream.next()
        stub_of(server, "failsafe").kill()
        backs = ("decoder is back", "tritonserver is back")
        until(lambda: any(line.startswith(backs) for line in said), said)
        until(lambda: answers(server, "decoder", "failsafe", "generate"), said)
        assert said[0].startswith(("the stub of failsafe died", "tritonserver ended with")), said
        until(lambda: regions(server) <= before, said)


def test_a_triton_that_hangs_is_started_again(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "HANG_AFTER", 4.0)
    monkeypatch.setattr(watchdog, "LIVE_INTERVAL", 0.5)
    monkeypatch.setattr(watchdog, "LIVE_PATIENCE", 2.0)
    monkeypatch.setattr(model_watch, "PROBE_PATIENCE", 1.0)
    monkeypatch.setattr(model_watch, "LOOK_PATIENCE", 1.0)
    with watched(model_dir) as (server, said):
        assert server.triton.pid is not None
        os.kill(server.triton.pid, signal.SIGSTOP)
        until(lambda: any(line.startswith("tritonserver is back") for line in said), said)
        # No stub was to blame.
        assert said[0] == "tritonserver does not serve: no answer for 4 s; its requests are lost"
        assert answers(server, "decoder", "failsafe", "generate")


def test_a_model_that_can_not_be_loaded_again_means_a_new_triton(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_watch, "PROBE_INTERVAL", 0.1)
    monkeypatch.setattr(model_watch, "RELOAD_INTERVAL", 0.5)
    monkeypatch.setattr(model_watch, "RELOAD_PATIENCE", 2.0)
    asked = model_watch.ask

    def ask(url: str, body: dict[str, Any] | None, patience: float) -> Any:
        return asked(url.replace("tokenizer/load", "no-such-model/load"), body, patience)

    with watched(model_dir) as (server, said):
        monkeypatch.setattr(model_watch, "ask", ask)
        stub_of(server, "tokenizer").kill()
        until(lambda: any(line.startswith("tritonserver is back") for line in said), said)
        assert any(line.startswith("tokenizer could not be loaded again: ") for line in said), said
        assert answers(server, "generate")
