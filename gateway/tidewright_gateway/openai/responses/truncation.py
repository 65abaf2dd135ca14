"""Leaves out the oldest messages of a chat that is too long for the model (`truncation: "auto"`)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from tidewright_gateway.openai.messages import ChatMessage

Fits = Callable[[list[ChatMessage]], Awaitable[bool]]


async def shortened(messages: Sequence[ChatMessage], fits: Fits) -> list[ChatMessage]:
    """The messages without as many of the oldest turns as need be.

    A turn begins with a message of the user, so that no output is left without its call. System messages at the
    beginning and the last turn stay, also if they are too long.
    """
    head = next((at for at, one in enumerate(messages) if not _is_system(one)), len(messages))
    starts = [at for at, one in enumerate(messages) if at > head and one.role == "user"]
    first, last = 0, len(starts)  # turns that are left out: at least, and at most
    while first < last:
        middle = (first + last) // 2
        if await fits(_without(messages, head, starts, middle)):
            last = middle
        else:
            first = middle + 1
    return _without(messages, head, starts, first)


def _without(messages: Sequence[ChatMessage], head: int, starts: Sequence[int], number: int) -> list[ChatMessage]:
    return [*messages[:head], *messages[starts[number - 1] if number else head :]]


def _is_system(message: ChatMessage) -> bool:
    return message.role in ("system", "developer")
