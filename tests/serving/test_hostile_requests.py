"""Requests that once hung, killed the engine, or opened the breaker for everyone: each is its caller's mistake."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from helpers.processes import processes
from helpers.triton import RunningServer

PROMPT = "The capital of France is"
GREEDY = {"temperature": 0, "max_tokens": 4}
MODELS = ("decoder", "failsafe", "generate", "generate_direct")


def nested(depth: int) -> dict[str, Any]:
    made: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        made = {"type": "object", "properties": {"a": made}, "required": ["a"]}
    return made


# The tensor sampling_parameters, as text.
INVALID = {
    "top_k 2^31": '{"top_k": 2147483648}',
    "top_k 2^63": '{"top_k": 9223372036854775808}',
    "top_k 2^64": '{"top_k": 18446744073709551616}',
    "max_tokens 2^40": '{"max_tokens": 1099511627776}',
    "stop_token_ids": '{"stop_token_ids": [18446744073709551616]}',
    "logit_bias": '{"logit_bias": {"18446744073709551616": 1}}',
    "schema 64 deep": json.dumps({"guided_json": nested(64)}),
    "schema NaN": '{"guided_json": "{\\"const\\": NaN}"}',
    "schema [[[": json.dumps({"guided_json": "[" * 3000}),
    "schema 10^400": json.dumps({"guided_json": {"enum": [10**400]}}),
    "parameters [[[": "[" * 100_000,
    "parameters {{{": '{"a":' * 5000 + "1" + "}" * 5000,
    "timeout Infinity": '{"timeout": Infinity}',
    "timeout 1e999": '{"timeout": 1e999}',
    "regex": json.dumps(
        {"guided_regex": "|".join(f"[{chr(i)}-{chr(i + 500)}]{{1,{i}}}" for i in range(0x100, 0x1100))}
    ),
}


@pytest.fixture(autouse=True)
def _server_unharmed(server: RunningServer) -> Iterator[None]:
    server.generate(text_input=PROMPT, sampling_parameters=GREEDY)
    before = processes(server)
    yield
    assert server.generate("failsafe", text_input=PROMPT, sampling_parameters=GREEDY).error is None
    assert before <= processes(server)
    assert server.metrics()["failsafe_breaker_state", "closed"] == 1


@pytest.mark.parametrize("model", MODELS)
def test_each_is_refused_as_its_callers_mistake(server: RunningServer, model: str) -> None:
    """Together they are more than the breaker would take of failures."""
    with server.stream() as stream:
        for name, options in INVALID.items():
            stream.send(name, model, text_input=PROMPT, sampling_parameters=options)
        for value in (float("nan"), float("inf")):
            stream.send(f"parameter {value}", model, {"temperature": value}, text_input=PROMPT)
        generations = stream.finish()
    assert {str(got.error).rpartition(" ")[2] for got in generations.values()} == {"[invalid]"}


@pytest.mark.parametrize("model", ["decoder", "failsafe"])
def test_what_is_just_within_the_bounds_works(server: RunningServer, model: str) -> None:
    asked: list[dict[str, Any]] = [
        {"top_k": 2**31 - 1, "seed": 1, "max_tokens": 4},
        {"guided_json": {"type": "integer", "maximum": 2**64}, "seed": 1},
        {"guided_json": {"enum": [2**53, -(2**53)]}, "seed": 1, "max_tokens": 40},
        {"seed": -(2**63), "max_tokens": 4},
        {"seed": -1, "max_tokens": 4},
        {"timeout": 1e9, "max_tokens": 4},
        {"priority": -(2**31), "max_tokens": 4},
        {"stop_token_ids": [49151] * 1024, "min_tokens": 3, "max_tokens": 4},
    ]
    with server.stream() as stream:
        for number, options in enumerate(asked):
            stream.send(str(number), model, text_input=PROMPT, sampling_parameters=options)
        for number, got in stream.finish().items():
            assert got.error is None, asked[int(number)]
            assert got.token_ids


def test_a_grammar_that_outgrows_its_limits_on_the_way_is_the_callers_mistake(server: RunningServer) -> None:
    options = {"guided_regex": "(x{1000}){1000}y", "temperature": 0, "max_tokens": 400}
    got = server.generate(text_input=PROMPT, sampling_parameters=options)
    if got.error is not None:  # else it was within its limits to the end
        assert str(got.error).endswith(" [invalid]")


@pytest.mark.parametrize("model", MODELS)
def test_a_text_that_can_not_fit_is_refused_by_its_characters(server: RunningServer, model: str) -> None:
    for text in ("a" * 5_000_000, "<|im_end|>" * 200_000, "\U0001f600" * 1_000_000):
        got = server.generate(model, text_input=text)
        assert "characters" in str(got.error)
        assert str(got.error).endswith(" [invalid]")


def test_costly_requests_hold_up_neither_health_nor_cheap_ones(server: RunningServer) -> None:
    """While they are read, each in a tenth of a second or so, what costs nothing is answered before the last."""
    costly = {"guided_json": {"type": "object", "properties": {f"f{i}": {"type": "string"} for i in range(300)}}}
    with server.stream() as stream:
        for number in range(20):
            options = costly | {"max_tokens": 1, "seed": number}
            stream.send(f"grammar {number}", text_input=PROMPT, sampling_parameters=options)
            stream.send(f"text {number}", text_input="word " * 60_000)
        finished = threading.Event()
        reader = threading.Thread(target=lambda: (stream.finish(), finished.set()))
        reader.start()
        answered = 0
        while not finished.is_set() and answered < 5:
            assert server.control("health").json()["text_output"] == "ok"
            assert server.generate(text_input=PROMPT, sampling_parameters=GREEDY).error is None
            answered += not finished.is_set()
        reader.join()
    assert answered
    for name, generation in stream.generations.items():
        assert (generation.error is None) == name.startswith("grammar"), name
    server.wait_idle()


@pytest.mark.parametrize("text", ["word " * 60_000, PROMPT], ids=["in the intake", "in the engine"])
def test_a_cancel_finds_a_request_wherever_it_is(server: RunningServer, text: str) -> None:
    with server.stream() as blockers, server.stream() as stream:
        for number in range(20):
            blockers.send(str(number), text_input="word " * 60_000)
        stream.send("find me", text_input=text, sampling_parameters={"max_tokens": 4000, "ignore_eos": True})
        while server.control("cancel:find me").status_code != 200 and stream.is_silent:
            pass
        (got,) = stream.finish().values()
        assert str(got.error).endswith(("[cancelled]", "[invalid]"))  # or it was refused before the cancel came
        blockers.finish()
    server.wait_idle()
