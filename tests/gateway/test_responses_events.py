"""Events of a response's stream: their order, what a client makes of them, and that it is what a whole answer says."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.responses import TOOL, answer_of, events_in, reduced, replies_of, streamed, whole, without_ids
from tidewright.tokenization import Tokenizer
from tidewright_gateway.openai.errors import ApiError
from tidewright_gateway.openai.rendering import Events
from tidewright_gateway.replicas.triton import Reply

CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>'


def kinds(events: list[dict[str, Any]]) -> list[str]:
    """Types of events without `response.`, those that repeat each other once."""
    found: list[str] = []
    for event in events:
        kind = event["type"].removeprefix("response.")
        if not (found and kind == found[-1] and kind.endswith(".delta")):
            found.append(kind)
    return found


def texts(output: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [
        (item["type"], item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"])
        for item in output
    ]


MESSAGE = ["output_item.added", "content_part.added", "output_text.delta", "output_text.done", "content_part.done"]
REASONING = [kind.replace("output_text", "reasoning_text") for kind in MESSAGE]
FUNCTION_CALL = ["output_item.added", "function_call_arguments.delta", "function_call_arguments.done"]
DONE = ["output_item.done"]


def test_the_events_of_a_text_are_in_the_documented_order(tokenizer: Tokenizer) -> None:
    events = streamed(answer_of(tokenizer, stream=True), replies_of(["Two ", "words"]))
    assert kinds(events) == ["created", "in_progress", *MESSAGE, *DONE, "completed"]
    assert texts(reduced(events)) == [("message", "Two words")]
    assert events[0]["response"]["status"] == "in_progress"
    assert events[0]["response"]["usage"] is None
    last = events[-1]["response"]
    assert (last["status"], last["incomplete_details"], last["error"]) == ("completed", None, None)
    assert last["usage"] == {
        "input_tokens": 1,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": 9,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 10,
    }


def test_reasoning_text_and_calls_are_items_one_after_the_other(tokenizer: Tokenizer) -> None:
    answer = answer_of(tokenizer, thinks=True, stream=True, tools=[TOOL])
    events = streamed(answer, replies_of(list(f"<think>\nHm.\n</think>\n\nLet me see. {CALL}\n{CALL}")))
    assert kinds(events) == [
        *("created", "in_progress"),
        *(*REASONING, *DONE),
        *(*MESSAGE, *DONE),
        *(*FUNCTION_CALL, *DONE),
        *(*FUNCTION_CALL, *DONE),
        "completed",
    ]
    output = reduced(events)
    assert texts(output) == [
        ("reasoning", "Hm."),
        ("message", "Let me see."),
        ("function_call", '{"a": 1, "b": 2}'),
        ("function_call", '{"a": 1, "b": 2}'),
    ]
    assert output[2]["name"] == "add"
    assert output[2]["call_id"] != output[3]["call_id"]
    assert events[-1]["response"]["usage"]["output_tokens_details"]["reasoning_tokens"] > 0


@pytest.mark.parametrize(
    ("text", "last"),
    [("Some wor", "message"), ('<tool_call>\n{"name": "add", "arguments": {"a": 1', "function_call")],
)
def test_what_max_output_tokens_cuts_is_incomplete(tokenizer: Tokenizer, text: str, last: str) -> None:
    events = streamed(answer_of(tokenizer, stream=True, tools=[TOOL]), replies_of([text], "length"))
    (item,) = reduced(events)
    assert (item["type"], item["status"]) == (last, "incomplete")
    assert events[-1]["type"] == "response.incomplete"
    assert events[-1]["response"]["status"] == "incomplete"
    assert events[-1]["response"]["incomplete_details"] == {"reason": "max_output_tokens"}


def test_an_answer_of_nothing_is_an_empty_message(tokenizer: Tokenizer) -> None:
    events = streamed(answer_of(tokenizer, stream=True), replies_of([""]))
    assert texts(reduced(events)) == [("message", "")]
    assert texts(whole(answer_of(tokenizer), replies_of([""]))["output"]) == [("message", "")]


def test_without_parallel_calls_the_second_one_is_dropped(tokenizer: Tokenizer) -> None:
    fields = {"tools": [TOOL], "parallel_tool_calls": False}
    events = streamed(answer_of(tokenizer, stream=True, **fields), replies_of([CALL + CALL]))
    assert [kind for kind, _ in texts(reduced(events))] == ["function_call"]


PARTS = st.sampled_from(["a word ", "<", "<tool_call>", CALL, "\n", "</think>", "<think>", '{"name"', "é中", " "])


@settings(max_examples=150, deadline=None)
@given(
    parts=st.lists(PARTS, min_size=1, max_size=8),
    cuts=st.lists(st.integers(0, 400), max_size=12),
    thinks=st.booleans(),
    tools=st.booleans(),
    logprobs=st.booleans(),
    reason=st.sampled_from(["stop", "length"]),
)
def test_a_stream_makes_the_whole_answer_however_it_is_split(
    tokenizer: Tokenizer, parts: list[str], cuts: list[int], thinks: bool, tools: bool, logprobs: bool, reason: str
) -> None:
    text = "".join(parts)
    edges = [0, *sorted({cut for cut in cuts if cut < len(text)}), len(text)]
    pieces = [text[start:end] for start, end in pairwise(edges)]
    fields: dict[str, Any] = {"tools": [TOOL]} if tools else {}
    if logprobs:
        fields["include"] = ["message.output_text.logprobs"]
    one = whole(answer_of(tokenizer, thinks=thinks, **fields), replies_of([text], reason, logprobs=logprobs))
    answer = answer_of(tokenizer, thinks=thinks, stream=True, **fields)
    events = streamed(answer, replies_of(pieces, reason, logprobs=logprobs))
    assert without_ids(reduced(events)) == without_ids(one["output"])
    last = events[-1]["response"]
    for response in (one, last):  # how much of the text is reasoning is counted by pieces
        response["usage"].pop("output_tokens_details")
        response["completed_at"] = None
    assert without_ids(last) == without_ids(one)


def test_log_probabilities_are_those_of_the_text(tokenizer: Tokenizer) -> None:
    fields = {"tools": [TOOL], "include": ["message.output_text.logprobs"], "top_logprobs": 1}
    events = streamed(answer_of(tokenizer, stream=True, **fields), replies_of([f"Sum: {CALL}"], logprobs=True))
    message, _ = reduced(events)
    entries = message["content"][0]["logprobs"]
    assert "".join(entry["token"] for entry in entries) == "Sum:"
    assert entries[0]["top_logprobs"] == [{key: entries[0][key] for key in ("token", "logprob", "bytes")}]
    plain = streamed(answer_of(tokenizer, stream=True), replies_of(["Sum"], logprobs=True))
    assert reduced(plain)[0]["content"][0]["logprobs"] == []


def failed(tokenizer: Tokenizer, error: ApiError, *, cancelled: bool = False) -> list[dict[str, Any]]:
    answer = answer_of(tokenizer, stream=True)
    written = Events(answer, 1).take(0, Reply("Some", [1], None, None))
    if cancelled:
        answer.cancel()
    return events_in(written + answer.failure(error))


def test_a_stream_that_fails_says_so_with_what_there_is(tokenizer: Tokenizer) -> None:
    events = failed(tokenizer, ApiError(503, "the engine is gone", code="engine_failed"))
    assert (events[-2]["type"], events[-1]["type"]) == ("error", "response.failed")
    assert events[-2] == {
        "type": "error",
        "sequence_number": events[-2]["sequence_number"],
        "code": "engine_failed",
        "message": "the engine is gone",
        "param": None,
    }
    response = events[-1]["response"]
    assert (response["status"], response["error"]) == (
        "failed",
        {"code": "server_error", "message": "the engine is gone"},
    )
    (item,) = reduced(events)
    assert item["status"] == "incomplete"


def test_a_stream_that_is_cancelled_ends_as_incomplete(tokenizer: Tokenizer) -> None:
    events = failed(tokenizer, ApiError(499, "cancelled", code="cancelled"), cancelled=True)
    assert events[-1]["type"] == "response.incomplete"
    response = events[-1]["response"]
    assert (response["status"], response["error"], response["incomplete_details"]) == ("cancelled", None, None)
    assert texts(reduced(events)) == [("message", "Some")]


def test_a_failure_before_the_first_token_fails_a_response_as_well(tokenizer: Tokenizer) -> None:
    answer = answer_of(tokenizer, stream=True)
    answer.choice(0, is_streamed=True)
    events = events_in(answer.failure(ApiError(400, "max_tokens is wrong", code="invalid", param="max_tokens")))
    assert kinds(events) == ["created", "in_progress", "error", "failed"]
    assert (events[2]["message"], events[2]["param"]) == ("max_output_tokens is wrong", "max_output_tokens")
    assert reduced(events) == []


def test_the_object_says_what_was_asked(tokenizer: Tokenizer) -> None:
    fields = {
        "instructions": "Be short.",
        "tools": [TOOL],
        "tool_choice": {"type": "function", "name": "add"},
        "text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}}},
        "metadata": {"a": "b"},
        "temperature": 0,
        "max_output_tokens": 5,
        "user": "u",
        "reasoning": {"effort": "low"},
    }
    got = whole(answer_of(tokenizer, **fields), replies_of(["x"]))
    assert got["tools"] == [{**TOOL, "description": None, "strict": False}]
    assert got["text"] == {"format": fields["text"]["format"], "verbosity": "medium"}  # type: ignore[index]
    assert got["reasoning"] == {"effort": "low", "summary": None}
    assert {name: got[name] for name in fields if name not in ("tools", "text", "reasoning")} == {
        name: value for name, value in fields.items() if name not in ("tools", "text", "reasoning")
    }
    assert json.dumps(got)
    assert got["id"].startswith("resp_")
