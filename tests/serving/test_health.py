"""Health that tells the truth, stubs that are replaced, and the gentle end. Real processes, real signals."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import msgspec
import psutil
import pytest

from helpers.processes import Serve, child, stub_of
from helpers.triton import RunningServer
from tidewright.bench.machine import free_ports
from tidewright.launch import model_watch, watchdog
from tidewright.launch.watchdog import Watchdog
from tidewright.schema import DecoderStatus

LONG = {"temperature": 0, "max_tokens": 8000, "ignore_eos": True}


def tidewright(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("tidewright")), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def healthy(url: str) -> str:
    """Empty if so, else what the command says."""
    done = tidewright("health", "--url", url)
    assert done.returncode == (1 if done.stderr else 0)
    assert "Traceback" not in done.stderr
    return done.stderr


def test_health_follows_the_engine(bf16_server: RunningServer) -> None:
    url = bf16_server.triton.http_url
    assert healthy(url) == ""
    assert bf16_server.triton.pid is not None
    child(bf16_server.triton.pid, "tidewright.engine").kill()
    deadline = time.monotonic() + 30
    while not (reason := healthy(url)):
        assert time.monotonic() < deadline
        child(bf16_server.triton.pid, "tidewright.engine").kill()
    assert reason == "Error: the engine is not available (killed by SIGKILL)\n"
    while healthy(url):
        assert time.monotonic() < deadline
    bf16_server.wait_idle()


def test_where_no_server_is_there_is_no_health() -> None:
    url = f"http://127.0.0.1:{free_ports(1)[0]}"
    assert healthy(url).startswith(f"Error: can't reach {url}/health/ready: ")
    done = tidewright("drain", "--url", url)
    assert (done.returncode, "Traceback" in done.stderr) == (1, False)


def test_a_busy_server_is_healthy(model_dir: Path) -> None:
    """Health must not wait in the queue, or the busiest replica is the first to be taken out."""
    with RunningServer(model_dir, max_running=1, max_waiting=0) as server, server.stream() as stream:
        stream.send("1", text_input="Once", stream=True, sampling_parameters=LONG)
        stream.next()
        assert "running or waiting" in str(server.generate(text_input="Once").error)
        assert healthy(server.triton.http_url) == ""


def test_an_unknown_control_word_is_refused(bf16_server: RunningServer) -> None:
    answer = bf16_server.control("reboot")
    assert answer.json() == {
        "error": "control is 'reboot'; it can be: health, drain, status, memory, list_lora, cancel:<request id>, "
        "resize:<bytes of KV cache>, kv_limit:<bytes of KV cache>, load_lora:<JSON>, unload_lora:<JSON> [invalid]"
    }


def status_of(server: RunningServer) -> DecoderStatus:
    return msgspec.json.decode(server.control("status").json()["text_output"], type=DecoderStatus)


def test_status_is_answered_at_once_beside_load(bf16_server: RunningServer) -> None:
    bf16_server.wait_idle()
    idle = status_of(bf16_server)
    assert (idle.trouble, idle.draining, idle.waiting, idle.wait, idle.kv_usage) == ("", False, 0, 0, 0)
    with bf16_server.stream() as stream:
        for number in range(80):  # 16 more than run at once
            stream.send(str(number), text_input=f"{number} times", stream=True, sampling_parameters=LONG)
        while bf16_server.metric("requests_waiting") < 16:
            stream.next()
        began = time.monotonic()
        for _ in range(20):
            status = status_of(bf16_server)
        took = time.monotonic() - began
        # Not one of those that waited has ended meanwhile: the questions did not wait with them.
        assert bf16_server.metric("requests_active") == 80
    assert (status.trouble, status.draining) == ("", False)
    # The engine takes them up one after the other.
    assert 16 <= status.waiting * bf16_server.settings.max_waiting <= 80
    assert status.wait > took / 2
    assert 0 < status.kv_usage <= 1
    assert status.silence < bf16_server.settings.heartbeat_timeout
    bf16_server.wait_idle()


def test_status_tells_that_the_engine_is_silent_before_it_is_given_up(bf16_server: RunningServer) -> None:
    assert bf16_server.triton.pid is not None
    engine = child(bf16_server.triton.pid, "tidewright.engine")

    def wait_silence(is_reached: Callable[[float], bool]) -> None:
        deadline = time.monotonic() + 60
        while not is_reached(status_of(bf16_server).silence):
            assert time.monotonic() < deadline
            time.sleep(0.02)

    engine.suspend()
    try:
        # The heartbeat before may have come late; the next comes after 0.2 s.
        wait_silence(lambda silence: silence > 1)
    finally:
        engine.resume()
    wait_silence(lambda silence: silence < 0.5)


@contextlib.contextmanager
def watched(server: RunningServer) -> Iterator[list[str]]:
    said: list[str] = []
    thread = threading.Thread(target=Watchdog(server.triton, None, said.append).run, daemon=True)
    thread.start()
    yield said
    server.triton.stop()
    thread.join(60)
    assert not thread.is_alive()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_stub_that_is_gone_or_stuck_is_replaced(
    model_dir: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_watch, "PROBE_INTERVAL", 0.1)
    monkeypatch.setattr(model_watch, "PROBE_PATIENCE", 2.0)
    monkeypatch.setattr(model_watch, "LOOK_PATIENCE", 2.0)
    with RunningServer(model_dir) as server, watched(server) as said, server.stream() as stream:
        # Nothing can save a stream inside a dead stub, but it must not keep the model from being loaded again.
        stream.send("lost", text_input="Once", stream=True, sampling_parameters=LONG)
        stream.next()
        for model in ("decoder", "tokenizer"):
            before = len(said)
            assert server.triton.pid is not None
            engine = child(server.triton.pid, "tidewright.engine")
            stub_of(server, model).send_signal(number)
            deadline = time.monotonic() + 60
            # Triton aborts, rarely, when a stub dies with a lock of their shared memory: then all is started again.
            while not any(line.startswith((f"{model} is back", "tritonserver is back")) for line in said[before:]):
                why = (model, said, healthy(server.triton.http_url), "".join(server.triton.log_tail))
                assert time.monotonic() < deadline, why
                time.sleep(0.05)
            assert said[before].startswith((f"the stub of {model} ", "tritonserver ended with")), said
            assert model != "decoder" or not psutil.wait_procs([engine], timeout=5)[1]  # it ends with its bridge
            answer = server.post("generate/generate", {"text_input": "Once", "max_tokens": 3})
            assert answer.status_code == 200, answer.text
        assert healthy(server.triton.http_url) == ""


def test_a_triton_that_is_gone_is_started_again(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "MAX_RESTARTS", 1)
    said: list[str] = []
    with RunningServer(model_dir) as server:
        thread = threading.Thread(target=Watchdog(server.triton, None, said.append).run, daemon=True)
        thread.start()
        assert server.triton.pid is not None
        os.kill(server.triton.pid, signal.SIGKILL)
        deadline = time.monotonic() + 60
        while not said or not said[-1].startswith("tritonserver is back"):
            assert time.monotonic() < deadline, said
            time.sleep(0.05)
        assert said[0] == "tritonserver ended with code -9; its requests are lost"
        answer = server.post("generate/generate", {"text_input": "Once", "max_tokens": 3})
        assert answer.status_code == 200, answer.text
        # Once is as often as it may within the window.
        os.kill(server.triton.pid, signal.SIGKILL)
        thread.join(60)
        assert not thread.is_alive()
        assert said[-1] == "tritonserver was started 1 times within 600 s; giving up"


def test_drain_ends_a_server_gently_and_tells_who_did_not_finish(model_dir: Path) -> None:
    running = Serve("--shutdown-grace", "3")
    try:
        running.wait_ready()
        url = f"http://127.0.0.1:{running.http}"
        generate = f"{url}/v2/models/decoder/generate_stream"
        body = {"text_input": "Once", "stream": True, **LONG}
        with httpx.stream("POST", generate, json=body, timeout=60, trust_env=False) as response:
            lines = response.iter_lines()
            next(lines)
            assert tidewright("drain", "--url", url, "--no-wait").stdout == "Draining.\n"
            # Unless the server has closed its port meanwhile, as it does within a second.
            assert healthy(url).startswith(("Error: draining: no new requests are taken", "Error: can't reach"))
            rest = list(lines)
        assert "the server is shutting down, and 3 s (shutdown_grace) were not enough" in rest[-1] + rest[-2]
        assert running.wait(timeout=60) == 0
        running.assert_nothing_left()
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in [*running.family, psutil.Process(running.process.pid)]:
                process.kill()
