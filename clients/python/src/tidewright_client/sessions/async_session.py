"""A session for asyncio: a task reads the connection, and makes the next when it breaks."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections import deque
from collections.abc import AsyncIterator, Coroutine
from typing import TYPE_CHECKING, Any

import anyio

from tidewright_client import requests, sse
from tidewright_client.answers import Answer, Event
from tidewright_client.errors import ConnectionFailed, InvalidRequest, TidewrightError, read_once
from tidewright_client.requests import CompletionOptions, Messages, Request
from tidewright_client.sessions.connecting import FAILURES, explained, refused, without_redirects
from tidewright_client.sessions.core import CREDITS, GenerationState, SessionCore
from tidewright_client.settings import CONNECT_TIMEOUT, Settings

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack
    from websockets.asyncio.client import ClientConnection


class AsyncSession:
    """As Session, by `AsyncClient.session()`. Use it with `async with`."""

    def __init__(self, settings: Settings, model: str | None, tls: ssl.SSLContext | None) -> None:
        self._core, self._model, self._tls = SessionCore(settings), model, tls
        self._changed = asyncio.Condition()
        """Notified whenever a generation may have something."""
        self._connection: ClientConnection | None = None
        self._task: asyncio.Task[None] | None = None
        self._is_closed = False
        self._outbox: deque[tuple[ClientConnection, str]] = deque()
        """In their order, whichever task sends them: a cancel must not come before what it cancels."""
        self._is_sending = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    def stream_chat(
        self, messages: Messages, *, credits: int = CREDITS, **options: Unpack[CompletionOptions]
    ) -> AsyncGeneration:
        """As Session's. It begins at once, in the event loop that runs."""
        return self._begin(requests.chat(messages, options, self._model, False), credits)  # type: ignore[arg-type]

    def stream_complete(
        self, prompt: str, *, credits: int = CREDITS, **options: Unpack[CompletionOptions]
    ) -> AsyncGeneration:
        """As Session's. It begins at once, in the event loop that runs."""
        return self._begin(requests.completion(prompt, options, self._model, False), credits)

    async def aclose(self) -> None:
        """Cancels what runs."""
        self._is_closed = True
        await self._send(*[self._core.cancel(one) for one in list(self._core.live.values())])
        self._core.give_up(ConnectionFailed("the session was closed"))
        if self._task:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        await self._notify()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def _begin(self, request: Request, credits: int) -> AsyncGeneration:
        if self._is_closed:
            raise InvalidRequest("the session is closed")
        state = self._core.begin(request, credits)
        generation = AsyncGeneration(self, state)
        if self._task is None:
            self._task = asyncio.create_task(self._run())
        if self._core.is_open:
            self._post(state.generate())
        self._soon(self._began())
        return generation

    async def _began(self) -> None:
        await self._notify()
        await self._flush()

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    def _post(self, *messages: str | None) -> None:
        """To the connection that there is now: what the next one needs is said anew."""
        if self._connection:
            self._outbox += [(self._connection, message) for message in messages if message]

    async def _send(self, *messages: str | None) -> None:
        """In a task of its own: a caller that is cancelled must not lose what it sends, which may be others' too."""
        self._post(*messages)
        if self._outbox:
            await asyncio.shield(self._soon(self._flush()))

    async def _flush(self) -> None:
        """If the connection breaks, the core knows what the next one needs."""
        async with self._is_sending:
            while self._outbox:
                connection, message = self._outbox.popleft()
                with contextlib.suppress(*FAILURES):
                    await connection.send(message)

    async def _next(self, state: GenerationState) -> Event | None:
        """None at the end. Raises TidewrightError."""
        async with self._changed:
            while not state.events and not state.is_over and not state.deadline.is_over:
                with anyio.move_on_after(state.deadline.at_most(None)):
                    await self._changed.wait()
        event = None
        if state.events:
            event = state.take()
            self._post(state.grant())
        elif not state.is_over:
            self._post(self._core.late(state))
        if self._outbox:  # it is not waited for: a caller that is cancelled meanwhile would lose the event
            self._soon(self._flush())
        if event is None and state.error:
            raise state.error
        return event

    async def _cancel(self, state: GenerationState) -> None:
        await self._send(self._core.cancel(state))

    async def _run(self) -> None:
        wait: float | None = None
        while True:
            if wait is None:
                async with self._changed:
                    await self._changed.wait_for(lambda: bool(self._core.live))
            else:
                await asyncio.sleep(wait)
            failure = await self._connected()
            if isinstance(failure, TidewrightError):
                self._core.give_up(failure)
            wait = self._core.lost(failure, explained(self._core.settings, failure))
            await self._notify()

    async def _connected(self) -> Exception | None:
        """Reads a connection to its end, of which it tells the reason."""
        from websockets.asyncio.client import connect

        core = self._core
        options: dict[str, Any] = {"ssl": self._tls} if core.address.startswith("wss:") and self._tls else {}
        try:
            # Credits bound what waits; with a bound of its own the library would not notice the end behind it.
            async with without_redirects(connect)(
                core.address,
                additional_headers=core.headers,
                open_timeout=CONNECT_TIMEOUT,
                close_timeout=1,
                max_size=sse.MAX_LINE,
                max_queue=None,
                compression=None,
                **options,
            ) as connection:
                await connection.send(core.hello())
                self._connection = connection
                async for text in connection:
                    self._post(*core.receive(text))
                    await self._notify()
                    await self._send()
        except TidewrightError as error:
            return error
        except Exception as error:  # whatever it is, nobody may wait for ever
            return refused(core.settings, error) or error
        finally:
            self._connection = None
        return None

    def _drop(self, state: GenerationState) -> None:
        try:
            asyncio.get_running_loop()
        except RuntimeError:  # none runs any more
            return
        self._soon(self._cancel(state))

    def _soon(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


class AsyncGeneration(AsyncIterator[Event]):
    """The events of a generation of a session. Closing or dropping it early cancels it."""

    def __init__(self, session: AsyncSession, state: GenerationState) -> None:
        self._session, self._state = session, state
        self._is_read = False
        """To its end, or it was closed."""

    def __aiter__(self) -> Self:
        """Raises InvalidRequest: it is over."""
        if self._is_read:
            raise read_once()
        return self

    async def __anext__(self) -> Event:
        """Raises TidewrightError."""
        try:
            event = await self._session._next(self._state)
        except TidewrightError:
            self._is_read = True
            raise
        if event is None:
            self._is_read = True
            raise StopAsyncIteration
        return event

    def answer(self) -> Answer:
        """What has come so far; after the end, all of it."""
        return self._state.answer()

    async def cancel(self) -> None:
        """The gateway stops it. What had come can still be read; the end is `cancelled`."""
        await self._session._cancel(self._state)

    async def aclose(self) -> None:
        """Cancels it, and drops what was not read."""
        await self.cancel()
        self._state.events.clear()
        self._is_read = True

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __del__(self) -> None:
        if not self._state.is_over:
            self._session._drop(self._state)
