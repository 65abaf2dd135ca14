"""Pydantic AI's agents over chat completions, the Responses API and Anthropic's Messages."""

from __future__ import annotations

from typing import Any

from checks import API_KEY, BASE_URL, CITY_QUESTION, MAX_TOKENS, MODEL, QUESTION, Fruit, Weather, run
from pydantic_ai import Agent, NativeOutput, ToolOutput
from pydantic_ai.messages import ToolCallPart, ToolReturnPart
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.anthropic import AnthropicProvider
from pydantic_ai.providers.openai import OpenAIProvider

PROVIDER = OpenAIProvider(base_url=BASE_URL, api_key=API_KEY)
SETTINGS: Any = {"temperature": 0, "max_tokens": MAX_TOKENS}
# The model is too small to end a list of calls by itself.
ONE_CALL: Any = {**SETTINGS, "max_tokens": 128, "parallel_tool_calls": False}


def chat_model() -> OpenAIChatModel:
    return OpenAIChatModel(MODEL, provider=PROVIDER)


def anthropic_model() -> AnthropicModel:
    return AnthropicModel(MODEL, provider=AnthropicProvider(base_url=BASE_URL.removesuffix("/v1"), api_key=API_KEY))


async def chat() -> None:
    await _text(chat_model())


async def structured() -> None:
    agent = Agent(chat_model(), output_type=NativeOutput(Fruit), model_settings={**SETTINGS, "max_tokens": 64})
    whole = await agent.run(QUESTION)
    assert isinstance(whole.output, Fruit)
    async with agent.run_stream(QUESTION) as streamed:
        outputs = [output async for output in streamed.stream_output(debounce_by=None)]
    assert outputs[-1] == whole.output


async def structured_by_tool() -> None:
    """Pydantic AI's default for an output type."""
    agent = Agent(chat_model(), output_type=ToolOutput(Fruit), model_settings=ONE_CALL)
    whole = await agent.run(QUESTION)
    assert isinstance(whole.output, Fruit)
    async with agent.run_stream(QUESTION) as streamed:
        assert await streamed.get_output() == whole.output


async def tools() -> None:
    await _tools(chat_model())


async def responses() -> None:
    await _text(OpenAIResponsesModel(MODEL, provider=PROVIDER))


async def responses_tools() -> None:
    await _tools(OpenAIResponsesModel(MODEL, provider=PROVIDER))


async def messages() -> None:
    await _text(anthropic_model())


async def messages_tools() -> None:
    await _tools(anthropic_model())


async def _text(model: Any) -> None:
    agent = Agent(model, instructions="Be short.", model_settings=SETTINGS)
    whole = await agent.run(QUESTION)
    assert whole.output
    assert whole.usage.output_tokens > 0
    async with agent.run_stream(QUESTION) as streamed:
        deltas = [delta async for delta in streamed.stream_text(delta=True, debounce_by=None)]
    assert "".join(deltas) == whole.output
    assert (await agent.run("Another one.", message_history=whole.all_messages())).output


async def _tools(model: Any) -> None:
    """An output type makes the client ask for calls until one gives the output. The other tool goes after its call."""
    asked: list[Weather] = []
    agent = Agent(model, output_type=[Fruit, Weather], model_settings=ONE_CALL)

    @agent.tool_plain(prepare=lambda _, definition: None if asked else definition)
    def get_weather(where: Weather) -> str:
        """The weather in a city."""
        asked.append(where)
        return "4 degrees"

    whole = await agent.run(CITY_QUESTION)
    assert isinstance(whole.output, Fruit | Weather)
    assert all(isinstance(where, Weather) for where in asked)
    parts = [part for message in whole.all_messages() for part in message.parts]
    calls = [part.tool_call_id for part in parts if isinstance(part, ToolCallPart)]
    results = [part.tool_call_id for part in parts if isinstance(part, ToolReturnPart)]
    assert calls
    assert sorted(calls) == sorted(results)
    assert len(set(calls)) == len(calls)


if __name__ == "__main__":
    run(globals())
