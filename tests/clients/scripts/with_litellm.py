"""LiteLLM, which calls the server as an `openai/` model."""

from __future__ import annotations

import os
from typing import Any

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # or it fetches a table of prices when it is imported

import litellm
from checks import API_KEY, BASE_URL, CITY_QUESTION, MAX_TOKENS, MESSAGES, MODEL, QUESTION, Fruit, Weather, run

SERVER: dict[str, Any] = {"api_base": BASE_URL, "api_key": API_KEY, "num_retries": 0}
GREEDY: dict[str, Any] = {"model": f"openai/{MODEL}", "temperature": 0, "max_tokens": MAX_TOKENS, **SERVER}
RESPONSE: dict[str, Any] = {"model": f"openai/{MODEL}", "temperature": 0, "max_output_tokens": MAX_TOKENS, **SERVER}
PARAMETERS = Weather.model_json_schema()
ASK_CITY = [{"role": "user", "content": CITY_QUESTION}]


async def chat() -> None:
    whole = litellm.completion(messages=MESSAGES, **GREEDY)
    text = whole.choices[0].message.content
    assert text
    assert whole.usage.completion_tokens > 0
    pieces = list(litellm.completion(messages=MESSAGES, stream=True, stream_options={"include_usage": True}, **GREEDY))
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices) == text
    assert litellm.stream_chunk_builder(pieces, messages=MESSAGES).choices[0].message.content == text
    stream = await litellm.acompletion(messages=MESSAGES, stream=True, **GREEDY)
    assert "".join([piece.choices[0].delta.content or "" async for piece in stream]) == text
    more = [*MESSAGES, whole.choices[0].message, {"role": "user", "content": "Another one."}]
    assert litellm.completion(messages=more, **GREEDY).choices[0].message.content


def completions() -> None:
    options = {**GREEDY, "model": f"text-completion-openai/{MODEL}", "prompt": "The sea is"}
    whole = litellm.text_completion(**options)
    pieces = list(litellm.text_completion(**options, stream=True))
    assert "".join(piece.choices[0].text or "" for piece in pieces) == whole.choices[0].text


def structured() -> None:
    options = {**GREEDY, "max_tokens": 64, "messages": MESSAGES, "response_format": Fruit}
    whole = litellm.completion(**options).choices[0].message.content
    assert Fruit.model_validate_json(whole)
    pieces = litellm.completion(**options, stream=True)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == whole


def errors() -> None:
    for change, kind in (
        ({"model": "openai/none"}, litellm.NotFoundError),
        ({"temperature": -1}, litellm.BadRequestError),
    ):
        try:
            litellm.completion(messages=MESSAGES, **{**GREEDY, **change})
        except kind:
            pass
        else:
            raise AssertionError(f"{change} was accepted")


def tools() -> None:
    tool = {"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS}}
    options = {**GREEDY, "max_tokens": 128, "tools": [tool], "parallel_tool_calls": False}
    whole = litellm.completion(messages=ASK_CITY, tool_choice="required", **options).choices[0]
    assert whole.finish_reason == "tool_calls"
    calls = whole.message.tool_calls
    assert [call.function.name for call in calls] == ["get_weather"] * len(calls)
    assert all(Weather.model_validate_json(call.function.arguments) for call in calls)
    pieces = list(litellm.completion(messages=ASK_CITY, tool_choice="required", stream=True, **options))
    built = litellm.stream_chunk_builder(pieces, messages=ASK_CITY).choices[0]
    assert built.finish_reason == "tool_calls"
    assert [call.function.arguments for call in built.message.tool_calls] == [call.function.arguments for call in calls]
    results = [{"role": "tool", "tool_call_id": call.id, "content": "4 degrees"} for call in calls]
    final = litellm.completion(messages=[*ASK_CITY, whole.message, *results], tool_choice="none", **options)
    assert final.choices[0].message.content


def responses() -> None:
    whole = litellm.responses(input=QUESTION, **RESPONSE)
    text = whole.output[0].content[0].text
    assert text
    events = list(litellm.responses(input=QUESTION, stream=True, **RESPONSE))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == text
    assert events[0].type == "response.created"
    assert events[-1].type in ("response.completed", "response.incomplete")


def responses_tools() -> None:
    tool = {"type": "function", "name": "get_weather", "parameters": PARAMETERS}
    options = {**RESPONSE, "max_output_tokens": 128, "tools": [tool], "tool_choice": "required"}
    options["parallel_tool_calls"] = False
    whole = litellm.responses(input=CITY_QUESTION, **options)
    calls = [item for item in whole.output if item.type == "function_call"]
    assert calls
    assert all(Weather.model_validate_json(call.arguments) for call in calls)


if __name__ == "__main__":
    run(globals())
