"""OpenAI's Agents SDK, over chat completions and over the Responses API."""

from __future__ import annotations

from typing import Any

from agents import Agent, ModelSettings, OpenAIChatCompletionsModel, OpenAIResponsesModel, Runner, function_tool
from agents import set_tracing_disabled as disable_tracing
from checks import API_KEY, BASE_URL, CITY_QUESTION, MODEL, QUESTION, Fruit, Weather, run
from openai import AsyncOpenAI

disable_tracing(True)  # or it sends traces to OpenAI
client = AsyncOpenAI(base_url=BASE_URL, api_key=API_KEY, max_retries=0)
CHAT = OpenAIChatCompletionsModel(MODEL, client)
RESPONSES = OpenAIResponsesModel(MODEL, client)
# With the Responses API the SDK takes an answer that max_tokens cuts short for an error.
ENOUGH = 256
called: list[Weather] = []


@function_tool
def get_weather(city: str, unit: str) -> str:
    """The weather in a city."""
    called.append(Weather.model_construct(city=city, unit=unit))
    return "4 degrees"


def agent(model: Any, max_tokens: int = ENOUGH, **options: Any) -> Agent:
    choice = options.pop("tool_choice", None)
    one_call = False if choice == "required" else None  # the model is too small to end a list of calls by itself
    settings = ModelSettings(temperature=0, max_tokens=max_tokens, tool_choice=choice, parallel_tool_calls=one_call)
    return Agent(name="Assistant", instructions="Be short.", model=model, model_settings=settings, **options)


async def chat() -> None:
    await _text(CHAT)


async def structured() -> None:
    await _structured(CHAT)


async def tools() -> None:
    await _tools(CHAT)


async def responses() -> None:
    await _text(RESPONSES)
    await _structured(RESPONSES)


async def responses_tools() -> None:
    await _tools(RESPONSES)


async def _text(model: Any) -> None:
    whole = await Runner.run(agent(model), QUESTION)
    assert whole.final_output
    assert whole.raw_responses[0].usage.output_tokens > 0
    streamed = Runner.run_streamed(agent(model), QUESTION)
    raw = [event.data async for event in streamed.stream_events() if event.type == "raw_response_event"]
    assert raw[0].type == "response.created"
    assert raw[-1].type in ("response.completed", "response.incomplete")
    text = "".join(event.delta for event in raw if event.type == "response.output_text.delta")
    assert text == streamed.final_output == whole.final_output
    more = [*whole.to_input_list(), {"role": "user", "content": "Another one."}]
    assert (await Runner.run(agent(model), more)).final_output


async def _structured(model: Any) -> None:
    one = agent(model, output_type=Fruit)
    whole = await Runner.run(one, QUESTION)
    assert isinstance(whole.final_output, Fruit)
    streamed = Runner.run_streamed(one, QUESTION)
    async for _ in streamed.stream_events():
        pass
    assert streamed.final_output == whole.final_output


async def _tools(model: Any) -> None:
    # After the first call the SDK sets tool_choice back to auto, and the second answer ends the run or calls again.
    options: dict[str, Any] = {"tools": [get_weather], "tool_choice": "required"}
    one = agent(model, **options, tool_use_behavior="stop_on_first_tool")
    whole = await Runner.run(one, CITY_QUESTION)
    assert whole.final_output == "4 degrees"
    assert called
    streamed = Runner.run_streamed(one, CITY_QUESTION)
    items = [event.item.type async for event in streamed.stream_events() if event.type == "run_item_stream_event"]
    assert items[0] == "tool_call_item"
    assert items[-1] == "tool_call_output_item"
    assert streamed.final_output == whole.final_output
    # The whole way: call, result, answer.
    history = [*whole.to_input_list(), {"role": "user", "content": "Thank you."}]
    assert (await Runner.run(agent(model, tools=[get_weather], tool_choice="none"), history)).final_output


if __name__ == "__main__":
    run(globals())
