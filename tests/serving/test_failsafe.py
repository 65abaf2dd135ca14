"""Chaos through the real server: whatever happens to the decoder, each request ends once, and no text is lost.

The fallback is the same model in float32 ONNX, so that every answer can be held against transformers', whoever gave it.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from helpers import upstream
from helpers.oracle import PROMPTS, Oracle
from helpers.processes import child, stub_of
from helpers.triton import Generation, RunningServer, Stream

TOKENS = 40
NAMES = ("english", "code", "chinese", "emoji", "accents")
DECODER, STALLED, UNAVAILABLE = ("decoder", ""), ("fallback", "stalled"), ("fallback", "unavailable")
LONG = {"temperature": 0, "max_tokens": 2000, "ignore_eos": True}


@pytest.fixture(scope="module")
def server(model_dir: Path, float32_fallback: Path) -> Iterator[RunningServer]:
    with RunningServer(model_dir, dtype="float32", fallback=str(float32_fallback), breaker_cool_down=0.3) as running:
        yield running


@pytest.fixture(scope="module")
def impatient(model_dir: Path, float32_fallback: Path) -> Iterator[RunningServer]:
    """It does not mind silence, but a slow token. It has no idea of what is wrong, only that it takes long."""
    limits = {
        "breaker_cool_down": 0.3,
        "failsafe_patience": 60,
        "failsafe_first_token_timeout": 1.5,
        "failsafe_stall_timeout": 1.5,
    }
    with RunningServer(model_dir, dtype="float32", fallback=str(float32_fallback), **limits) as running:
        yield running


def engine_of(server: RunningServer) -> psutil.Process:
    return child(stub_of(server, "decoder").pid, "tidewright.engine")


@contextmanager
def stopped(process: psutil.Process) -> Iterator[None]:
    os.kill(process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(process.pid, signal.SIGCONT)


def load(server: RunningServer, model: str, action: str) -> None:
    url = f"{server.triton.http_url}/v2/repository/models/{model}/{action}"
    assert httpx.post(url, json={}, timeout=120, trust_env=False).status_code == 200


def send(stream: Stream, name: str, model: str = "failsafe", **options: Any) -> None:
    sampling = {"temperature": 0, "max_tokens": TOKENS, **options}
    stream.send(name, model, text_input=PROMPTS[name], stream=True, sampling_parameters=sampling)


def served(generation: Generation) -> list[tuple[str, str]]:
    """Who answered and why, in order, as the responses say."""
    found = []
    for response in generation.responses:
        if "served_by" in response:
            reason = response["fallback_reason"][0].decode() if "fallback_reason" in response else ""
            found.append((response["served_by"][0].decode(), reason))
    return [who for at, who in enumerate(found) if at == 0 or found[at - 1] != who]


def assert_right(generation: Generation, oracle: Oracle, name: str) -> None:
    """Ended once, and with all of transformers' tokens and text, none twice."""
    assert generation.error is None
    assert generation.ended == 1
    expected = oracle.greedy(oracle.ids(PROMPTS[name]), TOKENS, guess=generation.token_ids)
    assert generation.token_ids == expected, name
    assert generation.text == oracle.tokenizer.decode(expected, skip_special_tokens=True), name
    assert "served_by" in generation.responses[0]
    assert "served_by" in generation.responses[-1]


def assert_moved(generations: dict[str, Generation], oracle: Oracle, to: tuple[str, str]) -> int:
    """How many went on there. On a busy machine the engine may have been ahead of us, and done with some."""
    for name, generation in generations.items():
        assert served(generation) in ([DECODER, to], [DECODER])
        assert_right(generation, oracle, name)
    moved = sum(len(served(generation)) > 1 for generation in generations.values())
    assert moved
    return moved


def disturbed(server: RunningServer, disturb: Callable[[], None]) -> dict[str, Generation]:
    """Streams to which something happens when each has had a few tokens."""
    with server.stream() as stream:
        for name in NAMES:
            send(stream, name)
        while min(len(generation.token_ids) for generation in stream.generations.values()) < 4:
            stream.next()
        disturb()
        return stream.finish()


def wait_until_well(server: RunningServer) -> None:
    """The decoder answers through failsafe again, and nothing is left of before."""
    deadline = time.monotonic() + 60
    while True:
        got = server.generate("failsafe", text_input="Once", sampling_parameters={"max_tokens": 1})
        if got.error is None and served(got) == [DECODER]:
            break
        assert time.monotonic() < deadline
        time.sleep(0.1)
    server.wait_idle()


def test_undisturbed_it_is_the_decoder_that_answers(server: RunningServer, oracle: Oracle) -> None:
    for name, generation in disturbed(server, lambda: None).items():
        assert served(generation) == [DECODER]
        assert_right(generation, oracle, name)


def test_what_the_decoder_gives_is_handed_on_as_it_is(server: RunningServer) -> None:
    inputs: dict[str, Any] = {
        "text_input": PROMPTS["english"],
        "sampling_parameters": {"seed": 5, "max_tokens": 12, "n": 2, "logprobs": 2, "prompt_logprobs": 1},
        **{f"return_{name}": True for name in ("num_input_tokens", "num_output_tokens", "logprobs")},
        **{f"return_{name}": True for name in ("stop_reason", "num_cached_tokens")},
    }
    for more in ({}, {"stream": True}, {"return_finish_reason": True}):
        direct, through = (server.generate(model, **inputs, **more) for model in ("decoder", "failsafe"))
        assert through.error is None
        assert set(through.outputs) == {*direct.outputs, "served_by"}
        assert through.text == direct.text
        assert len(through.outputs["stop_reason"]) == 2
        assert through.outputs["num_input_tokens"] == direct.outputs["num_input_tokens"]
        if not more:
            for name, value in direct.outputs.items():
                assert through.outputs[name].tolist() == value.tolist(), name


def test_a_bad_request_is_refused_with_the_decoders_words(server: RunningServer) -> None:
    for inputs in (
        {"text_input": "Once", "sampling_parameters": {"max_tokens": 0}},
        {"text_input": "Once", "sampling_parameters": {"top_q": 1}},
        {"text_input": "Once", "sampling_parameters": "{"},
        {"text_input": b"\xff"},
        {"input_ids": [10**6]},
        {},
    ):
        direct, through = (server.generate(model, **inputs) for model in ("decoder", "failsafe"))
        assert str(through.error) == str(direct.error)
        assert "[invalid]" in str(through.error)


@pytest.mark.parametrize("ensemble", ["generate", "generate_direct"])
def test_the_ensembles(server: RunningServer, oracle: Oracle, ensemble: str) -> None:
    with server.stream() as stream:
        send(stream, "english", ensemble)
        got = stream.finish()["english"]
    assert got.token_ids == oracle.greedy(oracle.ids(PROMPTS["english"]), TOKENS, guess=got.token_ids)
    assert served(got) == ([DECODER] if ensemble == "generate" else [])
    chat = {"messages": '[{"role": "user", "content": "Hi"}]', "max_tokens": 4, "temperature": 0}
    assert server.post(f"{ensemble}/generate", chat).json()["text_output"]


def test_a_killed_engine_comes_back_before_streams_have_to_leave_it(server: RunningServer, oracle: Oracle) -> None:
    for name, generation in disturbed(server, lambda: engine_of(server).kill()).items():
        assert served(generation) == [DECODER]
        assert_right(generation, oracle, name)


def test_an_engine_that_hangs_loses_its_streams_to_the_fallback(server: RunningServer, oracle: Oracle) -> None:
    before = server.metric("failsafe_resumed_total")
    engine = engine_of(server)
    try:
        moved = assert_moved(disturbed(server, engine.suspend), oracle, STALLED)
        with server.stream() as stream:  # some that come while it hangs
            for name in NAMES:
                send(stream, name)
            for name, generation in stream.finish().items():
                assert [by for by, _ in served(generation)] == ["fallback"]
                assert_right(generation, oracle, name)
        assert server.control("health", "failsafe").json()["text_output"] == "ok"  # it can answer
    finally:
        engine.resume()
    wait_until_well(server)
    assert server.metric("failsafe_resumed_total") - before == moved


def test_a_request_that_does_not_stream_leaves_a_hanging_engine_too(server: RunningServer, oracle: Oracle) -> None:
    with stopped(engine_of(server)):
        got = server.generate(
            "failsafe",
            text_input=PROMPTS["english"],
            exclude_input_in_output=True,
            sampling_parameters={"temperature": 0, "max_tokens": TOKENS},
        )
    assert served(got) == [STALLED]
    assert len(got.responses) == 1
    assert_right(got, oracle, "english")
    wait_until_well(server)


def test_the_fallback_goes_on_with_the_allowed_tokens_and_the_same_text(server: RunningServer) -> None:
    start, digits = 1, list(range(32, 42))  # <|im_start|>
    options = {**LONG, "max_tokens": 400, "temperature": 1.5, "seed": 4, "allowed_token_ids": [start, *digits]}
    options |= {"skip_special_tokens": False, "logit_bias": {start: 18}}
    whole = server.generate(text_input="Pi is 3.14", exclude_input_in_output=True, sampling_parameters=options)
    with server.stream() as stream:
        stream.send("1", "failsafe", text_input="Pi is 3.14", stream=True, sampling_parameters=options)
        while len(stream.generations["1"].token_ids) < 4:
            stream.next()
        with stopped(engine_of(server)):
            got = stream.finish()["1"]
    wait_until_well(server)
    assert got.error is None
    assert served(got) == [DECODER, STALLED]
    assert start in got.token_ids
    assert got.token_ids == whole.token_ids[: len(got.token_ids)]
    assert whole.text.startswith(got.text)
    assert got.text.count("<|im_start|>") == got.token_ids.count(start)


def test_what_only_the_decoder_can_go_on_with_ends_with_the_reason(server: RunningServer) -> None:
    with server.stream() as stream:
        for name, options in (("english", {"n": 2}), ("code", {"guided_regex": "[a-z ]{2000}"})):
            send(stream, name, **{**LONG, "ignore_eos": False, **options})
        while min(len(generation.token_ids) for generation in stream.generations.values()) < 4:
            stream.next()
        with stopped(engine_of(server)):
            generations = stream.finish()
    for generation in generations.values():
        assert "[engine_failed]" in str(generation.error)
        assert "no sign of life" in str(generation.error)
        assert generation.ended == 1
    wait_until_well(server)


def loads_all_anew_and_unloads_all(server: RunningServer, oracle: Oracle) -> None:
    with server.stream() as stream:
        send(stream, "english")
        assert_right(stream.finish()["english"], oracle, "english")
    for action in ("unload", "load"):
        load(server, "decoder", action)
    wait_until_well(server)
    for model in ("generate", "generate_direct", "failsafe", "fallback", "decoder", "tokenizer"):
        load(server, model, "unload")
    url = f"{server.triton.http_url}/v2/repository/index"
    deadline = time.monotonic() + 30
    while left := {
        model["name"]: model
        for model in httpx.post(url, json={}, trust_env=False).json()
        if model.get("state") != "UNAVAILABLE"
    }:
        if time.monotonic() > deadline:
            assert left.keys() <= upstream.MAY_STAY_UNLOADING, left
            break
        time.sleep(0.1)


def test_a_killed_stub_loses_its_streams_to_the_fallback(
    model_dir: Path, float32_fallback: Path, oracle: Oracle
) -> None:
    with RunningServer(model_dir, dtype="float32", fallback=str(float32_fallback)) as server:
        generations = disturbed(server, lambda: stub_of(server, "decoder").kill())
        if any(generation.error for generation in generations.values()):
            assert upstream.aborted(server), generations
            assert [generation.ended for generation in generations.values()] == [1] * len(NAMES)
            server.revive()
        else:
            for name, generation in generations.items():
                assert [by for by, _ in served(generation)] in (["decoder", "fallback"], ["decoder"])
                assert_right(generation, oracle, name)
            assert any(len(served(generation)) > 1 for generation in generations.values())
        upstream.unless_aborted(server, lambda: loads_all_anew_and_unloads_all(server, oracle))


def test_models_that_are_unloaded(server: RunningServer, oracle: Oracle) -> None:
    wait_until_well(server)
    load(server, "decoder", "unload")
    deadline = time.monotonic() + 30
    while True:
        with server.stream() as stream:
            send(stream, "english")
            got = stream.finish()["english"]
        if served(got) != [DECODER]:  # until it had ended what it was at
            break
        assert time.monotonic() < deadline
    assert served(got) == [UNAVAILABLE]
    assert_right(got, oracle, "english")
    load(server, "fallback", "unload")
    while (got := server.generate("failsafe", text_input="Once")).error is None:
        assert time.monotonic() < deadline
    assert "not ready" in str(got.error)
    assert "[engine_failed]" in str(got.error)
    while server.control("health", "failsafe").status_code == 200:
        assert time.monotonic() < deadline
    for model in ("decoder", "fallback"):
        load(server, model, "load")
    wait_until_well(server)


def test_a_slow_first_token_and_a_stall_in_the_middle(impatient: RunningServer, oracle: Oracle) -> None:
    engine = engine_of(impatient)
    try:
        assert_moved(disturbed(impatient, engine.suspend), oracle, STALLED)
    finally:
        engine.resume()
    wait_until_well(impatient)
    with stopped(engine), impatient.stream() as stream:
        for name in NAMES:
            send(stream, name)
        generations = stream.finish()
    for name, generation in generations.items():
        assert served(generation) == [("fallback", "first_token_timeout")]
        assert_right(generation, oracle, name)
    # So many failures in a row open the breaker; a probe closes it.
    assert impatient.metrics()["failsafe_breaker_transitions_total", "closed_open"] >= 1
    wait_until_well(impatient)
    deadline = time.monotonic() + 30
    while not impatient.metrics()["failsafe_breaker_state", "closed"]:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_flapping_engine(server: RunningServer, oracle: Oracle) -> None:
    engine = engine_of(server)
    with server.stream() as stream:
        for round_ in range(6):
            for name in NAMES[:4]:
                key = f"{name} {round_}"
                sampling = {"temperature": 0, "max_tokens": TOKENS}
                stream.send(key, "failsafe", text_input=PROMPTS[name], stream=True, sampling_parameters=sampling)
            time.sleep(0.1 * round_)
            with stopped(engine):
                time.sleep(0.2 * round_)
        for key, generation in stream.finish().items():
            assert_right(generation, oracle, key.rpartition(" ")[0])
    wait_until_well(server)


@pytest.mark.parametrize("way", ["hang up", "failsafe", "decoder"])
def test_a_cancel_reaches_the_engine(server: RunningServer, way: str) -> None:
    start = server.metric("generated_tokens_total")
    stream = server.stream()
    stream.send("doomed", "failsafe", text_input="Once", stream=True, sampling_parameters=LONG)
    while len(stream.generations["doomed"].token_ids) < 4:
        stream.next()
    if way == "hang up":
        stream.close(cancel=True)
    else:
        assert server.control("cancel:doomed", way).json()["text_output"] == "ok"
        got = stream.finish()["doomed"]
        assert "cancelled by its id [cancelled]" in str(got.error)
        stream.close()
    server.wait_idle()
    assert server.metric("generated_tokens_total") - start < 1000


def test_a_cancel_of_what_the_fallback_serves(server: RunningServer) -> None:
    with stopped(engine_of(server)), server.stream() as stream:
        for name in NAMES:
            send(stream, name, **(LONG if name == "english" else {}))
        while not stream.generations["english"].responses:
            stream.next()
        assert server.control("cancel:english", "failsafe").status_code == 200
        generations = stream.finish()
    assert "cancelled by its id" in str(generations.pop("english").error)
    assert all(generation.error is None for generation in generations.values())
    wait_until_well(server)
    assert server.metric("fallback_requests_active") == 0
