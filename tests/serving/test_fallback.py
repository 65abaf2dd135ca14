"""The `fallback` model beside `decoder`: the same interface, an engine process of its own."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from rich.console import Console

from helpers import upstream
from helpers.processes import Serve, child, stub_of
from helpers.triton import RunningServer
from tidewright.cache import EMBEDDED_MODEL, fallback_path
from tidewright.launch.export import export

LIMIT = 24  # tokens
GREEDY = {"temperature": 0, "max_tokens": LIMIT, "ignore_eos": True}


@pytest.fixture(scope="module")
def server(model_dir: Path) -> Iterator[RunningServer]:
    folder = fallback_path(EMBEDDED_MODEL)
    export(model_dir, folder, ("int8",), Console(quiet=True))
    with RunningServer(model_dir, fallback=str(folder), fallback_max_tokens=LIMIT) as running:
        yield running


def engine_of(server: RunningServer, model: str) -> psutil.Process:
    return child(stub_of(server, model).pid, "tidewright.engine")


def wait_until_healthy(server: RunningServer) -> None:
    """Also where its engine was killed only after a stream's last token, and nothing yet waited for the next engine."""
    deadline = time.monotonic() + 60
    while (answer := server.control("health", "fallback")).json().get("text_output") != "ok":
        assert time.monotonic() < deadline, answer.text
        time.sleep(0.05)


def test_it_answers_as_the_decoder_does_but_no_longer_than_its_limit(server: RunningServer) -> None:
    options = {**GREEDY, "max_tokens": 100, "logprobs": 1}
    for stream in (False, True):
        got = server.generate(
            "fallback",
            text_input="The capital of France is",
            stream=stream,
            sampling_parameters=options,
            return_finish_reason=True,
            return_logprobs=True,
        )
        assert got.error is None
        assert "Paris" in got.text
        assert len(got.token_ids) == LIMIT
        assert got.outputs["finish_reason"][0] == b"length"
        assert b"decoded_token" in got.outputs["logprobs"][0]
        assert (len(got.responses) > 1) == stream


def test_it_follows_what_says_which_tokens_and_what_text(server: RunningServer) -> None:
    start, digits = 1, list(range(32, 42))  # <|im_start|>
    options = {"temperature": 1.0, "seed": 1, "max_tokens": 20, "logit_bias": {start: 21}, "skip_special_tokens": False}
    options |= {"allowed_token_ids": [start, *digits], "stop": ["|>"], "include_stop_str_in_output": True}
    asked = {"return_stop_reason": True, "return_num_cached_tokens": True, "return_finish_reason": True}
    got = server.generate("fallback", text_input="Pi is 3.14", stream=True, sampling_parameters=options, **asked)
    assert re.fullmatch(r"[0-9]*<\|im_start\|>", got.text)
    assert got.outputs["finish_reason"].tolist() == [b"stop"]
    assert got.outputs["stop_reason"].tolist() == [b'"|>"']
    assert got.outputs["num_cached_tokens"].tolist() == [0]


def test_it_gives_way_to_the_decoder(server: RunningServer) -> None:
    assert engine_of(server, "fallback").nice() - engine_of(server, "decoder").nice() == 10


def test_many_at_once_get_what_each_gets_alone(server: RunningServer) -> None:
    prompts = [f"{'Once upon a time, ' * number}there were {number}" for number in range(6)]
    alone = [server.generate("fallback", text_input=text, sampling_parameters=GREEDY).token_ids for text in prompts]
    with server.stream() as stream:
        for number, text in enumerate(prompts):
            stream.send(str(number), "fallback", text_input=text, stream=True, sampling_parameters=GREEDY)
        together = stream.finish()
    assert [together[str(number)].token_ids for number in range(6)] == alone


def test_it_answers_while_the_decoders_engine_is_stuck(server: RunningServer) -> None:
    stuck = engine_of(server, "decoder")
    os.kill(stuck.pid, signal.SIGSTOP)
    try:
        got = server.generate("fallback", text_input="The capital of France is", sampling_parameters=GREEDY)
        assert "Paris" in got.text
    finally:
        os.kill(stuck.pid, signal.SIGCONT)
    assert len(server.generate(text_input="Once", sampling_parameters=GREEDY).token_ids) == LIMIT


def test_when_its_engine_is_killed_its_streams_go_on_and_the_decoder_notices_nothing(server: RunningServer) -> None:
    restarts = server.metric("engine_restarts_total")
    engine = engine_of(server, "fallback")  # looked for now: it takes long enough for the stream to end
    with server.stream() as stream:
        stream.send("1", "fallback", text_input="Once", stream=True, sampling_parameters=GREEDY)
        while len(stream.generations["1"].token_ids) < 3:
            stream.next()
        engine.kill()
        got = stream.finish()["1"]
    # In int8 a replay rounds differently, so what follows may be other words; float32: engine/test_onnx_runner.py.
    assert got.error is None
    assert len(got.token_ids) == LIMIT
    server.wait_idle()
    wait_until_healthy(server)
    assert server.metric("fallback_engine_restarts_total") == 1
    assert server.metric("engine_restarts_total") == restarts


def test_it_has_a_health_of_its_own_and_cancels_by_id(server: RunningServer) -> None:
    wait_until_healthy(server)
    engine = engine_of(server, "fallback")
    with server.stream() as stream:
        engine.suspend()  # before the request: it may end before the cancel arrives, however soon that is
        try:
            stream.send("doomed", "fallback", text_input="Once", stream=True, sampling_parameters=GREEDY)
            deadline = time.monotonic() + 20
            while server.control("cancel:doomed", "fallback").status_code != 200:  # it has not arrived
                assert time.monotonic() < deadline
        finally:
            engine.resume()
        assert "cancelled by its id" in str(stream.finish()["doomed"].error)


def test_it_can_be_unloaded_and_loaded_again_after_streaming(server: RunningServer) -> None:
    for action in ("unload", "load"):
        url = f"{server.triton.http_url}/v2/repository/models/fallback/{action}"
        assert httpx.post(url, json={}, timeout=120, trust_env=False).status_code == 200
    for _ in range(600):
        got = server.generate("fallback", text_input="Once", sampling_parameters=GREEDY)
        if got.error is None:
            break
    assert len(got.token_ids) == LIMIT


def test_a_server_that_was_not_asked_for_it_does_without(bf16_server: RunningServer) -> None:
    assert bf16_server.control("health", "fallback").status_code == 404


def test_a_folder_that_holds_no_export_stops_the_start_with_the_reason(model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(Exception, match="no complete ONNX export"), RunningServer(model_dir, fallback=str(tmp_path)):
        pass


def test_serve_makes_it_watches_it_and_ends_it(serve: type[Serve]) -> None:
    started = serve("--fallback=auto")
    started.wait_ready()
    url = f"http://127.0.0.1:{started.http}/v2/models/fallback/generate"

    def answer() -> str:
        body = {"text_input": "The capital of France is", "temperature": 0, "max_tokens": 8}
        return httpx.post(url, json=body, timeout=120, trust_env=False).text

    assert "Paris" in answer()
    child(started.process.pid, "/fallback/").kill()
    deadline = time.monotonic() + 60
    while "Paris" not in answer():
        assert time.monotonic() < deadline
        time.sleep(0.2)
    started.family = psutil.Process(started.process.pid).children(recursive=True)
    started.process.send_signal(signal.SIGTERM)
    assert started.wait(30) == 0
    assert "the stub of fallback died" in started.log or upstream.ABORTED in started.log
    started.assert_nothing_left()
