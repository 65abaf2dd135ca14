"""Answers that a cache keeps, and a source of them that counts its runs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import aclosing
from typing import Any

import msgspec

from tidewright_gateway.cache.responses import CacheState, Replies, ResponseCache
from tidewright_gateway.replicas.triton import Reply

HIT, SHARED, MISS, BYPASS = CacheState


def answer(length: int, finish_reason: str = "length", size: int = 1) -> list[Reply]:
    """A reply for each token, whose text has `size` characters."""
    reasons = [None] * (length - 1) + [finish_reason]
    return [Reply(f"{n:>{size}}", [n], reason, b'[{"%d":{"rank": 1}}]' % n) for n, reason in enumerate(reasons)]


class Source:
    """Runs of one answer; counts those that began, and those that are under way."""

    def __init__(self, replies: Sequence[Reply], pause: Callable[[], Coroutine[Any, Any, Any]] | None = None) -> None:
        self.replies, self.pause = replies, pause or (lambda: asyncio.sleep(0))
        self.begun = self.running = 0
        self.error: Exception | None = None

    async def run(self) -> AsyncGenerator[Reply, None]:
        self.begun += 1
        self.running += 1
        try:
            for reply in self.replies:
                await self.pause()
                yield reply
            if self.error:
                raise self.error
        finally:
            self.running -= 1


async def read(replies: Replies) -> list[Reply]:
    async with aclosing(replies):
        return [reply async for reply in replies]


def content(replies: Sequence[Reply]) -> tuple[str, list[int], str | None, list[Any]]:
    logprobs = [position for reply in replies if reply.logprobs for position in msgspec.json.decode(reply.logprobs)]
    ids = [token_id for reply in replies for token_id in reply.token_ids]
    return "".join(reply.text for reply in replies), ids, replies[-1].finish_reason, logprobs


async def ask(cache: ResponseCache, source: Source, **options: Any) -> CacheState:
    """Asks for it under the key "k", and reads it to its end."""
    state, replies = cache.open(b"k", source.run, **options)
    assert content(await read(replies)) == content(source.replies)
    return state
