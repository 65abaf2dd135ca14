"""One call of the client, without I/O: its attempts, what becomes of their failures, and its answer.

A transport (client.py, async_client.py) sends what `attempt` says, and tells what comes: `refused` or `failed` say how
long to wait before the next attempt or raise the call's error; `begin` takes the head of an answer, whose bytes go to
the `Reader` or `Whole` that it gives.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

import httpx

from tidewright_client import answers, explain, retries, sse
from tidewright_client.answers import Accumulator, Answer, Event
from tidewright_client.deadline import Deadline
from tidewright_client.errors import (
    ASK_AGAIN,
    ConnectionFailed,
    Interrupted,
    TidewrightError,
    TimedOut,
    UnexpectedAnswer,
)
from tidewright_client.hooks import CallInfo, tell
from tidewright_client.requests import Request
from tidewright_client.settings import CONNECT_TIMEOUT, Settings

MAX_ERROR_BYTES = 2**20  # that are read of an answer that is an error
DRAIN_TIME = 0.5  # seconds that a stream gets to end after [DONE], so that its connection can be used again
_NEARLY = 0.05  # seconds; a clock and a timer do not agree exactly

Error = TypeVar("Error", bound=TidewrightError)


class Attempt(NamedTuple):
    method: str
    url: str
    headers: dict[str, str]
    content: bytes | None
    timeouts: dict[str, float | None]
    """As httpx takes them."""


class Call:
    def __init__(self, settings: Settings, request: Request) -> None:
        self.settings = settings
        timeout = settings.timeout if isinstance(request.timeout, type(...)) else request.timeout
        self.deadline = Deadline(timeout, time.monotonic)
        self._request = request
        self._ended = False
        self.info = CallInfo(request.operation, settings.url, request.model, request.is_stream)
        self.info.headers |= {
            "Accept": "text/event-stream" if request.is_stream else "application/json",
            "Accept-Encoding": "identity",  # so that a bound on bytes is one
            "Content-Type": "application/json",
        }
        if settings.key:
            self.info.headers["Authorization"] = f"Bearer {settings.key}"
        settings.budget.request()
        tell(settings.hooks.on_request, self.info)

    def attempt(self) -> Attempt:
        """The next. Raises TimedOut."""
        if self.deadline.is_over:
            raise self.end(self._timed_out())
        body, content = self._request.body, None
        if body is not None:
            if (timeout := self.deadline.of_server()) is not None:
                body = {"timeout": timeout, **body}
            content = json.dumps(body, ensure_ascii=False).encode()
        reading = self.deadline.at_most(self.patience)
        timeouts = {
            "connect": self.deadline.at_most(CONNECT_TIMEOUT),
            "read": reading,
            "write": reading,
            "pool": self.deadline.at_most(None),
        }
        method = "GET" if body is None else "POST"
        return Attempt(method, self.settings.url + self._request.path, self.info.headers, content, timeouts)

    @property
    def patience(self) -> float | None:
        """Seconds without a byte that are waited for."""
        return self.settings.idle_timeout if self._request.is_stream else None

    def begin(self, status: int, headers: Mapping[str, str]) -> Whole | Reader:
        """Takes the head of an answer with a status below 300. Raises UnexpectedAnswer."""
        request_id = headers.get("x-request-id")
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        expected = "text/event-stream" if self._request.is_stream else "application/json"
        if kind != expected or headers.get("content-encoding", "identity") != "identity":
            coding = headers.get("content-encoding")
            what = f"answered {kind or 'no content type'}{f' in {coding}' if coding else ''}, not {expected}"
            raise self.end(explain.unexpected(self.settings, what, status, request_id))
        return Reader(self, request_id) if self._request.is_stream else Whole(self, request_id)

    def refused(self, status: int, headers: Mapping[str, str], body: bytes) -> float:
        """Seconds before the next attempt. Raises the error of an answer with a status of 300 or more."""
        own = {"timeout"} - (self._request.body or {}).keys() | (
            {"stream_options"} if self._request.is_stream else set()
        )
        error = explain.refusal(self.settings, status, headers, body, own)
        may = status in retries.STATUSES and headers.get("x-should-retry", "").lower() != "false"
        return self._wait_after(error, may)

    def failed(self, error: Exception) -> float:
        """The same for an exception before the first byte of an answer."""
        if isinstance(error, TimeoutError | httpx.TimeoutException) and not isinstance(error, httpx.ConnectTimeout):
            raise self.end(self._timed_out()) from error
        if self._is_late():
            raise self.end(self._timed_out()) from error
        made = explain.no_connection(self.settings, error)
        return self._wait_after(made, not explain.is_hopeless(error), error)

    def _wait_after(self, error: TidewrightError, may_retry: bool, cause: Exception | None = None) -> float:
        if may_retry and self._request.is_retried and self.info.retries < self.settings.max_retries:
            wait = retries.wait_before(self.info.retries, error.retry_after, self.deadline.left(), random.random)
            if wait is not None and self.settings.budget.take():
                self.info.retries += 1
                tell(self.settings.hooks.on_retry, self.info, error, wait)
                return wait
        raise self.end(error) from cause

    def broke(self, error: Exception, partial: Answer | None) -> TidewrightError:
        """What an exception after the first byte is. `partial`: of a stream."""
        if isinstance(error, TimeoutError | httpx.TimeoutException):
            if partial is None or self._is_late():
                return self._timed_out(partial)
            message = f"{self.settings.url} sent nothing for {self.settings.idle_timeout:g} s (idle_timeout)"
        elif partial is None:
            return ConnectionFailed(f"the connection to {self.settings.url} broke in the answer: {error}; ask again")
        else:
            message = f"the connection to {self.settings.url} broke in the answer: {error}"
        return Interrupted(f"{message}; {ASK_AGAIN}", partial=partial)

    def _is_late(self) -> bool:
        left = self.deadline.left()
        return left is not None and left < _NEARLY

    def _timed_out(self, partial: Answer | None = None) -> TimedOut:
        if self.deadline.timeout is not None and self._is_late():
            return explain.timed_out(self.settings, self.deadline, partial)
        return TimedOut(
            f"{self.settings.url} sent nothing for {self.patience or 0:g} s; see the server's log", partial=partial
        )

    def late(self) -> TimedOut | None:
        """The error of a call whose time is over while bytes still come."""
        return self._timed_out() if self.deadline.is_over else None

    def too_long(self, size: int) -> UnexpectedAnswer | None:
        """The error of an answer of so many bytes."""
        most = self.settings.max_answer_bytes
        return explain.too_long(self.settings, most) if size > most else None

    def first_token(self) -> None:
        tell(self.settings.hooks.on_first_token, self.info)

    def end(self, error: Error) -> Error:
        """The call ends with it; it is given back to be raised."""
        self.over(error.partial, error)
        return error

    def over(self, answer: Answer | None, error: TidewrightError | None = None) -> None:
        if not self._ended:
            self._ended = True
            tell(self.settings.hooks.on_end, self.info, answer, error)


class Whole:
    """An answer that is not streamed."""

    def __init__(self, call: Call, request_id: str | None) -> None:
        self._call, self._request_id = call, request_id
        self._size = 0
        self._chunks: list[bytes] = []

    def feed(self, chunk: bytes) -> None:
        """Raises UnexpectedAnswer, TimedOut."""
        self._size += len(chunk)
        if error := self._call.too_long(self._size) or self._call.late():
            raise self._call.end(error)
        self._chunks.append(chunk)

    def broke(self, error: Exception) -> TidewrightError:
        return self._call.end(self._call.broke(error, None))

    def json(self) -> Any:
        """Raises UnexpectedAnswer."""
        try:
            return json.loads(b"".join(self._chunks))
        except (ValueError, RecursionError):
            raise self._call.end(self.unexpected("answered what is not JSON")) from None

    def answer(self) -> Answer:
        """Raises UnexpectedAnswer."""
        try:
            answer = answers.whole(self.json(), self._request_id)
        except answers.ShapeError as error:
            raise self._call.end(self.unexpected(f"answered JSON that is no answer: {error}")) from None
        self._call.over(answer)
        return answer

    def models(self) -> list[str]:
        """Raises UnexpectedAnswer."""
        try:
            models = [str(one["id"]) for one in self.json()["data"]]
        except (TypeError, KeyError):
            raise self._call.end(self.unexpected("answered JSON that is no list of models")) from None
        self._call.over(None)
        return models

    def health(self) -> dict[str, Any]:
        """Raises UnexpectedAnswer."""
        told = self.json()
        if not isinstance(told, dict) or told.get("status") != "ready":
            raise self._call.end(self.unexpected("answered JSON that says nothing of a gateway"))
        self._call.over(None)
        return told

    def unexpected(self, what: str) -> UnexpectedAnswer:
        return explain.unexpected(self._call.settings, what, 200, self._request_id)


class Reader:
    """An answer that is streamed."""

    def __init__(self, call: Call, request_id: str | None) -> None:
        self._call, self._request_id = call, request_id
        self._parser = sse.Parser()
        self._sum = Accumulator(request_id)
        self._has_begun = False
        self.is_done = False
        """[DONE] has come."""
        self.error: TidewrightError | None = None
        """To be raised after the events before it."""

    def feed(self, chunk: bytes) -> list[Event]:
        """The events that end in these bytes, up to an `error`."""
        events: list[Event] = []
        if not chunk or self.is_done or self.error:
            return events
        try:
            for data in self._parser.feed(chunk):
                if data == "[DONE]":
                    self.is_done = True
                    break
                if data:
                    events += self._events_of(data)
        except sse.TooLongError as error:
            self._fail(explain.unexpected(self._call.settings, f"sent no event stream that can be read: {error}"))
        except (ValueError, RecursionError) as error:
            self._fail(explain.unexpected(self._call.settings, f"sent an event that is no part of an answer: {error}"))
        except TidewrightError as error:
            self._fail(error)
        if events and not self._has_begun:
            self._has_begun = True
            self._call.first_token()
        if not (self.is_done or self.error) and (late := self._call.late()):
            self._fail(late)
        return events

    def _events_of(self, data: str) -> list[Event]:
        told = json.loads(data)
        if error := explain.error_in(told):
            raise explain.of_event(self._call.settings, error, self._request_id)
        events = self._sum.chunk(told)
        if too_long := self._call.too_long(self._sum.size):
            raise too_long
        return events

    def _fail(self, error: TidewrightError) -> None:
        error.partial = self.answer()
        if error.request_id is None:
            error.request_id = self._request_id
        self.error = error

    def broke(self, error: Exception) -> None:
        """The connection did."""
        self._fail(self._call.broke(error, self.answer()))

    def ended(self) -> None:
        """The body did."""
        if not (self.is_done or self.error):
            message = f"the stream of {self._call.settings.url} ended without its end; {ASK_AGAIN}"
            self._fail(Interrupted(message))

    def answer(self) -> Answer:
        """So far."""
        return self._sum.answer()

    def close(self) -> None:
        """Nothing more is read."""
        self._call.over(self.answer(), self.error)
