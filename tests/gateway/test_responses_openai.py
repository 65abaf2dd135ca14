"""The official OpenAI client's Responses API against a real gateway in front of a real Triton."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from helpers.gateway import MODEL, RunningGateway
from helpers.responses import reduced, without_ids
from helpers.triton import RunningServer

CHAT = "Name three fruits."
TOOL: Any = {
    "type": "function",
    "name": "add",
    "description": "Adds two numbers.",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {"a": {"type": "integer", "maximum": 99}, "b": {"type": "integer", "maximum": 99}},
        "required": ["a", "b"],
        "additionalProperties": False,
    },
}
GREEDY: Any = {"model": MODEL, "temperature": 0}


class Fruit(BaseModel):
    name: str
    is_sweet: bool


@pytest.fixture(scope="module")
def gateway(model_dir: Path, server: RunningServer) -> Iterator[RunningGateway]:
    with RunningGateway(model_dir, server) as running:
        yield running


@pytest.mark.parametrize(
    "fields",
    [
        {"input": CHAT, "max_output_tokens": 24},
        {"input": CHAT, "max_output_tokens": 24, "instructions": "Answer in one word."},
        {"input": CHAT, "max_output_tokens": 8, "include": ["message.output_text.logprobs"], "top_logprobs": 2},
        {"input": "Add 2 and 3.", "tools": [TOOL], "tool_choice": "required", "max_output_tokens": 96},
        {"input": "Add 2 and 3.", "tools": [TOOL], "max_output_tokens": 24},
    ],
)
def test_a_stream_makes_the_whole_answer(gateway: RunningGateway, fields: dict[str, Any]) -> None:
    whole = gateway.openai.responses.create(**GREEDY, **fields).to_dict()
    events = [event.to_dict() for event in gateway.openai.responses.create(**GREEDY, **fields, stream=True)]
    assert without_ids(reduced(events)) == without_ids(whole["output"])
    last = events[-1]["response"]
    for response in (whole, last):
        response["completed_at"] = None
        response["usage"].pop("input_tokens_details")  # the second one finds the prompt of the first in the KV cache
    assert without_ids(last) == without_ids(whole)
    assert events[-1]["type"] == f"response.{whole['status']}"


def test_an_answer_is_that_of_a_chat(gateway: RunningGateway) -> None:
    chat = gateway.openai.chat.completions.create(
        **GREEDY,
        max_tokens=16,
        messages=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": CHAT}],
    )
    made = gateway.openai.responses.create(**GREEDY, max_output_tokens=16, instructions="Be brief.", input=CHAT)
    assert made.output_text == chat.choices[0].message.content
    assert (made.usage.input_tokens, made.usage.output_tokens) == (
        chat.usage.prompt_tokens,
        chat.usage.completion_tokens,
    )


def test_a_conversation_goes_on_by_the_id_as_by_its_items(gateway: RunningGateway) -> None:
    client = gateway.openai.responses
    first = client.create(**GREEDY, input=CHAT, max_output_tokens=12)
    by_id = client.create(**GREEDY, input="Now two colours.", previous_response_id=first.id, max_output_tokens=12)
    items: list[Any] = [
        {"role": "user", "content": CHAT},
        *first.output,
        {"role": "user", "content": "Now two colours."},
    ]
    by_items = client.create(**GREEDY, input=items, max_output_tokens=12, store=False)
    assert by_id.output_text == by_items.output_text
    assert by_id.usage.input_tokens == by_items.usage.input_tokens > first.usage.input_tokens
    assert [item.role for item in client.input_items.list(by_id.id, order="asc")] == ["user", "assistant", "user"]
    assert client.retrieve(by_id.id) == by_id
    client.delete(by_id.id)


def test_a_call_and_its_output(gateway: RunningGateway) -> None:
    client = gateway.openai.responses
    first = client.create(**GREEDY, input="Add 2 and 3.", tools=[TOOL], tool_choice={"type": "function", "name": "add"})
    (call,) = first.output
    assert (call.type, call.name, first.status) == ("function_call", "add", "completed")
    assert set(json.loads(call.arguments)) == {"a", "b"}
    output: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "5"}
    by_id = client.create(
        **GREEDY, input=[output], previous_response_id=first.id, tools=[TOOL], tool_choice="none", max_output_tokens=16
    )
    items: list[Any] = [{"role": "user", "content": "Add 2 and 3."}, call, output]
    by_items = client.create(**GREEDY, input=items, tools=[TOOL], tool_choice="none", max_output_tokens=16)
    assert by_id.output_text == by_items.output_text != ""


def test_structured_output_is_parsed_whole_and_streamed(gateway: RunningGateway) -> None:
    fields: Any = {**GREEDY, "input": "Describe a fruit.", "text_format": Fruit}
    parsed = gateway.openai.responses.parse(**fields).output_parsed
    assert isinstance(parsed, Fruit)
    with gateway.openai.responses.stream(**fields) as stream:
        snapshots = [event.snapshot for event in stream if event.type == "response.output_text.delta"]
        assert stream.get_final_response().output_parsed == parsed
    assert Fruit.model_validate_json(snapshots[-1]) == parsed


def test_the_client_s_stream_grows_a_call(gateway: RunningGateway) -> None:
    with gateway.openai.responses.stream(
        **GREEDY, input="Add 2 and 3.", tools=[TOOL], tool_choice="required", parallel_tool_calls=False
    ) as stream:
        snapshots = [event.snapshot for event in stream if event.type == "response.function_call_arguments.delta"]
        (call,) = stream.get_final_response().output
    assert call.type == "function_call"
    assert snapshots[-1] == call.arguments


def test_cancelling_stops_the_engine(gateway: RunningGateway, server: RunningServer) -> None:
    server.wait_idle()
    before = server.metric("generated_tokens_total")
    stream = gateway.openai.responses.create(
        **GREEDY, input=CHAT, max_output_tokens=3000, stream=True, extra_body={"ignore_eos": True}
    )
    created = next(stream)
    assert gateway.openai.responses.cancel(created.response.id).status == "cancelled"
    *_, last = stream
    assert last.response.status == "cancelled"
    server.wait_idle()
    assert server.metric("generated_tokens_total") - before < 2000
