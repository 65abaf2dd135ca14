"""Tools through the whole stack: the embedded model calls what it must, with arguments that follow the schema."""

# ruff: noqa: E501 - the cases are a table
from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest

from benchmarks.tool_schemas import SCHEMAS
from helpers.gateway import MODEL, RunningGateway
from helpers.triton import RunningServer

ASK = [{"role": "user", "content": "What is the weather in Paris?"}]
CITY = {"type": "object", "properties": {"city": {"enum": ["Paris", "Köln"]}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": CITY}}
CLOCK = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture(scope="module")
def gateway(model_dir: Path, server: RunningServer) -> Iterator[RunningGateway]:
    with RunningGateway(model_dir, server) as running:
        yield running


def ask(gateway: RunningGateway, **fields: Any) -> Any:
    return gateway.openai.chat.completions.create(**{"model": MODEL, "messages": ASK, "max_tokens": 200, **fields})


def joined(pieces: Any) -> tuple[list[dict[str, str]], str, str]:
    """Calls, text and finish reason of a stream."""
    calls: list[dict[str, str]] = []
    text = reason = ""
    for piece in pieces:
        for choice in piece.choices:
            text += choice.delta.content or ""
            reason = choice.finish_reason or reason
            for call in choice.delta.tool_calls or ():
                if call.id:
                    assert call.index == len(calls)
                    calls.append({"name": call.function.name, "arguments": ""})
                calls[call.index]["arguments"] += call.function.arguments or ""
    return calls, text, reason


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_forced_call_follows_its_schema(gateway: RunningGateway, name: str) -> None:
    schema = SCHEMAS[name]
    tool = {"type": "function", "function": {"name": "act", "parameters": schema}}
    options = {"tools": [tool, CLOCK], "tool_choice": {"type": "function", "function": {"name": "act"}}, "seed": 1}
    whole = ask(gateway, **options, max_tokens=2000).choices[0]
    (call,) = whole.message.tool_calls
    assert call.function.name == "act"
    jsonschema_rs.validator_for(schema).validate(json.loads(call.function.arguments))
    assert whole.finish_reason == "tool_calls"
    assert whole.message.content is None
    streamed = joined(ask(gateway, **options, max_tokens=2000, stream=True))
    assert streamed == ([{"name": "act", "arguments": call.function.arguments}], "", "tool_calls")


def test_required_is_one_of_the_tools(gateway: RunningGateway) -> None:
    for seed in range(4):
        options = {"tools": [WEATHER, CLOCK], "tool_choice": "required", "parallel_tool_calls": False, "seed": seed}
        (call,) = ask(gateway, **options).choices[0].message.tool_calls
        assert (call.function.name, call.function.arguments) in [
            ("weather", '{"city": "Paris"}'),
            ("weather", '{"city": "Köln"}'),
            ("clock", "{}"),
        ]


def test_a_result_goes_back_to_the_model(gateway: RunningGateway) -> None:
    first = ask(gateway, tools=[WEATHER], tool_choice="required", parallel_tool_calls=False).choices[0].message
    result = {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": "It is 22 degrees and sunny."}
    again = ask(gateway, messages=[*ASK, first.model_dump(), result], tools=[WEATHER], temperature=0).choices[0]
    assert "22" in again.message.content
    assert again.finish_reason == "stop"


def test_without_a_call_the_answer_is_that_of_text(gateway: RunningGateway) -> None:
    whole = ask(gateway, tools=[WEATHER], temperature=0, max_tokens=30).choices[0]
    calls, text, reason = joined(ask(gateway, tools=[WEATHER], temperature=0, max_tokens=30, stream=True))
    assert (calls, text, reason) == ([], whole.message.content, whole.finish_reason)


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"type": "object", "properties": {"a": {"$ref": "#/nowhere"}}}, "'/nowhere' does not exist"),
        ({"type": "object", "properties": {"a": {"type": "integer", "minimum": 5, "maximum": 3}}, "required": ["a"]}, "Unsatisfiable"),
        ({"type": "object", "properties": {"a": {"type": "number", "pattern": "("}}, "required": 5}, "parameters: "),
    ],
)  # fmt: skip
def test_a_schema_that_nothing_follows_is_refused(gateway: RunningGateway, parameters: Any, said: str) -> None:
    tool = {"type": "function", "function": {"name": "act", "parameters": parameters}}
    body = {"model": MODEL, "messages": ASK, "tools": [tool], "tool_choice": "required", "max_tokens": 5}
    answer = gateway.post("/v1/chat/completions", body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "tools.0.function.parameters")
    assert said in error["message"]
    assert "x-guidance" not in error["message"]
