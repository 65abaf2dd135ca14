"""Forced calls of tools at temperature 1: how many of them can be parsed and follow their schema.

`python -m benchmarks.tool_calls`: against a gateway in front of the embedded model (`make serve`); half of the calls
are streamed. It counts, and lists what went wrong; nothing of it depends on the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
from collections import Counter
from typing import Any

import jsonschema_rs
import openai
from rich.console import Console
from rich.progress import track

from benchmarks.tool_schemas import SCHEMAS

TEMPERATURE, MAX_TOKENS = 1.0, 2000


async def _call(client: openai.AsyncOpenAI, model: str, name: str, seed: int, is_streamed: bool) -> str:
    """What went wrong; empty if nothing did."""
    tool = {"type": "function", "function": {"name": "act", "parameters": SCHEMAS[name]}}
    options: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": f"Act on number {seed}."}],
        "tools": [tool, {"type": "function", "function": {"name": "other"}}],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "temperature": TEMPERATURE,
        "max_tokens": MAX_TOKENS,
        "seed": seed,
    }
    if is_streamed:
        async with client.beta.chat.completions.stream(**options) as stream:
            answer = await stream.get_final_completion()
    else:
        answer = await client.chat.completions.create(**options)
    choice = answer.choices[0]
    if choice.finish_reason != "tool_calls":
        return f"{name}, seed {seed}: ended with {choice.finish_reason}"
    (call,) = choice.message.tool_calls or ()
    schema = SCHEMAS[name] if call.function.name == "act" else {"type": "object", "maxProperties": 0}
    try:
        jsonschema_rs.validator_for(schema).validate(json.loads(call.function.arguments))
    except ValueError as error:
        return f"{name}, seed {seed}: {call.function.arguments}: {error}"
    return ""


async def _measure(url: str, model: str, number: int) -> None:
    client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=600)
    names = itertools.cycle(SCHEMAS)
    jobs = [
        asyncio.create_task(_call(client, model, next(names), seed, is_streamed))
        for is_streamed in (False, True)
        for seed in range(number)
    ]
    wrong = Counter([await job for job in track(jobs, "calls")])
    console = Console()
    console.print(
        f"{wrong.pop('', 0)} of {len(jobs)} forced calls were parsed and follow their schema "
        f"({number} whole, {number} streamed; {len(SCHEMAS)} schemas, temperature {TEMPERATURE:g})"
    )
    for what in wrong:
        console.print(f"  {what}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8080", help="address of the gateway")
    parser.add_argument("--model", default="smollm2-135m", help="name of the model")
    parser.add_argument("--number", type=int, default=200, help="calls, whole and again streamed")
    given = parser.parse_args()
    asyncio.run(_measure(given.url, given.model, given.number))


if __name__ == "__main__":
    main()
