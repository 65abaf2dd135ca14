"""The life of a server: engine killed, clean end, bad starts. Real processes, real signals."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from helpers.processes import Serve, child
from helpers.triton import Generation, RunningServer
from tidewright.launch.leftovers import remove_those_of_the_dead

LONG = {"temperature": 0, "max_tokens": 1000, "ignore_eos": True}
QUEUED = re.compile(r"^tidewright_gateway_queue_length\{.*\} 1\.0$", re.MULTILINE)


def test_a_killed_engine_is_replaced_and_nobody_notices(server: RunningServer) -> None:
    """float32: exactly the tokens of an undisturbed run, though the engine dies in the middle, twice."""
    requests = {
        "greedy": {"temperature": 0},
        "seeded": {"temperature": 1.0, "seed": 5},
        "penalties": {"temperature": 0.8, "seed": 6, "frequency_penalty": 0.5, "repetition_penalty": 1.2, "top_p": 0.9},
        "guided": {"temperature": 0, "guided_regex": "[a-z ,.]{600,900}", "ignore_eos": False, "logprobs": 2},
        "short": {"temperature": 0, "max_tokens": 3},
    }

    def run(kills: int) -> dict[str, Generation]:
        with server.stream() as stream:
            for name, params in requests.items():
                sampling = {"max_tokens": 120, "ignore_eos": True, **params}
                stream.send(name, text_input="Once upon a time", stream=True, sampling_parameters=sampling)
            for kill in range(kills):
                while len(stream.generations["greedy"].token_ids) < 30 * (kill + 1):
                    stream.next()
                assert server.triton.pid is not None
                child(server.triton.pid, "tidewright.engine").kill()
            return stream.finish()

    undisturbed = run(0)
    restarts = server.metric("engine_restarts_total")
    disturbed = run(2)
    for name in requests:
        assert undisturbed[name].error is None is disturbed[name].error
        assert disturbed[name].token_ids == undisturbed[name].token_ids
        assert disturbed[name].text == undisturbed[name].text
        assert disturbed[name].ended == 1
    server.wait_idle()
    assert server.metric("engine_restarts_total") == restarts + 2


def test_a_request_that_comes_while_the_engine_starts_waits_for_it(server: RunningServer) -> None:
    assert server.triton.pid is not None
    child(server.triton.pid, "tidewright.engine").kill()
    assert server.generate(text_input="Once", sampling_parameters={"max_tokens": 3}).error is None
    server.wait_idle()


def test_a_stuck_engine_is_replaced(model_dir: Path) -> None:
    with RunningServer(model_dir, heartbeat_interval=0.2, heartbeat_timeout=2) as server:
        assert server.triton.pid is not None
        with server.stream() as stream:
            stream.send("1", text_input="Once", stream=True, sampling_parameters={**LONG, "max_tokens": 200})
            stream.next()
            child(server.triton.pid, "tidewright.engine").send_signal(signal.SIGSTOP)
            # More than the socket holds: sending to an engine that does not read must not block for ever.
            for number in range(50):
                stream.send(f"more {number}", input_ids=[1000] * 3000, sampling_parameters={"max_tokens": 1})
            generations = stream.finish()
        assert not any(generation.error for generation in generations.values())
        assert len(generations["1"].token_ids) == 200
        assert server.metric("engine_restarts_total") == 1


def test_what_runs_finishes_within_the_grace_time(serve: type[Serve]) -> None:
    """Through Triton and through the gateway, whole and streamed. With nothing to do: test_embeddings.py."""
    running = serve("--shutdown-grace", "60", "--threads", "1")  # two wait for each other where cores are busy
    running.wait_ready()
    assert re.search(r"curl -N http://127\.0\.0\.1:\d+/v2/models/decoder/generate_stream", running.log)
    assert f"http://127.0.0.1:{running.gateway}/docs" in running.log
    sampling = {"temperature": 0, "max_tokens": 80, "ignore_eos": True}
    triton = f"http://127.0.0.1:{running.http}/v2/models/decoder/generate"
    of_triton = {"text_input": "Once", "stream": True, **sampling}
    gateway = f"http://127.0.0.1:{running.gateway}/v1/completions"
    of_gateway = {"model": "smollm2-135m", "prompt": "Once", **sampling}
    options: dict[str, Any] = {"timeout": 60, "trust_env": False}
    with ThreadPoolExecutor() as pool:
        whole = pool.submit(httpx.post, gateway, json=of_gateway, **options)
        with (
            httpx.stream("POST", f"{triton}_stream", json=of_triton, **options) as direct,
            httpx.stream("POST", gateway, json={**of_gateway, "stream": True}, **options) as response,
        ):
            of_direct, lines = direct.iter_lines(), response.iter_lines()
            answers, events = [next(of_direct)], [next(lines)]
            os.kill(running.process.pid, signal.SIGINT)
            events += [line for line in lines if line]
            answers += [line for line in of_direct if line]
        answer = whole.result()
    assert events[-1] == "data: [DONE]", events[-3:]
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] == 80
    text = answer.json()["choices"][0]["text"]
    assert text == "".join(json.loads(line.removeprefix("data: "))["choices"][0]["text"] for line in events[:-1])
    assert len(answers) > 5
    assert text == "".join(json.loads(line.removeprefix("data:"))["text_output"] for line in answers)
    assert running.wait(timeout=60) == 0
    assert "Traceback" not in running.log
    running.assert_nothing_left()


def test_what_waits_at_the_gateway_for_the_server_that_has_ended_is_answered(
    serve: type[Serve], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIDEWRIGHT_GATEWAY_WAIT_FOR_REPLICA", "8")  # longer than a server with nothing to do takes
    running = serve("--shutdown-grace", "60", "--threads", "1", "--max-running", "1")
    running.wait_ready()
    gateway = f"http://127.0.0.1:{running.gateway}"
    body = {"model": "smollm2-135m", "prompt": "Once", "temperature": 0, "max_tokens": 80, "ignore_eos": True}
    options: dict[str, Any] = {"timeout": 60, "trust_env": False}
    with ThreadPoolExecutor() as pool:
        long = {**body, "stream": True, "max_tokens": 200}
        with httpx.stream("POST", f"{gateway}/v1/completions", json=long, **options) as response:
            lines = response.iter_lines()
            next(lines)
            waiting = pool.submit(httpx.post, f"{gateway}/v1/completions", json={**body, "prompt": "Twice"}, **options)
            deadline = time.monotonic() + 30
            while not QUEUED.search(httpx.get(f"{gateway}/metrics", **options).text):
                assert time.monotonic() < deadline
                time.sleep(0.02)
            os.kill(running.process.pid, signal.SIGINT)
            assert [line for line in lines if line][-1] == "data: [DONE]"
        answer = waiting.result()
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable")
    assert running.wait(timeout=60) == 0
    running.assert_nothing_left()


def test_a_second_ctrl_c_ends_it_at_once_and_leaves_nothing(serve: type[Serve]) -> None:
    running = serve("--shutdown-grace", "60")
    running.wait_ready()
    body = {"text_input": "Once", "stream": True, **LONG, "max_tokens": 8000}
    url = f"http://127.0.0.1:{running.http}/v2/models/decoder/generate_stream"
    with httpx.stream("POST", url, json=body, timeout=60, trust_env=False) as response:
        lines = response.iter_lines()  # kept: the end of the iterator would hang up, and leave nothing to wait for
        next(lines)
        os.kill(running.process.pid, signal.SIGINT)
        time.sleep(2)  # longer than an idle server waits
        assert running.process.poll() is None
        os.kill(running.process.pid, signal.SIGINT)
        assert running.wait(timeout=60) == 0
    running.assert_nothing_left()


def test_a_killed_serve_takes_its_server_along(serve: type[Serve]) -> None:
    running = serve("--shutdown-grace", "1")
    running.wait_ready()
    running.process.kill()
    _, alive = psutil.wait_procs(running.family, timeout=60)
    assert not alive
    remove_those_of_the_dead()  # as the next start does; the fixture sees that nothing stays


def test_a_taken_port_is_one_clear_line(serve: type[Serve]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        running = serve("--metrics-port", str(port))
        assert running.wait(timeout=60) == 1
    assert running.log.splitlines() == [
        f"Error: can't listen on 127.0.0.1:{port} (Address already in use); choose another --metrics-port"
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "no/such/model/here"], "no/such/model/here"),
        (["--kv-cache-memory", "10000GiB"], "memory"),
        (["--http-port", "nine"], "http_port"),
        (["--dtype", "int3"], "dtype"),
        (["--device", "cuda:7"], "cuda"),
    ],
)
def test_a_bad_start_says_what_to_change(serve: type[Serve], options: list[str], message: str) -> None:
    running = serve(*options)
    assert running.wait(timeout=90) != 0
    running.log = running.log.strip()
    assert message in running.log
    assert "Traceback" not in running.log
    assert len(running.log.splitlines()) <= 3
    running.assert_nothing_left()
