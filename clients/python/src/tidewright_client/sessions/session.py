"""A session for threads: one thread reads the connection, and makes the next when it breaks."""

from __future__ import annotations

import contextlib
import functools
import ssl
import threading
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from tidewright_client import requests, sse
from tidewright_client.answers import Answer, Event
from tidewright_client.background import soon
from tidewright_client.errors import ConnectionFailed, InvalidRequest, TidewrightError, read_once
from tidewright_client.requests import CompletionOptions, Messages, Request
from tidewright_client.sessions.connecting import FAILURES, explained, refused, without_redirects
from tidewright_client.sessions.core import CREDITS, GenerationState, SessionCore
from tidewright_client.settings import CONNECT_TIMEOUT, Settings

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack
    from websockets.sync.client import ClientConnection

_PATIENCE = 0.5  # seconds


class Session:
    """Generations over one WebSocket, by `Client.session()`. Safe for concurrent use."""

    def __init__(self, settings: Settings, model: str | None, tls: ssl.SSLContext | None) -> None:
        self._core, self._model, self._tls = SessionCore(settings), model, tls
        self._changed = threading.Condition()
        """Guards the core; notified whenever a generation may have something."""
        self._connection: ClientConnection | None = None
        self._outbox: deque[tuple[ClientConnection, str]] = deque()
        """In their order, whichever thread sends them: a cancel must not come before what it cancels."""
        self._is_sending = threading.Lock()
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="tidewright-session", daemon=True)
        self._thread.start()

    def stream_chat(
        self, messages: Messages, *, credits: int = CREDITS, **options: Unpack[CompletionOptions]
    ) -> Generation:
        """The next message of a chat. `credits`: tokens that may have come without being read.

        Raises:
            InvalidRequest: as far as it is seen here.
        """
        return self._begin(requests.chat(messages, options, self._model, False), credits)  # type: ignore[arg-type]

    def stream_complete(
        self, prompt: str, *, credits: int = CREDITS, **options: Unpack[CompletionOptions]
    ) -> Generation:
        """The continuation of a text, as `stream_chat`."""
        return self._begin(requests.completion(prompt, options, self._model, False), credits)

    def close(self) -> None:
        """Cancels what runs."""
        with self._changed:
            self._is_closed = True
            self._post(*[self._core.cancel(one) for one in list(self._core.live.values())])
        self._send()
        with self._changed:
            self._core.give_up(ConnectionFailed("the session was closed"))
            connection = self._connection
            self._changed.notify_all()
        if connection:
            connection.close()
        # One that connects sees by itself that it is not needed any more.
        self._thread.join(CONNECT_TIMEOUT if connection else _PATIENCE)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _begin(self, request: Request, credits: int) -> Generation:
        with self._changed:
            if self._is_closed:
                raise InvalidRequest("the session is closed")
            state = self._core.begin(request, credits)
            if self._core.is_open:
                self._post(state.generate())
            self._changed.notify_all()
        self._send()
        return Generation(self, state)

    def _post(self, *messages: str | None) -> None:
        """With the lock held. To the connection that there is now: what the next one needs is said anew."""
        if self._connection:
            self._outbox += [(self._connection, message) for message in messages if message]

    def _send(self) -> None:
        """If the connection breaks, the core knows what the next one needs."""
        if not self._outbox:
            return
        with self._is_sending:
            while self._outbox:
                connection, message = self._outbox.popleft()
                with contextlib.suppress(*FAILURES):
                    connection.send(message)

    def _next(self, state: GenerationState) -> Event | None:
        """None at the end. Raises TidewrightError."""
        with self._changed:
            while not state.events and not state.is_over and not state.deadline.is_over:
                self._changed.wait(state.deadline.at_most(None))
            event = None
            if state.events:
                event = state.take()
                self._post(state.grant())
            elif not state.is_over:
                self._post(self._core.late(state))
        self._send()
        if event is None and state.error:
            raise state.error
        return event

    def _cancel(self, state: GenerationState) -> None:
        with self._changed:
            self._post(self._core.cancel(state))
        self._send()

    def _run(self) -> None:
        wait: float | None = None
        while True:
            with self._changed:
                if wait is None:
                    self._changed.wait_for(lambda: self._core.live or self._is_closed)
                else:
                    self._changed.wait_for(lambda: self._is_closed, wait)
                if self._is_closed:
                    return
            failure = self._connected()
            with self._changed:
                if isinstance(failure, TidewrightError):
                    self._core.give_up(failure)
                wait = self._core.lost(failure, explained(self._core.settings, failure))
                self._changed.notify_all()

    def _connected(self) -> Exception | None:
        """Reads a connection to its end, of which it tells the reason."""
        from websockets.sync import client

        connect = getattr(client, "reconnect", client.connect)  # by which newer versions connect

        core = self._core
        options: dict[str, Any] = {"ssl": self._tls} if core.address.startswith("wss:") and self._tls else {}
        try:
            # Credits bound what waits; with a bound of its own the library would not notice the end behind it.
            with without_redirects(connect)(
                core.address,
                additional_headers=core.headers,
                open_timeout=CONNECT_TIMEOUT,
                close_timeout=1,
                max_size=sse.MAX_LINE,
                max_queue=None,
                compression=None,
                **options,
            ) as connection:
                connection.send(core.hello())
                with self._changed:
                    self._connection = connection
                    if self._is_closed:
                        return None
                for text in connection:
                    with self._changed:
                        self._post(*core.receive(text))
                        self._changed.notify_all()
                    self._send()
        except TidewrightError as error:
            return error
        except Exception as error:  # whatever it is, nobody may wait for ever
            return refused(core.settings, error) or error
        finally:
            with self._changed:
                self._connection = None
        return None


class Generation(Iterator[Event]):
    """The events of a generation of a session. Closing or dropping it early cancels it."""

    def __init__(self, session: Session, state: GenerationState) -> None:
        self._session, self._state = session, state
        self._is_read = False
        """To its end, or it was closed."""

    def __iter__(self) -> Self:
        """Raises InvalidRequest: it is over."""
        if self._is_read:
            raise read_once()
        return self

    def __next__(self) -> Event:
        """Raises TidewrightError."""
        try:
            event = self._session._next(self._state)
        except TidewrightError:
            self._is_read = True
            raise
        if event is None:
            self._is_read = True
            raise StopIteration
        return event

    def answer(self) -> Answer:
        """What has come so far; after the end, all of it."""
        return self._state.answer()

    def cancel(self) -> None:
        """The gateway stops it. What had come can still be read; the end is `cancelled`."""
        self._session._cancel(self._state)

    def close(self) -> None:
        """Cancels it, and drops what was not read."""
        self.cancel()
        self._state.events.clear()
        self._is_read = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        # Without attributes if __init__ was not run to its end.
        if (state := getattr(self, "_state", None)) and not state.is_over:
            soon(functools.partial(self._session._cancel, state))
