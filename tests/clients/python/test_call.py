"""What a call makes of the bytes of its answer, without I/O."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tidewright_client import Answer, Text, ToolCall, UnexpectedAnswer, settings
from tidewright_client.call import Call, Reader
from tidewright_client.requests import Request

MOST = 1000  # bytes


def reader() -> Reader:
    call = Call(settings.make("http://h", None, 0, None, 1, MOST, None), Request("chat", "/", {}, is_stream=True))
    made = call.begin(200, {"content-type": "text/event-stream"})
    assert isinstance(made, Reader)
    return made


def event(**delta: Any) -> bytes:
    chunk = {"id": "x" * 100, "object": "chat.completion.chunk", "choices": [{"index": 0, "delta": delta}]}
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


def call_of(index: int, arguments: str) -> bytes:
    return event(tool_calls=[{"index": index, "function": {"arguments": arguments}}])


def test_of_a_stream_its_text_is_bounded_and_not_what_is_around_it() -> None:
    one = reader()
    for number in range(MOST // 4):
        assert one.feed(event(content="\N{WATER WAVE}")) == [Text("\N{WATER WAVE}")], number  # four bytes
    assert one.error is None
    assert one.feed(b": keep-alive\n\n" * MOST) == []
    assert one.answer().text == "\N{WATER WAVE}" * (MOST // 4)
    assert one.feed(event(content="a")) == []
    assert isinstance(one.error, UnexpectedAnswer)
    assert f"more than {MOST} bytes" in one.error.message


def test_tool_calls_count_too_and_empty_ones_as_well() -> None:
    one = reader()
    for _ in range(9):
        assert one.feed(call_of(0, "x" * 100)) == [ToolCall(0, "", "", "x" * 100)]
    assert one.feed(call_of(0, "x" * 100)) == []
    assert isinstance(one.error, UnexpectedAnswer)
    many = reader()
    begun = sum(bool(many.feed(call_of(index, ""))) for index in range(MOST))
    assert begun < MOST // 50
    assert isinstance(many.error, UnexpectedAnswer)


def test_line_ends_in_a_text_stay_as_they_are() -> None:
    one = reader()
    one.feed(event(content="a\r\nb\rc\n"))
    assert one.answer() == Answer(text="a\r\nb\rc\n")


@pytest.mark.parametrize("count", ["1e999", "-1e999", "NaN", "[]", "{}", '"many"'])
def test_counts_that_are_none(count: str) -> None:
    one = reader()
    assert one.feed(b'data: {"choices": [], "usage": {"prompt_tokens": %s}}\n\n' % count.encode()) == []
    assert isinstance(one.error, UnexpectedAnswer)
    assert "token counts" in one.error.message
