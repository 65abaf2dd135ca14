"""The client for asyncio (and trio): as client.py, with await."""

from __future__ import annotations

import ssl
from collections import deque
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import httpx

from tidewright_client import checks, requests, settings
from tidewright_client.answers import Answer, Event
from tidewright_client.call import Call, Reader, Whole
from tidewright_client.errors import read_once
from tidewright_client.exchange import FAILURES, LIMITS, AsyncExchange, closed
from tidewright_client.hooks import Hooks
from tidewright_client.requests import ChatOptions, CompletionOptions, Messages, Request

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

    from tidewright_client.sessions.async_session import AsyncSession


class AsyncClient:
    """As Client, for an event loop."""

    def __init__(
        self,
        url: str | None = None,
        *,
        key: str | None = None,
        model: str | None = None,
        max_retries: int = settings.MAX_RETRIES,
        timeout: float | None = settings.TIMEOUT,
        idle_timeout: float = settings.IDLE_TIMEOUT,
        max_answer_bytes: int = settings.MAX_ANSWER_BYTES,
        tls: ssl.SSLContext | None = None,
        hooks: Hooks | None = None,
    ) -> None:
        """As Client's."""
        self._settings = settings.make(url, key, max_retries, timeout, idle_timeout, max_answer_bytes, hooks)
        checks.kind("model", model, str, "a text")
        checks.kind("tls", tls, ssl.SSLContext, "an ssl.SSLContext")
        self._model, self._tls = model, tls or ssl.create_default_context()
        self._http = httpx.AsyncClient(verify=self._tls, limits=LIMITS)

    async def chat(self, messages: Messages, **options: Unpack[ChatOptions]) -> Answer:
        """The next message of a chat. Raises TidewrightError."""
        return (await self._whole(requests.chat(messages, options, self._model, False))).answer()

    async def complete(self, prompt: str, **options: Unpack[CompletionOptions]) -> Answer:
        """The continuation of a text. Raises TidewrightError."""
        return (await self._whole(requests.completion(prompt, options, self._model, False))).answer()

    def stream_chat(self, messages: Messages, **options: Unpack[ChatOptions]) -> AsyncStream:
        """As `chat`, event by event. The request is sent when the stream is entered or first read."""
        return self._stream(requests.chat(messages, options, self._model, True))

    def stream_complete(self, prompt: str, **options: Unpack[CompletionOptions]) -> AsyncStream:
        """As `complete`, event by event. The request is sent when the stream is entered or first read."""
        return self._stream(requests.completion(prompt, options, self._model, True))

    async def models(self) -> list[str]:
        """The names of the served models. Raises TidewrightError."""
        return (await self._whole(requests.MODELS)).models()

    async def health(self) -> dict[str, Any]:
        """What the gateway says of itself while it can take requests.

        Raises:
            Unavailable: it can't.
            TidewrightError: as the other calls.
        """
        return (await self._whole(requests.HEALTH)).health()

    def session(self) -> AsyncSession:
        """A WebSocket for several generations, which survive its breaking; needs the extra `websocket`."""
        from tidewright_client.sessions.async_session import AsyncSession

        if self._http.is_closed:
            raise closed()
        return AsyncSession(self._settings, self._model, self._tls)

    async def aclose(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def _whole(self, request: Request) -> Whole:
        call = Call(self._settings, request)
        try:
            async with await AsyncExchange.open(self._http, call) as exchange:
                answer = exchange.answer
                assert isinstance(answer, Whole)
                try:
                    while chunk := await exchange.read():
                        answer.feed(chunk)
                except FAILURES as error:
                    raise answer.broke(error) from error
        except BaseException:
            call.over(None)  # if it is not by an error of ours: such as KeyboardInterrupt
            raise
        return answer

    def _stream(self, request: Request) -> AsyncStream:
        return AsyncStream(self._http, Call(self._settings, request))


class AsyncStream(AsyncIterator[Event]):
    """The events of an answer. Closing or dropping it early cancels the request. For one task at a time."""

    def __init__(self, http: httpx.AsyncClient, call: Call) -> None:
        self._http, self._call = http, call
        self._exchange: AsyncExchange | None = None
        self._reader: Reader | None = None
        self._events: deque[Event] = deque()
        self._is_closed = False

    def answer(self) -> Answer:
        """What has come so far; after the end, all of it."""
        return self._reader.answer() if self._reader else Answer()

    def __aiter__(self) -> Self:
        """Raises InvalidRequest: it is over."""
        if self._is_closed:
            raise read_once()
        return self

    async def __anext__(self) -> Event:
        """Raises TidewrightError."""
        while not self._events:
            if self._is_closed:
                raise StopAsyncIteration
            exchange, reader = await self._open()
            if reader.error:
                await self.aclose()
                raise reader.error
            if reader.is_done:
                await exchange.drain()
                await self.aclose()
                raise StopAsyncIteration
            try:
                if chunk := await exchange.read():
                    self._events += reader.feed(chunk)
                else:
                    reader.ended()
            except FAILURES as error:
                reader.broke(error)
        return self._events.popleft()

    async def _open(self) -> tuple[AsyncExchange, Reader]:
        if self._exchange is None or self._reader is None:
            try:
                self._exchange = await AsyncExchange.open(self._http, self._call)
            except BaseException:
                await self.aclose()
                raise
            assert isinstance(self._exchange.answer, Reader)
            self._reader = self._exchange.answer
        return self._exchange, self._reader

    async def aclose(self) -> None:
        """Cancels what has not come. What had come before can't be read any more."""
        if not self._is_closed:
            self._is_closed = True
            self._events.clear()
            if self._exchange:
                await self._exchange.aclose()
            if self._reader:
                self._reader.close()
            else:
                self._call.over(None)

    async def __aenter__(self) -> Self:
        if not self._is_closed:
            await self._open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __del__(self) -> None:
        # Without attributes if __init__ was not run to its end.
        if not getattr(self, "_is_closed", True):
            self._is_closed = True
            if self._exchange:
                self._exchange.drop()
            self._call.over(self.answer())
