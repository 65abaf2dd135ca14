"""Anthropic's client: messages, streams, tools, the count of tokens."""

from __future__ import annotations

from typing import Any

import anthropic
from anthropic import Anthropic
from checks import API_KEY, BASE_URL, CITY_QUESTION, MAX_TOKENS, MESSAGES, MODEL, Weather, assert_order, refused, run

client = Anthropic(base_url=BASE_URL.removesuffix("/v1"), api_key=API_KEY, max_retries=0)
# The client has no argument for the temperature any more.
GREEDY: dict[str, Any] = {"model": MODEL, "max_tokens": MAX_TOKENS, "extra_body": {"temperature": 0}}
TOOL: Any = {
    "name": "get_weather",
    "description": "The weather in a city.",
    "input_schema": Weather.model_json_schema(),
}
ASK_CITY: Any = [{"role": "user", "content": CITY_QUESTION}]
PER_BLOCK = ("content_block_start", "content_block_delta", "content_block_stop")


def messages() -> None:
    whole = client.messages.create(messages=MESSAGES, system="Be short.", **GREEDY)
    assert whole.id.startswith("msg_")
    assert (whole.type, whole.role, whole.model) == ("message", "assistant", MODEL)
    assert [block.type for block in whole.content] == ["text"]
    assert whole.stop_reason in ("end_turn", "max_tokens")
    assert whole.usage.input_tokens >= 0
    assert 0 < whole.usage.output_tokens <= MAX_TOKENS

    events = list(client.messages.create(messages=MESSAGES, system="Be short.", stream=True, **GREEDY))
    kinds = [event.type for event in events if event.type != "ping"]
    assert_order(
        kinds, "message_start", *PER_BLOCK, "message_delta", "message_stop", repeated="content_block_delta".__eq__
    )
    text = "".join(event.delta.text for event in events if event.type == "content_block_delta")
    assert text == whole.content[0].text
    (last,) = (event for event in events if event.type == "message_delta")
    assert last.delta.stop_reason == whole.stop_reason
    assert last.usage.output_tokens == whole.usage.output_tokens

    with client.messages.stream(messages=MESSAGES, system="Be short.", **GREEDY) as stream:
        assert "".join(stream.text_stream) == text
        assert stream.get_final_message().usage.output_tokens == whole.usage.output_tokens

    parts: Any = [{"role": "user", "content": [{"type": "text", "text": MESSAGES[0]["content"]}]}]
    system: Any = [{"type": "text", "text": "Be short."}]
    assert client.messages.create(messages=parts, system=system, **GREEDY).content == whole.content
    more = [*MESSAGES, {"role": "assistant", "content": whole.content}, {"role": "user", "content": "Another one."}]
    assert client.messages.create(messages=more, **GREEDY).content[0].text

    word = whole.content[0].text.split()[1]
    stopped = client.messages.create(messages=MESSAGES, system="Be short.", stop_sequences=[word], **GREEDY)
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", word)
    assert stopped.content[0].text == whole.content[0].text.partition(word)[0]


def count_tokens() -> None:
    for system in ({}, {"system": "Be short."}):
        counted = client.messages.count_tokens(model=MODEL, messages=MESSAGES, **system)
        whole = client.messages.create(messages=MESSAGES, **system, **GREEDY)
        usage = whole.usage  # whose input_tokens are those that came from no cache
        cached = (usage.cache_read_input_tokens or 0) + (usage.cache_creation_input_tokens or 0)
        assert counted.input_tokens == usage.input_tokens + cached


def errors() -> None:
    unknown = refused(anthropic.NotFoundError, client.messages.create, messages=MESSAGES, **{**GREEDY, "model": "none"})
    assert (unknown.body["type"], unknown.body["error"]["type"]) == ("error", "not_found_error")
    empty = refused(anthropic.BadRequestError, client.messages.create, messages=[], **GREEDY)
    assert empty.body["error"]["type"] == "invalid_request_error"


def tools() -> None:
    options: dict[str, Any] = {**GREEDY, "max_tokens": 128, "tools": [TOOL]}
    for kind in ({"type": "any"}, {"type": "tool", "name": "get_weather"}):
        choice: Any = {**kind, "disable_parallel_tool_use": True}  # the model is too small to end a list of calls
        whole = client.messages.create(messages=ASK_CITY, tool_choice=choice, **options)
        assert whole.stop_reason == "tool_use"
        calls = [block for block in whole.content if block.type == "tool_use"]
        assert len({call.id for call in calls}) == len(calls) > 0
        for call in calls:
            assert call.name == "get_weather"
            assert Weather.model_validate(call.input)

        with client.messages.stream(messages=ASK_CITY, tool_choice=choice, **options) as stream:
            events = [event for event in stream if event.type in (*PER_BLOCK, "message_delta")]
            final = stream.get_final_message()
        starts = [event.content_block for event in events if event.type == "content_block_start"]
        assert [start.type for start in starts] == [block.type for block in whole.content]
        assert [start.input for start in starts if start.type == "tool_use"] == [{}] * len(calls)
        assert [block.input for block in final.content if block.type == "tool_use"] == [call.input for call in calls]
        assert final.stop_reason == "tool_use"

        results = [{"type": "tool_result", "tool_use_id": call.id, "content": "4 degrees"} for call in calls]
        history = [*ASK_CITY, {"role": "assistant", "content": whole.content}, {"role": "user", "content": results}]
        answer = client.messages.create(messages=history, tool_choice={"type": "none"}, **options)
        assert [block.type for block in answer.content] == ["text"]


if __name__ == "__main__":
    run(globals())
