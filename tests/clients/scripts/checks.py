"""What the clients' scripts share: where the server is, what they ask for, and how one check of a script is run."""

from __future__ import annotations

import asyncio
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, Field

BASE_URL = os.environ["BASE_URL"]
"""With /v1 at its end, as OpenAI's clients want it."""
MODEL = os.environ["MODEL"]
API_KEY = os.environ["API_KEY"]

QUESTION = "Name three fruits."
MESSAGES = [{"role": "user", "content": QUESTION}]
MAX_TOKENS = 24
CITY_QUESTION = "What is the weather in Oslo?"
E = TypeVar("E", bound=Exception)


class Fruit(BaseModel):
    """Bounded on all sides, as the model is too small to end a text by itself."""

    name: Literal["apple", "pear", "plum"]
    count: int = Field(ge=0, le=9)
    ripe: bool


class Weather(BaseModel):
    """The arguments of the tool."""

    city: Literal["Oslo", "Paris"]
    unit: Literal["celsius", "fahrenheit"]


def run(functions: dict[str, Any]) -> None:
    """Runs the check named on the command line; an assertion that fails ends the script with a traceback."""
    result = functions[sys.argv[1]]()
    if inspect.isawaitable(result):
        asyncio.run(_wait_for(result))


async def _wait_for(result: Any) -> None:
    await result


def refused(kind: type[E], call: Callable[..., Any], **arguments: Any) -> E:
    """The error of a call that the server must refuse with this one."""
    try:
        call(**arguments)
    except kind as error:
        return error
    raise AssertionError(f"{arguments} was accepted")


def assert_order(events: Sequence[str], *order: str, repeated: Callable[[str], bool] = lambda _: False) -> None:
    """The events are these in this order; one for which `repeated` holds comes once or more."""
    found = [event for at, event in enumerate(events) if not (at and events[at - 1] == event and repeated(event))]
    assert found == list(order), f"{found} is not {list(order)}"
