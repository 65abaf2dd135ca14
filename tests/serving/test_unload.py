"""Unloading a model ends what runs in it, and all of its processes, whoever is connected (triton#7626)."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import httpx
import psutil
from click.testing import CliRunner

from helpers.gateway import RunningGateway
from helpers.processes import Serve, shared_memory
from helpers.triton import RunningServer
from tidewright.launch.cli import main

LONG = {"temperature": 0, "max_tokens": 8000, "ignore_eos": True}
TIMEOUT = 60.0  # seconds


def repository(server: RunningServer, path: str) -> httpx.Response:
    url = f"{server.triton.http_url}/v2/repository/{path}"
    return httpx.post(url, json={}, timeout=120, trust_env=False)


def state(server: RunningServer, model: str) -> str:
    return next(str(found.get("state")) for found in repository(server, "index").json() if found["name"] == model)


def engines(server: RunningServer) -> list[int]:
    found = []
    for process in psutil.Process(server.triton.pid).children(recursive=True):
        try:
            command = " ".join(process.cmdline())
        except psutil.NoSuchProcess:
            continue
        if "tidewright.engine" in command or "/decoder/" in command:
            found.append(process.pid)
    return found


def unload(server: RunningServer) -> None:
    assert repository(server, "models/decoder/unload").status_code == 200
    deadline = time.monotonic() + TIMEOUT
    while state(server, "decoder") != "UNAVAILABLE" or engines(server):
        assert time.monotonic() < deadline, (state(server, "decoder"), engines(server))
        time.sleep(0.1)


def load(server: RunningServer) -> None:
    assert repository(server, "models/decoder/load").status_code == 200
    got = server.generate(text_input="Once", sampling_parameters={"max_tokens": 2})
    assert (got.error, len(got.token_ids)) == (None, 2)


def test_a_decoder_is_unloaded_with_a_gateway_connected(model_dir: Path) -> None:
    """The gateway asks it for its status all the time, and has just had answers from it."""
    with RunningServer(model_dir) as server, RunningGateway(model_dir, server) as gateway:
        regions = None
        for _ in range(3):
            deadline = time.monotonic() + TIMEOUT
            while gateway.post("/v1/completions", {"prompt": "Once", "max_tokens": 3}).status_code != 200:
                assert time.monotonic() < deadline
                time.sleep(0.1)
            unload(server)
            left = shared_memory()
            assert regions is None or len(left) <= regions
            regions = len(left)
            load(server)


def test_a_stream_that_runs_while_its_model_is_unloaded_ends_with_the_reason(model_dir: Path) -> None:
    with RunningServer(model_dir, shutdown_grace=1) as server:
        for _ in range(2):
            with server.stream() as done:
                done.send("1", text_input="Once", stream=True, sampling_parameters={**LONG, "max_tokens": 5})
                assert done.finish()["1"].error is None
            with server.stream() as stream:
                stream.send("1", text_input="Once", stream=True, sampling_parameters=LONG)
                stream.next()
                assert repository(server, "models/decoder/unload").status_code == 200
                got = stream.finish()["1"]
            assert got.ended == 1
            assert "the model is being unloaded, and 1 s (shutdown_grace) were not enough" in str(got.error)
            unload(server)
            load(server)


def test_a_stream_that_ends_in_the_grace_time_ends_whole(model_dir: Path) -> None:
    with RunningServer(model_dir, shutdown_grace=60) as server, server.stream() as stream:
        sampling = {**LONG, "max_tokens": 40}
        stream.send("1", text_input="Once", stream=True, sampling_parameters=sampling)
        stream.next()
        assert repository(server, "models/decoder/unload").status_code == 200
        got = stream.finish()["1"]
        assert (got.error, len(got.token_ids)) == (None, 40)


def test_a_decoder_that_someone_unloads_stays_so_and_everyone_says_why(model_dir: Path, tmp_path: Path) -> None:
    log = tmp_path / "serve.log"
    running = Serve("--threads=1", f"--model={model_dir}", f"--log-file={log}", "--log-level=info")
    triton, gateway = f"http://127.0.0.1:{running.http}", f"http://127.0.0.1:{running.gateway}"

    def says(*command: str) -> str:
        return CliRunner().invoke(main, [*command]).output

    def until(word: str, said: Callable[[], str]) -> str:
        deadline = time.monotonic() + TIMEOUT
        while word not in (text := said()):
            assert time.monotonic() < deadline, text
            time.sleep(0.2)
        return text

    again = f"curl -X POST {triton}/v2/repository/models/decoder/load"
    try:
        running.wait_ready()
        assert httpx.post(f"{triton}/v2/repository/models/decoder/unload", json={}, timeout=60).status_code == 200
        until(f"decoder was unloaded by request; load it again with: {again}", log.read_text)
        assert again in until("was unloaded by request", lambda: says("health", "--url", triton))
        until("its model decoder is not loaded", lambda: says("health", "--url", gateway))
        command = ("diagnose", gateway, f"127.0.0.1:{running.metrics}", "--interval", "0.2")
        found = until("Triton has no model decoder: it was unloaded by request", lambda: says(*command))
        assert "its model decoder is not loaded" in found
        assert "is dead" not in found
        assert httpx.post(f"{triton}/v2/repository/models/decoder/load", timeout=120).status_code == 200
        until("decoder is loaded again", log.read_text)
        until("healthy", lambda: says("health", "--url", gateway))
        assert "loading the model again" not in log.read_text()  # nobody else has
    finally:
        running.process.terminate()
        running.wait(60)
