"""All connections of this process and their generations: who may have one, what is kept how long, and the clock."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import NamedTuple, Protocol

from tidewright_gateway.auth.callers import Caller
from tidewright_gateway.config import GatewaySettings
from tidewright_gateway.openai.errors import ApiError
from tidewright_gateway.websocket.resumable import ResumableStream, too_much

log = logging.getLogger(__name__)

SWEEP_INTERVAL = 0.2  # seconds


class Connection(Protocol):
    def check(self, now: float) -> None:
        """Ends it when its time is over. `now`: time.monotonic()."""


class Flow(NamedTuple):
    credits: int
    """Tokens that clients have granted and not yet got."""
    stalled: int
    """Generations that have output and no credit to send it."""
    unsent_bytes: int


class Hub:
    def __init__(self, settings: GatewaySettings) -> None:
        self._grace = settings.ws_resume_grace
        self._max_kept, self._max_bytes, self._max_live = (
            settings.ws_kept,
            settings.ws_kept_bytes,
            settings.ws_live_bytes,
        )
        self.connections: set[Connection] = set()
        self._generations: dict[str, ResumableStream] = {}  # by resume_token
        self._kept: dict[ResumableStream, float] = {}  # and until when; the oldest first
        self._sweeper: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._sweeper = asyncio.create_task(self._sweep_for_ever())

    async def stop(self) -> None:
        """Everything that still runs is cancelled."""
        if self._sweeper:
            self._sweeper.cancel()
        generations = list(self._generations.values())
        for generation in generations:
            self.forget(generation)
        for generation in generations:
            await generation.stopped()

    def add(self, generation: ResumableStream) -> None:
        self._generations[generation.resume_token] = generation

    def find(self, resume_token: str, caller: Caller) -> ResumableStream:
        """
        Raises:
            ApiError: there is none, or it is another caller's.
        """
        generation = self._generations.get(resume_token)
        if generation is None or generation.caller.key_id != caller.key_id:
            message = f"no generation has this resume_token; one is kept for {self._grace:g} s (ws_resume_grace)"
            raise ApiError(404, message, code="unknown_generation", param="resume_token")
        return generation

    def keep(self, generation: ResumableStream) -> None:
        """No connection has it any more, because of its end or of the connection's: for a while it can be resumed."""
        generation.owner = None
        self._kept[generation] = time.monotonic() + self._grace
        if len(self._kept) > self._max_kept:
            self.forget(next(iter(self._kept)))

    def claim(self, generation: ResumableStream) -> None:
        """A connection has it again."""
        self._kept.pop(generation, None)

    def forget(self, generation: ResumableStream) -> None:
        """It is stopped if it runs."""
        generation.owner = None
        generation.stop()
        self._kept.pop(generation, None)
        self._generations.pop(generation.resume_token, None)

    def flow(self) -> Flow:
        """Of all generations that are kept."""
        boxes = [generation.outbox for generation in self._generations.values()]
        return Flow(
            credits=sum(box.credits or 0 for box in boxes),
            stalled=sum(box.credits == 0 and not box.is_sent for box in boxes),
            unsent_bytes=sum(box.unsent for box in boxes),
        )

    def sweep(self, now: float) -> None:
        """Ends what is over. `now`: time.monotonic()."""
        for generation, until in list(self._kept.items()):
            if until > now:
                break
            self.forget(generation)
        # Those that run grow while they are kept, so that the sum is not known between two sweeps.
        size = sum(generation.outbox.size for generation in self._kept)
        while size > self._max_bytes:
            oldest = next(iter(self._kept))
            size -= oldest.outbox.size
            self.forget(oldest)
        generations = self._generations.values()
        if sum(generation.outbox.size for generation in generations) > self._max_live:
            largest = max(generations, key=lambda generation: generation.outbox.size)
            largest.end(
                too_much(
                    f"generations take more than {self._max_live} bytes (ws_live_bytes), this one the most",
                    "ws_live_bytes",
                )
            )
            if largest.owner is None and not largest.is_running:  # it is done, and was not fetched
                self.forget(largest)
        for connection in list(self.connections):
            connection.check(now)

    async def _sweep_for_ever(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_INTERVAL)
            try:
                self.sweep(time.monotonic())
            except Exception:
                log.exception("the WebSocket's sweep went wrong")
