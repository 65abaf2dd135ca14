"""The sync and the async client of Triton by one interface, so that one test shows both."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterator
from typing import Any

from tidewright_client.triton import AsyncTritonClient, AsyncTritonStream, Piece, TritonAnswer, TritonClient

PATIENCE = 120.0  # seconds


class LoopThread:
    """An event loop that runs."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()

    def run(self, job: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(job, self._loop).result(PATIENCE)

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)


class FromAsync:
    """The async client, as if it were the other."""

    def __init__(self, loop: LoopThread, address: str, **options: Any) -> None:
        self._loop = loop

        async def make() -> AsyncTritonClient:
            return AsyncTritonClient(address, **options)

        self._client: AsyncTritonClient = loop.run(make())

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **named: self._loop.run(getattr(self._client, name)(*args, **named))

    def stream(self, *args: Any, **named: Any) -> StreamFromAsync:
        return StreamFromAsync(self._loop, self._client.stream(*args, **named))

    def __enter__(self) -> FromAsync:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class StreamFromAsync:
    def __init__(self, loop: LoopThread, stream: AsyncTritonStream) -> None:
        self._loop, self._stream = loop, stream

    @property
    def request_id(self) -> str:
        return self._stream.request_id

    def answer(self) -> TritonAnswer:
        return self._stream.answer()

    def close(self) -> None:
        self._loop.run(self._stream.aclose())

    def __iter__(self) -> Iterator[Piece]:
        return self

    def __next__(self) -> Piece:
        async def step() -> Piece | None:
            return await anext(self._stream, None)

        piece = self._loop.run(step())
        if piece is None:
            raise StopIteration
        return piece


class Clients:
    """Makes clients of one kind."""

    def __init__(self, kind: str) -> None:
        self._loop = LoopThread() if kind == "async" else None

    def __call__(self, address: str, **options: Any) -> Any:
        """Without retries, unless asked for."""
        options = {"max_retries": 0, "timeout": PATIENCE, **options}
        return FromAsync(self._loop, address, **options) if self._loop else TritonClient(address, **options)

    def stop(self) -> None:
        if self._loop:
            self._loop.stop()
