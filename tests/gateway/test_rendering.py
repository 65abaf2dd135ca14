"""What is written of a stream, and when."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

from tidewright_gateway.openai.answers import DONE, ChatAnswer
from tidewright_gateway.openai.rendering import stream
from tidewright_gateway.replicas.triton import Reply


class Scripted:
    """A service whose generations say `replies`: index of the choice and whether it ends."""

    def __init__(self, replies: list[tuple[int, bool]]) -> None:
        self._replies = replies
        self.closed: list[int] = []

    async def replies(self, work: Any) -> AsyncGenerator[tuple[int, Reply], None]:
        for index, ends in self._replies:
            yield index, Reply("word", [1, 2], "length" if ends else None, None)

    async def close(self, work: Any, num_tokens: int) -> None:
        self.closed.append(num_tokens)


def written(n: int, *replies: tuple[int, bool]) -> list[bytes]:
    service: Any = Scripted(list(replies))
    work: Any = SimpleNamespace(tasks=[None] * n, num_prompt_tokens=1)

    async def run() -> list[bytes]:
        return [part async for part in stream(service, work, ChatAnswer("id", "model", None, True, []))]

    parts = asyncio.run(run())
    assert service.closed == [2 * len(replies)]
    return parts


def test_what_is_there_together_is_written_together() -> None:
    parts = written(1, (0, False), (0, False), (0, True))
    assert [part.count(b"data: ") for part in parts] == [2, 1, 3]  # opening and piece; piece; piece, usage and end
    assert b'"role":"assistant"' in parts[0]
    assert b'"finish_reason":"length"' in parts[-1]
    assert parts[-1].endswith(DONE)


def test_a_choice_that_ends_early_is_not_held_back_for_the_others() -> None:
    parts = written(2, (0, False), (0, True), (1, False), (1, True))
    assert b'"index":0' in parts[0]
    assert b'"index":1' in parts[0]
    assert [part.count(b"data: ") for part in parts] == [3, 1, 1, 3]
