"""LangChain's ChatOpenAI: text, structured output, tools, and the Responses API."""

from __future__ import annotations

from typing import Any

from checks import API_KEY, BASE_URL, CITY_QUESTION, MAX_TOKENS, MODEL, QUESTION, Fruit, Weather, run
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI


def model(max_tokens: int = MAX_TOKENS, **options: Any) -> ChatOpenAI:
    settings: dict[str, Any] = {
        "temperature": 0,
        "max_tokens": max_tokens,
        "max_retries": 0,
        "stream_usage": True,
        **options,
    }
    return ChatOpenAI(base_url=BASE_URL, api_key=API_KEY, model=MODEL, **settings)


@tool("get_weather", args_schema=Weather)
def get_weather(city: str, unit: str) -> str:
    """The weather in a city."""
    return f"4 degrees {unit} in {city}"


def chat() -> None:
    _text(model())


def structured() -> None:
    _structured(model(64))


def structured_json_mode() -> None:
    """Any JSON object; the model is not told of the schema, so the object need not follow it."""
    found = model(64, seed=1).with_structured_output(Fruit, method="json_mode", include_raw=True).invoke(QUESTION)
    assert found["raw"].content.lstrip().startswith("{")


def tools() -> None:
    _tools(model(128))


def structured_by_tool() -> None:
    asking = model(128).with_structured_output(Fruit, method="function_calling")
    assert isinstance(asking.invoke(QUESTION), Fruit)
    assert isinstance(list(asking.stream(QUESTION))[-1], Fruit)


def responses() -> None:
    _text(model(use_responses_api=True))
    _structured(model(64, use_responses_api=True))


def responses_tools() -> None:
    _tools(model(128, use_responses_api=True))


def _text(asking: ChatOpenAI) -> None:
    whole = asking.invoke(QUESTION)
    assert whole.text
    assert whole.usage_metadata["total_tokens"] > 0
    pieces = list(asking.stream(QUESTION))
    assert len(pieces) > 2
    joined = pieces[0]
    for piece in pieces[1:]:
        joined += piece
    assert joined.text == whole.text
    assert joined.usage_metadata["output_tokens"] == whole.usage_metadata["output_tokens"]
    assert [answer.text for answer in asking.batch([QUESTION, QUESTION])] == [whole.text] * 2
    assert asking.invoke([HumanMessage(QUESTION), whole, HumanMessage("Another one.")]).text


def _structured(asking: ChatOpenAI) -> None:
    structured_one = asking.with_structured_output(Fruit)
    whole = structured_one.invoke(QUESTION)
    assert isinstance(whole, Fruit)
    assert list(structured_one.stream(QUESTION))[-1] == whole


def _tools(asking: ChatOpenAI) -> None:
    bound = asking.bind_tools([get_weather], tool_choice="required", parallel_tool_calls=False)
    whole = bound.invoke(CITY_QUESTION)
    assert whole.tool_calls
    assert not whole.invalid_tool_calls
    for call in whole.tool_calls:
        assert call["name"] == "get_weather"
        assert Weather.model_validate(call["args"])
    joined = None
    for piece in bound.stream(CITY_QUESTION):
        joined = piece if joined is None else joined + piece
    assert [call["args"] for call in joined.tool_calls] == [call["args"] for call in whole.tool_calls]
    results = [get_weather.invoke(call) for call in whole.tool_calls]
    assert all(isinstance(result, ToolMessage) for result in results)
    final = asking.bind_tools([get_weather], tool_choice="none").invoke([HumanMessage(CITY_QUESTION), whole, *results])
    assert final.text


if __name__ == "__main__":
    run(globals())
