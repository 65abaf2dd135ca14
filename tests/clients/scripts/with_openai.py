"""OpenAI's own client: chat, completions, structured output, tools and the Responses API."""

from __future__ import annotations

from typing import Any

import openai
from checks import (
    API_KEY,
    BASE_URL,
    CITY_QUESTION,
    MAX_TOKENS,
    MESSAGES,
    MODEL,
    QUESTION,
    Fruit,
    Weather,
    assert_order,
    refused,
    run,
)
from openai import AsyncOpenAI, OpenAI

client = OpenAI(base_url=BASE_URL, api_key=API_KEY, max_retries=0)
GREEDY: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_tokens": MAX_TOKENS}
COUNTS = {"prompt_tokens", "completion_tokens", "total_tokens"}
# The model is too small to end a list of calls by itself.
ONE_CALL: dict[str, Any] = {**GREEDY, "max_tokens": 128, "parallel_tool_calls": False}
TOOL = openai.pydantic_function_tool(Weather, name="get_weather", description="The weather in a city.")
ASK_CITY: Any = [{"role": "user", "content": CITY_QUESTION}]
RESPONSES_TOOL: Any = {"type": "function", **TOOL["function"]}
RESPONSE: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_output_tokens": MAX_TOKENS}


def chat() -> None:
    whole = client.chat.completions.create(messages=MESSAGES, **GREEDY)
    assert whole.object == "chat.completion"
    assert whole.choices[0].message.content
    assert whole.choices[0].finish_reason in ("stop", "length")
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    pieces = list(
        client.chat.completions.create(messages=MESSAGES, stream=True, stream_options={"include_usage": True}, **GREEDY)
    )
    assert len({piece.id for piece in pieces}) == 1
    assert pieces[0].choices[0].delta.role == "assistant"
    text = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
    assert text == whole.choices[0].message.content
    (usage,) = (piece.usage for piece in pieces if piece.usage)
    assert usage.model_dump(include=COUNTS) == whole.usage.model_dump(include=COUNTS)
    sampled = {**GREEDY, "temperature": 1, "seed": 7}
    texts = {client.chat.completions.create(messages=MESSAGES, **sampled).choices[0].message.content for _ in range(2)}
    assert len(texts) == 1


def chat_stream_helper() -> None:
    with client.chat.completions.stream(messages=MESSAGES, **GREEDY) as stream:
        events = list(stream)
        completion = stream.get_final_completion()
    kinds = [event.type for event in events if event.type != "chunk"]
    assert_order(kinds, "content.delta", "content.done", repeated=lambda kind: kind == "content.delta")
    text = "".join(event.delta for event in events if event.type == "content.delta")
    assert text == completion.choices[0].message.content == events[-1 - (events[-1].type == "chunk")].content
    whole = client.chat.completions.create(messages=MESSAGES, **GREEDY)
    assert text == whole.choices[0].message.content


async def chat_async() -> None:
    async with AsyncOpenAI(base_url=BASE_URL, api_key=API_KEY, max_retries=0) as asynchronous:
        whole = await asynchronous.chat.completions.create(messages=MESSAGES, **GREEDY)
        stream = await asynchronous.chat.completions.create(messages=MESSAGES, stream=True, **GREEDY)
        text = "".join([piece.choices[0].delta.content or "" async for piece in stream])
        assert text == whole.choices[0].message.content
        assert [model.id async for model in asynchronous.models.list()] == [MODEL]


def completions() -> None:
    options: dict[str, Any] = {"prompt": "The sea is", **GREEDY, "logprobs": 2}
    whole = client.completions.create(**options).choices[0]
    assert "".join(whole.logprobs.tokens) == whole.text
    assert all(len(top) == 2 for top in whole.logprobs.top_logprobs)
    pieces = list(client.completions.create(stream=True, **options))
    assert "".join(piece.choices[0].text for piece in pieces) == whole.text
    several = client.completions.create(**{**options, "prompt": ["The sea is", "The sky is"], "n": 2, "seed": 1})
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]


def errors() -> None:
    for change, kind in (({"model": "none"}, openai.NotFoundError), ({"temperature": -1}, openai.BadRequestError)):
        for stream in (False, True):
            asked = {**GREEDY, "messages": MESSAGES, "stream": stream, **change}
            error = refused(kind, client.chat.completions.create, **asked)
            assert error.body["message"]
            assert error.request_id


def parse() -> None:
    options: dict[str, Any] = {**GREEDY, "max_tokens": 64, "messages": MESSAGES, "response_format": Fruit}
    message = client.chat.completions.parse(**options).choices[0].message
    assert isinstance(message.parsed, Fruit)
    with client.chat.completions.stream(**options) as stream:
        done = [event for event in stream if event.type == "content.done"]
    assert [event.parsed for event in done] == [message.parsed]
    assert stream.get_final_completion().choices[0].message.parsed == message.parsed


def tools() -> None:
    options: dict[str, Any] = {**ONE_CALL, "tools": [TOOL], "tool_choice": "required"}
    whole = client.chat.completions.create(messages=ASK_CITY, **options).choices[0]
    assert whole.finish_reason == "tool_calls"
    calls = whole.message.tool_calls
    assert len({call.id for call in calls}) == len(calls) > 0
    for call in calls:
        assert (call.type, call.function.name) == ("function", "get_weather")
        assert Weather.model_validate_json(call.function.arguments)

    streamed: dict[int, dict[str, str]] = {}
    reasons = []
    for piece in client.chat.completions.create(messages=ASK_CITY, stream=True, **options):
        reasons.append(piece.choices[0].finish_reason)
        for delta in piece.choices[0].delta.tool_calls or []:
            if delta.index not in streamed:  # id and name come once, with the first delta
                assert (delta.type, bool(delta.id)) == ("function", True)
                streamed[delta.index] = {"name": delta.function.name, "arguments": ""}
            else:
                assert not delta.id
            streamed[delta.index]["arguments"] += delta.function.arguments or ""
    assert list(streamed.values()) == [call.function.model_dump(include={"name", "arguments"}) for call in calls]
    assert reasons[-1] == "tool_calls"
    assert set(reasons[:-1]) == {None}

    results = [{"role": "tool", "tool_call_id": call.id, "content": "4 degrees"} for call in calls]
    history = [*ASK_CITY, whole.message, *results]
    answer = client.chat.completions.create(messages=history, tools=[TOOL], tool_choice="none", **GREEDY).choices[0]
    assert answer.message.content
    assert not answer.message.tool_calls


def tool_choices() -> None:
    other = {"type": "function", "function": {"name": "get_time", "parameters": {"type": "object", "properties": {}}}}
    options: dict[str, Any] = {**GREEDY, "max_tokens": 128, "tools": [TOOL, other], "messages": ASK_CITY}
    named = {"type": "function", "function": {"name": "get_weather"}}
    (call,) = client.chat.completions.create(tool_choice=named, **options).choices[0].message.tool_calls
    assert call.function.name == "get_weather"
    assert Weather.model_validate_json(call.function.arguments)
    several = client.chat.completions.create(tool_choice="required", **options).choices[0]
    assert several.message.tool_calls
    assert {call.function.name for call in several.message.tool_calls} <= {"get_weather", "get_time"}
    none = client.chat.completions.create(tool_choice="none", **options).choices[0]
    assert not none.message.tool_calls
    auto = client.chat.completions.create(tool_choice="auto", **options).choices[0]
    assert auto.finish_reason in ("stop", "length", "tool_calls")
    unknown = {"type": "function", "function": {"name": "nothing"}}
    refused(openai.BadRequestError, client.chat.completions.create, tool_choice=unknown, **options)


def tools_parse() -> None:
    options: dict[str, Any] = {**ONE_CALL, "tools": [TOOL], "tool_choice": "required"}
    message = client.chat.completions.parse(messages=ASK_CITY, **options).choices[0].message
    assert all(isinstance(call.function.parsed_arguments, Weather) for call in message.tool_calls)
    with client.chat.completions.stream(messages=ASK_CITY, **options) as stream:
        events = list(stream)
    pieces = [event for event in events if event.type == "tool_calls.function.arguments.delta"]
    done = [event for event in events if event.type == "tool_calls.function.arguments.done"]
    assert [event.parsed_arguments for event in done] == [call.function.parsed_arguments for call in message.tool_calls]
    assert "".join(event.arguments_delta for event in pieces) == "".join(event.arguments for event in done)


def responses() -> None:
    whole = client.responses.create(input=QUESTION, **RESPONSE)
    assert whole.id.startswith("resp_")
    assert (whole.object, whole.output[0].type, whole.output[0].role) == ("response", "message", "assistant")
    assert whole.status in ("completed", "incomplete")
    if whole.status == "incomplete":
        assert whole.incomplete_details.reason == "max_output_tokens"
    assert whole.output_text
    assert whole.usage.total_tokens == whole.usage.input_tokens + whole.usage.output_tokens

    events = list(client.responses.create(input=QUESTION, stream=True, **RESPONSE))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert_order(
        [event.type for event in events],
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        f"response.{whole.status}",
        repeated=lambda kind: kind == "response.output_text.delta",
    )
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    (done,) = (event for event in events if event.type == "response.output_text.done")
    assert text == done.text == events[-1].response.output_text == whole.output_text
    assert len({event.item_id for event in events if event.type.startswith("response.output_text")}) == 1
    assert events[-1].response.usage.total_tokens == whole.usage.total_tokens

    with client.responses.stream(input=QUESTION, **RESPONSE) as stream:
        assert stream.until_done().get_final_response().output_text == text


def responses_previous() -> None:
    first = client.responses.create(input=QUESTION, instructions="Be short.", **RESPONSE)
    assert client.responses.retrieve(first.id).output_text == first.output_text
    second = client.responses.create(input="Another one.", previous_response_id=first.id, **RESPONSE)
    assert second.previous_response_id == first.id
    assert second.usage.input_tokens > first.usage.input_tokens
    history: Any = [
        {"role": "user", "content": QUESTION},
        *first.output,
        {"role": "user", "content": "Another one."},
    ]
    assert client.responses.create(input=history, **RESPONSE).output_text == second.output_text
    client.responses.delete(first.id)
    again = {**RESPONSE, "input": "Another one.", "previous_response_id": first.id}
    assert refused(openai.APIStatusError, client.responses.create, **again).status_code in (400, 404)


def responses_parse() -> None:
    options: dict[str, Any] = {**RESPONSE, "max_output_tokens": 64, "input": QUESTION, "text_format": Fruit}
    whole = client.responses.parse(**options)
    assert isinstance(whole.output_parsed, Fruit)
    with client.responses.stream(**options) as stream:
        assert stream.until_done().get_final_response().output_parsed == whole.output_parsed


def responses_tools() -> None:
    options: dict[str, Any] = {**RESPONSE, "max_output_tokens": 128, "tools": [RESPONSES_TOOL]}
    options["parallel_tool_calls"] = False
    asked: Any = {**options, "tool_choice": "required", "input": CITY_QUESTION}
    whole = client.responses.create(**asked)
    calls = [item for item in whole.output if item.type == "function_call"]
    assert calls
    for call in calls:
        assert call.name == "get_weather"
        assert call.call_id
        assert Weather.model_validate_json(call.arguments)
    events = list(client.responses.create(stream=True, **asked))
    done = [event for event in events if event.type == "response.function_call_arguments.done"]
    assert [event.arguments for event in done] == [call.arguments for call in calls]
    pieces = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    assert "".join(pieces) == "".join(call.arguments for call in calls)
    results: Any = [{"type": "function_call_output", "call_id": call.call_id, "output": "4 degrees"} for call in calls]
    answer = client.responses.create(previous_response_id=whole.id, input=results, tool_choice="none", **options)
    assert answer.output_text
    history: Any = [{"role": "user", "content": CITY_QUESTION}, *whole.output, *results]
    assert client.responses.create(input=history, tool_choice="none", **options).output_text == answer.output_text
    assert whole.tool_choice == "required"


if __name__ == "__main__":
    run(globals())
