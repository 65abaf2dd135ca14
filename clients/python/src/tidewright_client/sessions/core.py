"""The state of a session without I/O: what is sent, what messages mean, and what is resumed on a new connection.

A generation has credits for a bounded number of tokens that its caller has not taken yet; each that is taken is granted
again. `received` is where it goes on after a break: every token comes once.
"""

from __future__ import annotations

import itertools
import json
import random
import time
from collections import deque
from typing import Any

from tidewright_client import explain, retries
from tidewright_client.answers import Accumulator, Answer, Event, Finish, Text, Usage, UsageReport, optional_text
from tidewright_client.deadline import Deadline
from tidewright_client.errors import (
    ASK_AGAIN,
    ConnectionFailed,
    Interrupted,
    InvalidRequest,
    TidewrightError,
    TimedOut,
    UnexpectedAnswer,
)
from tidewright_client.hooks import CallInfo, tell
from tidewright_client.requests import Request
from tidewright_client.settings import Settings

CREDITS = 256
"""Tokens of a generation that may have come without being taken."""
GRACE = 10.0  # seconds, until the gateway has said how long it keeps a generation
_LONGEST_WAIT = 1.0  # seconds between two attempts to connect again
_FORBIDDEN = ("tools", "stream", "stream_options", "echo")


class GenerationState:
    """One generation, whichever connection it runs over."""

    def __init__(self, settings: Settings, id: str, request: Request, credits: int) -> None:
        self.id, self.credits = id, credits
        self.sum = Accumulator()
        self.error: TidewrightError | None = None
        """To be raised after the events before it."""
        self.is_over = False
        self.is_cancelled = False
        self.resume_token: str | None = None
        """None until the gateway has started it."""
        self.is_running = False
        """Over the connection that there is."""
        self.received = 0
        self.events: deque[tuple[Event, int]] = deque()
        """With the number of tokens that each is worth."""
        self.untaken = self.ungranted = 0  # tokens: that wait in `events`, and that were taken since the last grant
        self._request, self._settings = request, settings
        timeout = settings.timeout if isinstance(request.timeout, type(...)) else request.timeout
        self.deadline = Deadline(timeout, time.monotonic)
        self._info = CallInfo(request.operation, settings.url, request.model, True)
        tell(settings.hooks.on_request, self._info)

    def generate(self) -> str:
        body = dict(self._request.body or {})
        if (timeout := self.deadline.of_server()) is not None:
            body = {"timeout": timeout, **body}
        return _message("generate", id=self.id, request=body, credits=self.credits)

    def resume(self) -> str:
        self.ungranted = 0
        free = self.credits - self.untaken
        return _message(
            "resume", id=self.id, resume_token=self.resume_token, received=[self.received], credits=max(0, free)
        )

    def take(self) -> Event:
        """The next of `events`."""
        event, tokens = self.events.popleft()
        self.untaken -= tokens
        self.ungranted += tokens
        return event

    def grant(self) -> str | None:
        """For what was taken; None while that is little."""
        tokens = self.ungranted
        if not self.is_running or self.is_over or tokens < max(1, self.credits // 2):
            return None
        self.ungranted = 0
        return _message("credit", id=self.id, tokens=tokens)

    def add(self, event: Event, tokens: int = 0) -> None:
        if not (self.events or self.sum.is_begun):
            tell(self._settings.hooks.on_first_token, self._info)
        self.sum.add(event)
        self.events.append((event, tokens))
        self.untaken += tokens

    def token(self, told: dict[str, Any]) -> None:
        """Raises KeyError, TypeError, UnexpectedAnswer."""
        seq, text, tokens = int(told["seq"]), str(told["text"]), len(told["token_ids"])
        if seq <= self.received:
            return
        self.received = seq
        if text:
            self.add(Text(text), tokens)
        else:
            self.ungranted += tokens
        if self.sum.size > (most := self._settings.max_answer_bytes):
            raise explain.too_long(self._settings, most)

    def done(self, told: dict[str, Any]) -> None:
        """Raises KeyError, TypeError, ShapeError."""
        self.sum.served_by(told.get("served_by"))
        (choice,) = told["choices"]
        error = told.get("error")
        if error:
            self.end(_failure(self._settings, error, self.sum.request_id))
        elif choice["seq"] > self.received and not self.is_cancelled:
            self.end(
                Interrupted(f"{self._settings.url} ended the generation before all of its tokens had come; {ASK_AGAIN}")
            )
        else:
            if reason := choice.get("finish_reason"):
                ended_by, limited_by = optional_text(choice, "ended_by"), optional_text(told, "limited_by")
                self.add(Finish(str(reason), ended_by, limited_by))
            usage = told["usage"]
            self.add(UsageReport(Usage(*(int(usage[name]) for name in Usage.__dataclass_fields__))))
            self.end(None)

    def end(self, error: TidewrightError | None) -> None:
        if self.is_over:
            return
        self.is_over, self.is_running = True, False
        if error:
            if self.resume_token is not None:
                error.partial = self.sum.answer()
            error.request_id = error.request_id or self.sum.request_id
            self.error = error
        tell(self._settings.hooks.on_end, self._info, self.sum.answer(), error)

    def late(self) -> TimedOut:
        return TimedOut(
            f"{self._settings.url} did not answer within the request's timeout of {self.deadline.timeout:g} s"
        )

    def answer(self) -> Answer:
        return self.sum.answer()


class SessionCore:
    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.live: dict[str, GenerationState] = {}
        self.is_open = False
        """The connection that there is has been opened."""
        self._grace = GRACE
        self._was_open = False
        self._failures = 0
        """To connect, one after the other."""
        self._lost_at: float | None = None
        self._ids = map(str, itertools.count(1))

    @property
    def address(self) -> str:
        return self.settings.url.replace("http", "ws", 1) + "/v1/stream"

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.settings.key}"} if self.settings.key else {}

    def hello(self) -> str:
        """The first message of a connection."""
        return _message("open")

    def begin(self, request: Request, credits: int) -> GenerationState:
        """Its message is to be sent if the session is open; else it is sent then. Raises InvalidRequest."""
        for name in _FORBIDDEN:
            if name in (request.body or {}):
                raise InvalidRequest(f"a session takes no {name}; use stream_chat of the client", param=name)
        if credits < 1:
            raise InvalidRequest("credits must be at least 1", param="credits")
        generation = GenerationState(self.settings, next(self._ids), request, credits)
        self.live[generation.id] = generation
        return generation

    def cancel(self, generation: GenerationState) -> str | None:
        """What is to be sent, if anything."""
        if generation.is_over or generation.is_cancelled:
            return None
        generation.is_cancelled = True
        if generation.resume_token is None and not self.is_open:  # the gateway does not know of it
            self._remove(generation, None)
            return None
        return _message("cancel", id=generation.id) if self.is_open else None

    def late(self, generation: GenerationState) -> str | None:
        """Its time is over. What is to be sent, if anything."""
        # Not by `cancel`, by which one that the gateway does not know of ends without an error.
        message = _message("cancel", id=generation.id) if self.is_open and not generation.is_cancelled else None
        self._remove(generation, generation.late())
        return message

    def receive(self, text: str | bytes) -> list[str]:
        """What is to be sent for a message. Raises TidewrightError: the session can't go on."""
        try:
            told = json.loads(text)
            return self._receive(told, str(told["type"]))
        except (ValueError, OverflowError, RecursionError, KeyError, TypeError, AttributeError) as error:
            raise explain.unexpected(self.settings, f"sent a message that can't be read ({error!r})") from None

    def _receive(self, told: dict[str, Any], type: str) -> list[str]:
        if type == "opened":
            self._grace = float(told["resume_grace"])
            self.is_open = self._was_open = True
            self._lost_at = None
            return self._again()
        generation = self.live.get(str(told.get("id")))
        if type == "error":
            self._refused(told, generation)
        elif generation is None:
            pass  # such as the rest of one whose time was over
        elif type == "started":
            generation.resume_token = str(told["resume_token"])
            generation.sum.request_id = str(told["request_id"])
            generation.is_running = True
            return [message for message in (generation.grant(),) if message]
        elif type == "token":
            self._failures = 0
            try:
                generation.token(told)
            except UnexpectedAnswer as error:
                message = self.cancel(generation)
                self._remove(generation, error)
                return [message] if message else []
            return [message for message in (generation.grant(),) if message]
        elif type == "done":
            self._failures = 0
            generation.done(told)
            del self.live[generation.id]
        return []

    def _again(self) -> list[str]:
        """Over a new connection: all that is not over."""
        messages = []
        for generation in list(self.live.values()):
            generation.is_running = False
            if generation.deadline.is_over:
                self._remove(generation, generation.late())
                continue
            messages.append(generation.generate() if generation.resume_token is None else generation.resume())
            if generation.is_cancelled:
                messages.append(_message("cancel", id=generation.id))
        return messages

    def _refused(self, told: dict[str, Any], generation: GenerationState | None) -> None:
        error = _failure(self.settings, told, None)
        if generation is None:
            if told.get("id") is None:
                raise error
        elif generation.is_cancelled and error.status == 404:
            self._remove(generation, None)  # its end was lost with the connection
        elif generation.resume_token is None:
            self._remove(generation, error)
        elif not generation.is_running or error.code == "resumed_elsewhere":
            message = f"the generation could not be resumed: {error.message}; {ASK_AGAIN}"
            self._remove(generation, Interrupted(message, status=error.status, code=error.code))
        # Else a message came too late, such as a credit for one that has just ended.

    def lost(self, error: Exception | None, cause: TidewrightError) -> float | None:
        """The connection ended, or none was made. Seconds before the next attempt; None if none is needed now.

        `cause`: what the error means, for the generations that end with it. Its `retry_after` is waited for.
        """
        self.is_open = False
        for generation in self.live.values():
            generation.is_running = False
        if not self.live:
            self._failures, self._lost_at = 0, None
            return None
        now = time.monotonic()
        self._lost_at = now if self._lost_at is None else self._lost_at
        if self._was_open:
            # Without delay, unless the connection before this one brought nothing either.
            wait = min(_LONGEST_WAIT, 0.1 * 2.0**self._failures) * (1 - random.random() / 2) if self._failures else 0.0
            wait = max(wait, cause.retry_after or 0.0)
            is_hopeless = now + wait - self._lost_at > self._grace
        else:
            told = retries.wait_before(self._failures, cause.retry_after, None, random.random)
            wait, is_over = told or 0.0, told is None or self._failures >= self.settings.max_retries
            is_hopeless = is_over or explain.is_hopeless(error or Exception())
        self._failures += 1
        if is_hopeless:
            self._give_up(cause, self._was_open)
            return None
        return wait

    def give_up(self, error: TidewrightError) -> None:
        """All generations end."""
        self._give_up(error, False)

    def _give_up(self, error: TidewrightError, had_connection: bool) -> None:
        self._failures, self._lost_at = 0, None
        for generation in list(self.live.values()):
            if generation.resume_token is not None and (had_connection or isinstance(error, ConnectionFailed)):
                what = error.message
                if had_connection:
                    what = f"the connection broke in the answer, and there was no other for {self._grace:g} s: {what}"
                self._remove(generation, Interrupted(f"{what}; {ASK_AGAIN}"))
            else:
                fields = ("status", "code", "param", "request_id", "retry_after", "said")
                own = type(error)(error.message, **{name: getattr(error, name) for name in fields})
                self._remove(generation, own)

    def _remove(self, generation: GenerationState, error: TidewrightError | None) -> None:
        self.live.pop(generation.id, None)
        generation.end(error)


def _failure(settings: Settings, told: dict[str, Any], request_id: str | None) -> TidewrightError:
    """Of an `error`, or of that of a `done`."""
    retry_after = told.get("retry_after")
    return explain.of_error(
        settings,
        {**told, "message": str(told["message"])},
        int(told["status"]),
        request_id,
        None if retry_after is None else float(retry_after),
    )


def _message(type: str, **fields: Any) -> str:
    return json.dumps({"type": type, **fields}, ensure_ascii=False)
