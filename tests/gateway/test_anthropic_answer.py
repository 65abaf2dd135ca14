"""Answers of Anthropic's Messages API: blocks, events and their order, stop reasons, errors; from scripted replies."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.answers import context_of
from helpers.anthropic import events_of, reduced, without_ids
from tidewright.tokenization import Tokenizer
from tidewright_gateway.anthropic.answer import MessagesAnswer
from tidewright_gateway.anthropic.protocol import MessagesRequest
from tidewright_gateway.anthropic.translation import chat_of
from tidewright_gateway.config.api import ApiSettings
from tidewright_gateway.context import RequestContext
from tidewright_gateway.openai.dialect import Dialect
from tidewright_gateway.openai.errors import ApiError
from tidewright_gateway.openai.rendering import Events, WholeAnswer
from tidewright_gateway.replicas.triton import Reply

TOOLS = [{"name": "f", "input_schema": {"type": "object"}}]
CALLS = (
    "<think>\nHm, é.\n</think>\n\nFirst <b>this</b>:"
    '<tool_call>\n{"name": "f", "arguments": {"a": "<é\\n>"}}\n</tool_call> then '
    '<tool_call>{"arguments": {}, "name": "f"}</tool_call>'
    '<tool_call>\n{"name": "f", "arguments": {"b": [1, {}]}}\n'
    "</tool_call>\nand that."
)
BLOCKS = [
    {"type": "thinking", "thinking": "Hm, é.", "signature": ""},
    {"type": "text", "text": "First <b>this</b>:"},
    {"type": "tool_use", "name": "f", "input": {"a": "<é\n>"}},
    {"type": "text", "text": " then"},
    {"type": "tool_use", "name": "f", "input": {}},
    {"type": "tool_use", "name": "f", "input": {"b": [1, {}]}},
    {"type": "text", "text": "\nand that."},
]


def answer_of(tokenizer: Tokenizer, context: RequestContext, reasoning: Any = "think", **fields: Any) -> MessagesAnswer:
    body = {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "Hi"}], **fields}
    request = chat_of(MessagesRequest.model_validate(body))
    return MessagesAnswer(context, request, Dialect(tokenizer, ApiSettings(reasoning=reasoning)))


def whole(tokenizer: Tokenizer, replies: Sequence[Reply], **fields: Any) -> dict[str, Any]:
    context = context_of(prompt=(1, 2, 3))
    made = WholeAnswer(answer_of(tokenizer, context, **fields), 1)
    for reply in replies:
        context.take(0, reply)
        made.take(0, reply)
    found: dict[str, Any] = json.loads(made.body())
    return found


def streamed(tokenizer: Tokenizer, replies: Sequence[Reply], **fields: Any) -> str:
    context = context_of(prompt=(1, 2, 3))
    made, written = Events(answer_of(tokenizer, context, **fields), 1), b""
    for reply in replies:
        context.take(0, reply)
        written += made.take(0, reply)
    assert made.are_all
    return written.decode()


def replies_of(text: str, cuts: Sequence[int]) -> list[Reply]:
    ends = sorted({min(cut, len(text)) for cut in cuts} | {len(text)})
    pieces = [text[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]
    return [
        Reply(piece, [7], "stop" if end == len(text) else None, None) for piece, end in zip(pieces, ends, strict=True)
    ]


@settings(max_examples=200, deadline=None)
@given(cuts=st.lists(st.integers(0, len(CALLS)), max_size=40))
def test_however_a_text_is_split_the_events_build_the_whole_answer(tokenizer: Tokenizer, cuts: list[int]) -> None:
    replies = replies_of(CALLS, cuts)
    found = without_ids(whole(tokenizer, replies, tools=TOOLS))
    assert found["content"] == BLOCKS
    assert found["stop_reason"] == "tool_use"
    assert without_ids(reduced(events_of(streamed(tokenizer, replies, tools=TOOLS)))) == found


def test_calls_have_ids_and_each_its_own(tokenizer: Tokenizer) -> None:
    content = reduced(events_of(streamed(tokenizer, replies_of(CALLS, []), tools=TOOLS)))["content"]
    assert len({block["id"] for block in content if block["type"] == "tool_use"}) == 3


def test_disabled_parallel_calls_leave_one(tokenizer: Tokenizer) -> None:
    choice = {"type": "auto", "disable_parallel_tool_use": True}
    replies = replies_of(CALLS, range(0, len(CALLS), 5))
    found = without_ids(whole(tokenizer, replies, tools=TOOLS, tool_choice=choice))
    assert [block["type"] for block in found["content"]].count("tool_use") == 1
    assert without_ids(reduced(events_of(streamed(tokenizer, replies, tools=TOOLS, tool_choice=choice)))) == found


@pytest.mark.parametrize("reasoning", ["think", "none"])
def test_without_tools_all_is_text(tokenizer: Tokenizer, reasoning: str) -> None:
    text = "<tool_call>\n{}</tool_call>"
    replies = replies_of(text, [3])
    found = whole(tokenizer, replies, reasoning=reasoning)
    assert found["content"] == [{"type": "text", "text": text}]
    assert reduced(events_of(streamed(tokenizer, replies, reasoning=reasoning))) == found
    assert whole(tokenizer, [Reply("", [], "stop", None)], reasoning=reasoning)["content"] == []


@pytest.mark.parametrize(
    ("finish_reason", "ended_at", "text", "reason", "sequence"),
    [
        ("stop", None, "a", "end_turn", None),
        ("stop", 2, "a", "end_turn", None),
        ("stop", "END", "a", "stop_sequence", "END"),
        ("stop", "the model's own", "a", "end_turn", None),
        ("length", None, "a", "max_tokens", None),
        ("timeout", None, "a", "max_tokens", None),
        ("stop", None, '<tool_call>{"name": "f", "arguments": {}}</tool_call>', "tool_use", None),
        ("length", None, '<tool_call>{"name": "f", "arguments": {"a', "max_tokens", None),
    ],
)
def test_stop_reasons(
    tokenizer: Tokenizer, finish_reason: str, ended_at: str | int | None, text: str, reason: str, sequence: str | None
) -> None:
    replies = [Reply(text, [1, 2], finish_reason, None, stop_reason=ended_at)]
    found = whole(tokenizer, replies, tools=TOOLS, stop_sequences=["END", "FIN"])
    assert (found["stop_reason"], found["stop_sequence"]) == (reason, sequence)
    assert found.get("ended_by") == ("timeout" if finish_reason == "timeout" else None)
    *_, (_, delta), _ = events_of(streamed(tokenizer, replies, tools=TOOLS, stop_sequences=["END", "FIN"]))
    assert delta["delta"] == {name: found[name] for name in found if name.startswith("stop_") or name == "ended_by"}


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ('{"a": 1, "b": [1, 2', {"a": 1, "b": [1, 2]}),
        ('{"a": 1, "b": "x', {"a": 1}),
        ("{", {}),
        ('{"a": NaN}', {}),
        ('{"a": 123456789012345678901234567890}', {"a": 123456789012345678901234567890}),
    ],
)
def test_arguments_that_end_early_are_those_that_there_are(
    tokenizer: Tokenizer, arguments: str, found: dict[str, Any]
) -> None:
    text = f'<tool_call>\n{{"name": "f", "arguments": {arguments}'
    (call,) = whole(tokenizer, [Reply(text, [1], "length", None)], tools=TOOLS)["content"]
    assert call["input"] == found


def test_usage_tells_prompt_cached_answer_and_thinking(tokenizer: Tokenizer) -> None:
    replies = [Reply("<think>hm", [1, 2], None, None, num_cached_tokens=2), Reply("</think>a", [3], "stop", None)]
    usage = {
        "input_tokens": 1,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 2,
        "output_tokens": 3,
        "output_tokens_details": {"thinking_tokens": 2},
    }
    assert whole(tokenizer, replies)["usage"] == usage
    (_, start), *_, (_, delta), _ = events_of(streamed(tokenizer, replies))
    assert delta["usage"] == usage
    assert (start["message"]["usage"]["input_tokens"], start["message"]["usage"]["cache_read_input_tokens"]) == (1, 2)


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (403, "permission_error"),
        (404, "not_found_error"),
        (405, "invalid_request_error"),
        (413, "request_too_large"),
        (429, "rate_limit_error"),
        (500, "api_error"),
        (503, "overloaded_error"),
    ],
)
def test_an_error_in_a_stream_is_an_event(tokenizer: Tokenizer, status: int, kind: str) -> None:
    answer = answer_of(tokenizer, context_of())
    ((name, data),) = events_of(answer.failure(ApiError(status, "why", code="word")).decode())
    error = {"type": kind, "message": "why", "details": {"error_code": "word"}}
    assert (name, data) == ("error", {"type": "error", "error": error, "request_id": "id"})
