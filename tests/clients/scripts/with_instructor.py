"""Instructor: pydantic objects by a JSON schema, and by a tool call, which is its default."""

from __future__ import annotations

from typing import Any

import instructor
from checks import API_KEY, BASE_URL, MAX_TOKENS, MESSAGES, MODEL, Fruit, run
from instructor import Mode
from openai import AsyncOpenAI, OpenAI

OPTIONS: dict[str, Any] = {
    **{"model": MODEL, "temperature": 0, "max_tokens": 4 * MAX_TOKENS},
    **{"messages": MESSAGES, "response_model": Fruit, "max_retries": 0},
}


async def structured() -> None:
    """From text that follows a JSON schema; the other modes for JSON do not constrain the text."""
    await objects(Mode.JSON_SCHEMA)


async def tools() -> None:
    await objects(Mode.TOOLS)


async def objects(mode: Mode) -> None:
    client = instructor.from_openai(OpenAI(base_url=BASE_URL, api_key=API_KEY, max_retries=0), mode=mode)
    whole, raw = client.chat.completions.create_with_completion(**OPTIONS)
    assert isinstance(whole, Fruit)
    assert raw.usage.completion_tokens > 0
    partial = list(client.chat.completions.create_partial(**OPTIONS))
    assert partial[-1].model_dump() == whole.model_dump()
    asynchronous = instructor.from_openai(AsyncOpenAI(base_url=BASE_URL, api_key=API_KEY, max_retries=0), mode=mode)
    assert (await asynchronous.chat.completions.create(**OPTIONS)).model_dump() == whole.model_dump()


if __name__ == "__main__":
    run(globals())
