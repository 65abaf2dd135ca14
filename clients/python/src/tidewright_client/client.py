"""The synchronous client: httpx moves the bytes, call.py knows what they mean. async_client.py is its twin."""

from __future__ import annotations

import ssl
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import httpx

from tidewright_client import checks, requests, settings
from tidewright_client.answers import Answer, Event
from tidewright_client.background import soon
from tidewright_client.call import Call, Reader, Whole
from tidewright_client.errors import read_once
from tidewright_client.exchange import FAILURES, LIMITS, Exchange, closed
from tidewright_client.hooks import Hooks
from tidewright_client.requests import ChatOptions, CompletionOptions, Messages, Request

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

    from tidewright_client.sessions.session import Session


class Client:
    """A gateway. Safe for concurrent use; its calls share one pool of connections."""

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
        """
        Args:
            url: With or without /v1. Default: TIDEWRIGHT_URL, else http://127.0.0.1:8080.
            key: The API key. Default: TIDEWRIGHT_KEY.
            model: Of calls that name none.
            timeout: Seconds of a call, retries included; None for no end.
            idle_timeout: Seconds without a byte after which a stream is given up.
            max_answer_bytes: Of a whole answer's JSON; of a stream, its text and tool calls.
            tls: Default: the machine's certificates.

        Raises:
            InvalidRequest: the URL is no address, or the key can not be one.
            TypeError, ValueError: another argument is of a wrong type, or out of range.
        """
        self._settings = settings.make(url, key, max_retries, timeout, idle_timeout, max_answer_bytes, hooks)
        checks.kind("model", model, str, "a text")
        checks.kind("tls", tls, ssl.SSLContext, "an ssl.SSLContext")
        self._model, self._tls = model, tls or ssl.create_default_context()
        self._http = httpx.Client(verify=self._tls, limits=LIMITS)

    def chat(self, messages: Messages, **options: Unpack[ChatOptions]) -> Answer:
        """The next message of a chat. Raises TidewrightError."""
        return self._whole(requests.chat(messages, options, self._model, False)).answer()

    def complete(self, prompt: str, **options: Unpack[CompletionOptions]) -> Answer:
        """The continuation of a text. Raises TidewrightError."""
        return self._whole(requests.completion(prompt, options, self._model, False)).answer()

    def stream_chat(self, messages: Messages, **options: Unpack[ChatOptions]) -> Stream:
        """As `chat`, event by event. The request is sent when the stream is entered or first read."""
        return self._stream(requests.chat(messages, options, self._model, True))

    def stream_complete(self, prompt: str, **options: Unpack[CompletionOptions]) -> Stream:
        """As `complete`, event by event. The request is sent when the stream is entered or first read."""
        return self._stream(requests.completion(prompt, options, self._model, True))

    def models(self) -> list[str]:
        """The names of the served models. Raises TidewrightError."""
        return self._whole(requests.MODELS).models()

    def health(self) -> dict[str, Any]:
        """What the gateway says of itself while it can take requests.

        Raises:
            Unavailable: it can't.
            TidewrightError: as the other calls.
        """
        return self._whole(requests.HEALTH).health()

    def session(self) -> Session:
        """A WebSocket for several generations, which survive its breaking; needs the extra `websocket`."""
        from tidewright_client.sessions.session import Session

        if self._http.is_closed:
            raise closed()
        return Session(self._settings, self._model, self._tls)

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _whole(self, request: Request) -> Whole:
        call = Call(self._settings, request)
        try:
            with Exchange(self._http, call) as exchange:
                answer = exchange.answer
                assert isinstance(answer, Whole)
                try:
                    while chunk := exchange.read():
                        answer.feed(chunk)
                except FAILURES as error:
                    raise answer.broke(error) from error
        except BaseException:
            call.over(None)  # if it is not by an error of ours: such as KeyboardInterrupt
            raise
        return answer

    def _stream(self, request: Request) -> Stream:
        return Stream(self._http, Call(self._settings, request))


class Stream(Iterator[Event]):
    """The events of an answer. Closing or dropping it early cancels the request. For one thread at a time."""

    def __init__(self, http: httpx.Client, call: Call) -> None:
        self._http, self._call = http, call
        self._exchange: Exchange | None = None
        self._reader: Reader | None = None
        self._events: deque[Event] = deque()
        self._is_closed = False

    def answer(self) -> Answer:
        """What has come so far; after the end, all of it."""
        return self._reader.answer() if self._reader else Answer()

    def __iter__(self) -> Self:
        """Raises InvalidRequest: it is over."""
        if self._is_closed:
            raise read_once()
        return self

    def __next__(self) -> Event:
        """Raises TidewrightError."""
        while not self._events:
            if self._is_closed:
                raise StopIteration
            exchange, reader = self._open()
            if reader.error:
                self.close()
                raise reader.error
            if reader.is_done:
                exchange.drain()
                self.close()
                raise StopIteration
            try:
                if chunk := exchange.read():
                    self._events += reader.feed(chunk)
                else:
                    reader.ended()
            except FAILURES as error:
                reader.broke(error)
        return self._events.popleft()

    def _open(self) -> tuple[Exchange, Reader]:
        if self._exchange is None or self._reader is None:
            try:
                self._exchange = Exchange(self._http, self._call)
            except BaseException:
                self.close()
                raise
            assert isinstance(self._exchange.answer, Reader)
            self._reader = self._exchange.answer
        return self._exchange, self._reader

    def close(self) -> None:
        """Cancels what has not come. What had come before can't be read any more."""
        if not self._is_closed:
            self._is_closed = True
            self._events.clear()
            if self._exchange:
                self._exchange.close()
            if self._reader:
                self._reader.close()
            else:
                self._call.over(None)

    def __enter__(self) -> Self:
        if not self._is_closed:
            self._open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        # Without attributes if __init__ was not run to its end.
        if not getattr(self, "_is_closed", True):
            self._is_closed = True
            if exchange := self._exchange:
                soon(exchange.close)
            self._call.over(self.answer())
