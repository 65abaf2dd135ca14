"""Responses of the gateway without a server: answers of scripted texts, and what a client makes of their events."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import msgspec

from helpers.answers import context_of
from tidewright.tokenization import Tokenizer
from tidewright_gateway.config.api import ApiSettings
from tidewright_gateway.openai.dialect import Dialect
from tidewright_gateway.openai.parsing import parse
from tidewright_gateway.openai.prompts import Prompts
from tidewright_gateway.openai.rendering import Events, WholeAnswer
from tidewright_gateway.openai.responses.answer import ResponsesAnswer
from tidewright_gateway.openai.responses.description import Description
from tidewright_gateway.openai.responses.request import ResponsesRequest
from tidewright_gateway.openai.responses.translation import input_items, to_chat
from tidewright_gateway.replicas.triton import Reply

TOOL = {
    "type": "function",
    "name": "add",
    "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}},
}


def parsed(**fields: Any) -> ResponsesRequest:
    return parse(ResponsesRequest, json.dumps({"model": "m", "input": "Hi", **fields}).encode(), 1000)


def answer_of(tokenizer: Tokenizer, *, thinks: bool = False, **fields: Any) -> ResponsesAnswer:
    """Of a request with these fields. `thinks`: the model reasons between <think> and </think>."""
    body = parsed(**fields)
    prompts = Prompts(tokenizer, Dialect(tokenizer, ApiSettings(reasoning="think" if thinks else "none")))
    description = Description.of(body, {}, is_stored=True)
    return ResponsesAnswer(context_of(), to_chat(body, input_items(body)), prompts, description, None)


def replies_of(pieces: Sequence[str], finish_reason: str = "stop", *, logprobs: bool = False) -> list[Reply]:
    """One for each piece, of which each character is a token."""
    found = []
    for number, piece in enumerate(pieces):
        entries = [{"7": {"logprob": -0.5, "rank": 1, "decoded_token": character}} for character in piece]
        reason = finish_reason if number == len(pieces) - 1 else None
        ids = [7] * len(piece)
        found.append(Reply(piece, ids, reason, msgspec.json.encode(entries) if logprobs else None))
    return found


def whole(answer: ResponsesAnswer, replies: Sequence[Reply]) -> dict[str, Any]:
    made = WholeAnswer(answer, 1)
    for reply in replies:
        answer._context.take(0, reply)
        made.take(0, reply)
    found: dict[str, Any] = json.loads(made.body())
    return found


def streamed(answer: ResponsesAnswer, replies: Sequence[Reply]) -> list[dict[str, Any]]:
    events, written = Events(answer, 1), b""
    for reply in replies:
        answer._context.take(0, reply)
        written += events.take(0, reply)
    return events_in(written)


def events_in(written: bytes) -> list[dict[str, Any]]:
    """The data of server-sent events, each of which is named by its type."""
    found = []
    for block in written.decode().split("\n\n"):
        if not block or block.startswith(":"):
            continue
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        found.append(event)
    return found


def reduced(events: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The output, as a client grows it; checks that each event is where it may be, and agrees with those before it."""
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    output: list[dict[str, Any]] = []
    open_item: dict[str, Any] | None = None
    open_part: dict[str, Any] | None = None
    text_done = False
    for event in events[2:-1]:
        kind = event["type"].removeprefix("response.")
        if kind == "error":
            continue
        if kind == "output_item.added":
            assert open_item is None
            open_item = event["item"]
            assert open_item["status"] == "in_progress"
            assert event["output_index"] == len(output)
            text_done = False
            continue
        assert open_item is not None
        assert event["output_index"] == len(output)
        if kind == "output_item.done":
            assert open_part is None
            final = event["item"]
            grown = {**open_item, "status": final["status"]}
            assert final == grown
            output.append(final)
            open_item = None
            continue
        assert event["item_id"] == open_item["id"]
        if kind.startswith("function_call_arguments."):
            assert open_item["type"] == "function_call"
            if kind.endswith(".delta"):
                open_item["arguments"] += event["delta"]
            else:
                assert event["arguments"] == open_item["arguments"]
            continue
        assert event["content_index"] == 0
        if kind == "content_part.added":
            assert open_part is None
            assert open_item["content"] == []
            open_part = event["part"]
            open_item["content"].append(open_part)
            continue
        assert open_part is not None
        if kind.endswith(".delta"):
            assert kind == f"{open_part['type']}.delta"
            assert not text_done
            open_part["text"] += event["delta"]
            if "logprobs" in open_part:
                open_part["logprobs"] += event["logprobs"]
        elif kind == "content_part.done":
            assert text_done
            assert event["part"]["text"] == open_part["text"]
            open_part.update(event["part"])
            open_part = None
        else:
            assert kind == f"{open_part['type']}.done"
            assert event["text"] == open_part["text"]
            text_done = True
    assert open_item is None
    assert events[-1]["response"]["output"] == output
    return output


def without_ids(value: Any) -> Any:
    """What two responses to one request have in common."""
    if isinstance(value, dict):
        return {key: without_ids(one) for key, one in value.items() if key not in ("id", "call_id", "created_at")}
    if isinstance(value, list):
        return [without_ids(one) for one in value]
    return value
