"""A generation that outlives its connection: it runs, and whichever connection has it asks for what to send next."""

from __future__ import annotations

import asyncio
import logging
import secrets
from contextlib import AbstractAsyncContextManager, aclosing
from typing import Protocol

from tidewright.logs.events import INTERNAL_ERROR, event
from tidewright.resilience.errors import ModelError
from tidewright_gateway.auth.callers import Caller
from tidewright_gateway.openai.answers import public_reason
from tidewright_gateway.openai.errors import ApiError, internal, of_model
from tidewright_gateway.openai.openai_answer import usage
from tidewright_gateway.websocket.backend import Backend, Kind, RunningRequest
from tidewright_gateway.websocket.messages import ChoiceEnd, Done, Failure, Token
from tidewright_gateway.websocket.outbox import Outbox

log = logging.getLogger(__name__)

LITTLE = 64 * 1024  # bytes that may wait of one generation without a look at its connection's others


class Owner(Protocol):
    """The connection that a generation goes to."""

    unsent_limit: int
    """Bytes that may wait for it, of all its generations."""

    @property
    def unsent(self) -> int:
        """Bytes that do."""

    def ready(self, generation: ResumableStream) -> None:
        """It may have something to send."""

    def give_up(self, generation: ResumableStream) -> None:
        """Another connection has it now."""


class ResumableStream:
    def __init__(self, caller: Caller, credits: int | None, num_choices: int = 1) -> None:
        """`num_choices`: as far as it can be seen before the request has been looked at."""
        self.caller = caller
        self.request_id = secrets.token_hex(12)
        self.resume_token = secrets.token_urlsafe(16)
        self.outbox = Outbox(credits, num_choices)
        self.id = ""
        """What its owner calls it."""
        self.owner: Owner | None = None
        self.is_dropped = False
        """Nothing but its `done` is sent any more: its client has cancelled it, or has left too much untaken."""
        self.is_running = True
        self._running: RunningRequest | None = None
        self._ended_by: ApiError | None = None
        self._job: asyncio.Task[None] | None = None
        self._failure: Failure | None = None

    def start(self, backend: Backend, kind: Kind, body: bytes, credential: str | None) -> None:
        self._job = asyncio.create_task(self._run(backend.run(kind, body, credential, self.request_id)))
        self._job.add_done_callback(self._ended)

    async def _run(self, running: AbstractAsyncContextManager[RunningRequest]) -> None:
        async with running as self._running:
            self.outbox.expect(self._running.num_choices)
            async with aclosing(self._running.replies) as replies:
                async for index, reply in replies:
                    self.outbox.put(index, reply)
                    self._changed()
                    self._check_unsent()

    def _check_unsent(self) -> None:
        """Raises ApiError: the client leaves too much untaken, of this and its other generations."""
        if self.outbox.unsent < LITTLE or self.owner is None:
            return
        if self.owner.unsent > (limit := self.owner.unsent_limit):
            raise too_much(
                f"{limit} bytes wait for this connection (ws_unsent_bytes): take them, or grant credit",
                "ws_unsent_bytes",
            )

    def _ended(self, job: asyncio.Task[None]) -> None:
        self.is_running = False
        error: BaseException | None = self._ended_by
        if error is None and not job.cancelled():
            error = job.exception()
        if isinstance(error, ModelError | ApiError):
            error = of_model(error)
        elif error is not None:
            log.error("a request went wrong", exc_info=error, extra=event(INTERNAL_ERROR, request_id=self.request_id))
            error = internal()
        if error is not None:
            self._failure = Failure.of(error)
        self._changed()

    def end(self, error: ApiError) -> None:
        """The gateway ends it. If it has ended by itself, the output that its client has not taken is dropped."""
        if self.is_running:
            self._ended_by = error
            self.stop()
            return
        self._failure, self.is_dropped = self._failure or Failure.of(error), True
        self.outbox.drop()
        self._changed()

    def _changed(self) -> None:
        if self.owner:
            self.owner.ready(self)

    def grant(self, tokens: int) -> None:
        self.outbox.grant(tokens)
        self._changed()

    def cancel(self) -> None:
        """It stops soon; its `done` is what is left to send."""
        self.is_dropped = True
        self.stop()
        self._changed()

    def stop(self) -> None:
        if self._job:
            self._job.cancel()

    async def stopped(self) -> None:
        if self._job:
            await asyncio.wait((self._job,))

    def next_message(self) -> Token | Done | None:
        """After `Done` there is no other."""
        if not self.is_dropped and (piece := self.outbox.take()):
            return Token(self.id, piece.index, piece.seq, piece.text, piece.token_ids, piece.logprobs)
        if self.is_running or not (self.is_dropped or self.outbox.is_sent):
            return None
        return Done(
            self.id,
            [self._choice_end(index, seq, reason) for index, (seq, reason) in enumerate(self.outbox.ends)],
            usage(self._running.usage_prompt if self._running else 0, self.outbox.num_tokens),
            self._running.served_by if self._running else "",
            self._running.limited_by if self._running else None,
            self._failure,
        )

    def _choice_end(self, index: int, seq: int, reason: str | None) -> ChoiceEnd:
        if reason is None:
            return ChoiceEnd(index, seq, None if self._failure else "cancelled")
        return ChoiceEnd(index, seq, *public_reason(reason))


def too_much(message: str, limit: str) -> ApiError:
    return ApiError(429, message, code="not_taken", may_retry=False, limit=limit)
