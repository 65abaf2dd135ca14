"""Requests in flight: hands them to the engine, makes text of its tokens, and ends each exactly once.

Five threads meet here. Triton's calls `submit`; the feeder gives the engine its work (feeder.py), the engine client's
delivers tokens; the sender turns them into responses; the canceller asks Triton who hung up. Only the sender answers a
request once it was submitted.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import threading
import time

from tidewright.bridge.call import Call, Part, Responder
from tidewright.bridge.engine_client import EngineClient, EngineEvents
from tidewright.bridge.feeder import Feeder
from tidewright.bridge.outgoing import Outgoing
from tidewright.bridge.request import GenerationRequest
from tidewright.bridge.statistics import EngineFigures, RequestStatistics
from tidewright.config import Settings
from tidewright.engine.messages import EngineConfig, EngineStats, Ready, SequenceOutput
from tidewright.errors import (
    CancelledError,
    EngineUnavailableError,
    InvalidRequestError,
    OverloadedError,
    RequestError,
    TimedOutError,
)
from tidewright.schema import ATTEMPT, DRAINING, DecoderStatus, FinishReason
from tidewright.tokenization import Tokenizer

log = logging.getLogger(__name__)

CANCEL_POLL_INTERVAL = 0.01  # seconds
CANCEL_POLL_SHARE = 0.05  # of one core, at most: asking Triton is a round trip to its process
MAX_FAILED_STARTS = 3  # in a row; then nobody waits for the engine any longer


class Bridge:
    """Owns the engine client and every request between Triton and the engine."""

    def __init__(self, settings: Settings, config: EngineConfig, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._limit, self._max_waiting = config.max_running + config.max_waiting, config.max_waiting
        self._ids = itertools.count(1)
        self._calls: dict[Call, None] = {}  # in order of arrival
        self._parts: dict[int, Part] = {}  # sequences that have not ended, by the engine's request id
        self._changed = threading.Condition()
        self._outgoing = Outgoing(self._changed)
        self._streaming_share = settings.streaming_share
        self._stopping = threading.Event()
        self._grace = settings.shutdown_grace
        self._draining = False
        self._client = EngineClient(
            config,
            EngineEvents(self._on_outputs, self._on_stats, self._on_up, self._on_lost),
            start_timeout=settings.start_timeout,
            heartbeat_timeout=settings.heartbeat_timeout,
        )
        self._threads = [
            threading.Thread(target=self._send_loop, name="sender", daemon=True),
            threading.Thread(target=self._cancel_loop, name="canceller", daemon=True),
        ]
        self._feeder = Feeder(self._client.send, self._give_up)
        self._failed_starts = 0  # of engines, since one was up
        self._failing = ""  # why nobody waits for the engine any longer
        self._engine_figures = EngineFigures()
        self.statistics = RequestStatistics()
        self.engine: Ready | None = None
        """What the running engine said of itself; kept while it restarts."""

    @property
    def engine_up(self) -> bool:
        return self._client.available

    @property
    def trouble(self) -> str:
        """Why nobody should send requests here now; empty if all is well.

        A heart that beats stands for all ranks: see engine/process.py.
        """
        if self._draining:
            return DRAINING
        return "" if self._client.available else f"the engine is not available ({self._client.cause})"

    @property
    def status(self) -> DecoderStatus:
        stats = self.engine_stats
        with self._changed:
            arrived = [call.arrived_at for call in self._calls if not any(part.has_new_tokens for part in call.parts)]
        return DecoderStatus(
            trouble=self.trouble,
            draining=self._draining,
            silence=self._client.silence(),
            waiting=stats.waiting / max(self._max_waiting, 1),
            wait=time.monotonic() - min(arrived) if arrived else 0.0,
            kv_usage=stats.kv_usage,
            active=self.active,
            max_model_len=self.engine.max_model_len if self.engine else 0,
            pid=os.getpid(),
        )

    @property
    def engine_restarts(self) -> int:
        return self._client.restarts

    @property
    def engine_stats(self) -> EngineStats:
        """Gauges of the running engine, zero without one; counters over all engines that there were."""
        return self._engine_figures.read()

    @property
    def active(self) -> int:
        """Requests in flight."""
        return len(self._calls)

    def start(self) -> None:
        """Start the engine and wait for its model; raises `EngineStartError`."""
        self._feeder.start()
        try:
            self._client.start()
        except Exception:
            self._feeder.stop()
            raise
        for thread in self._threads:
            thread.start()

    def drain(self) -> None:
        """Take no new requests; those in flight get `shutdown_grace` seconds, then they end with the reason."""
        with self._changed:
            if self._draining:
                return
            self._draining = True
        message = f"the server is shutting down, and {self._grace:g} s (shutdown_grace) were not enough to finish"
        timer = threading.Timer(self._grace, self._fail_all, [message])
        timer.daemon = True
        timer.start()

    def stop(self) -> None:
        """End the engine; what is still in flight ends with `EngineUnavailableError`."""
        self._client.stop()
        self._feeder.stop()
        self._fail_all("the server is shutting down")
        self._stopping.set()
        with self._changed:
            self._outgoing.stop()
        for thread in self._threads:
            thread.join()

    def submit(self, request: GenerationRequest, responder: Responder, client_id: str = "") -> None:
        """Queue a valid request; its answer comes through `responder`. `client_id` is what `cancel` calls it.

        Raises:
            TimedOutError: its timeout is over already, and its caller has no tokens, which would be the answer.
            OverloadedError: as many sequences as may run and wait are already in flight.
            InvalidRequestError: it has more sequences than may ever be in flight.
            EngineUnavailableError: the engine does not come up again, or the server is draining.
        """
        arrived_at = time.monotonic()
        sampling = request.sampling
        deadline = None if sampling.timeout is None else arrived_at + sampling.timeout
        if deadline is not None and deadline <= time.monotonic() and not request.resume_ids:
            raise TimedOutError(f"timed out at once: timeout is {sampling.timeout:g} s; raise it or leave it out")
        ids = [next(self._ids) for _ in range(sampling.n)]
        call = Call(request, responder, self._tokenizer, ids, arrived_at, deadline, client_id)
        with self._changed:
            if self._draining:
                raise EngineUnavailableError("the server is shutting down; send the request to another")
            if self._failing:
                raise EngineUnavailableError(self._failing)
            self._check_room(sampling.n)
            self._calls[call] = None
            self._parts.update((part.request_id, part) for part in call.parts)
            self._changed.notify_all()
        for part in call.parts:
            self._feeder.submit(part)

    def cancel(self, client_id: str) -> int:
        """End the requests of that id, which their clients chose, or that attempt at one; how many are in flight."""
        with self._changed:
            found = [
                call for call in self._calls if client_id in (call.client_id, call.client_id.partition(ATTEMPT)[0])
            ]
            for call in found:
                self._fail(call, CancelledError("cancelled by its id"))
        return len(found)

    def _check_room(self, n: int) -> None:
        if n > self._limit:
            raise InvalidRequestError(
                f"n is {n}, but only {self._limit} sequences (max_running + max_waiting) may be in flight"
            )
        if len(self._parts) + n > self._limit:
            raise OverloadedError(
                f"{len(self._parts)} requests are running or waiting, each of n counted, and max_running + "
                f"max_waiting allow {self._limit}; try again later"
            )

    def _on_outputs(self, outputs: list[SequenceOutput]) -> None:
        with self._changed:
            for output in outputs:
                part = self._parts.get(output.request_id)
                if part is None:
                    continue
                is_first = not part.has_new_tokens
                part.arrived.append(output)
                part.token_ids += output.token_ids
                part.progressed = True
                if part.deaths:
                    self._feeder.acquit(part)
                self._wake_sender(part.call, urgent=is_first or output.finish_reason is not None)

    def _on_stats(self, stats: EngineStats) -> None:
        self._engine_figures.update(stats)

    def _on_up(self, ready: Ready) -> None:
        self.engine = ready
        # A GPU's work is not held up.
        on_cpu = ready.device.startswith("cpu")
        self._outgoing.share = self._streaming_share * len(os.sched_getaffinity(0)) if on_cpu else 1.0
        self._failed_starts, self._failing = 0, ""
        self._feeder.engine_up()

    def _on_lost(self, cause: str) -> None:
        self._engine_figures.engine_lost()
        self._feeder.engine_lost()
        self._failed_starts += 1
        if self._failed_starts > MAX_FAILED_STARTS:  # the first was up
            self._failing = (
                f"the engine died, and {MAX_FAILED_STARTS} starts failed since ({cause}); see the server's log"
            )
            self._fail_all(self._failing)

    def _give_up(self, part: Part) -> None:
        with self._changed:
            self._fail(part.call, EngineUnavailableError("the engine died again and again over this request"))

    def _fail_all(self, message: str) -> None:
        with self._changed:
            for call in self._calls:
                self._fail(call, EngineUnavailableError(message))

    def _fail(self, call: Call, error: RequestError) -> None:
        """With `_changed` held: let the sender end it with an error, unless it has one."""
        call.error = call.error or error
        self._wake_sender(call, urgent=True)

    def _wake_sender(self, call: Call, urgent: bool) -> None:
        """With `_changed` held. An ended call must not be answered again, as when a cancel is noticed meanwhile."""
        if call in self._calls:
            self._outgoing.add(call, urgent)

    def _send_loop(self) -> None:
        while True:
            with self._changed:
                calls = self._outgoing.take()
            if not calls:
                return
            began = time.monotonic()
            for call in calls:
                self._send(call)
            self._outgoing.sent(time.monotonic() - began)

    def _send(self, call: Call) -> None:
        with self._changed:
            arrived = [part.arrived for part in call.parts]
            for part in call.parts:
                part.arrived = []
        try:
            reason = self._answer(call, arrived)
        except Exception:
            log.exception("a request could not be answered")
            with contextlib.suppress(Exception):  # it may have ended before it went wrong
                call.responder.fail(RequestError("the response could not be made; see the server's log"))
            reason = RequestError.reason
            self.statistics.finished(reason)
        self._forget(call, call.parts if reason else [part for part in call.parts if part.over])

    def _answer(self, call: Call, arrived: list[list[SequenceOutput]]) -> FinishReason | None:
        """Send what there is to send of one call; why it is over, None if it goes on."""
        new_tokens = [part.take(outputs) for part, outputs in zip(call.parts, arrived, strict=True)]
        if failure := call.failure:
            call.responder.fail(failure)
            self.statistics.finished(failure.reason)
            return failure.reason
        reason = call.finish_reason
        if reason or (call.request.stream and call.has_news):
            call.responder.send(call.chunk(), final=reason is not None)
            for part in call.parts:
                part.next_piece()
        now = time.monotonic()
        self._time_tokens(call, new_tokens, now)
        if reason:
            self.statistics.finished(reason, now - call.arrived_at)
        return reason

    def _time_tokens(self, call: Call, new_tokens: list[int], now: float) -> None:
        """Tokens that leave together share the time since the sequence's last response."""
        first = all(part.last_sent is None for part in call.parts)
        for part, count in zip(call.parts, new_tokens, strict=True):
            if not count:
                continue
            if first:
                self.statistics.first_token(part.queued_seconds, now - call.arrived_at)
                first = False
            if part.last_sent is not None:
                self.statistics.further_tokens((now - part.last_sent) / count, count)
            elif count > 1:
                self.statistics.further_tokens(0.0, count - 1)
            part.last_sent = now

    def _forget(self, call: Call, ended: list[Part]) -> None:
        """Drop sequences that have ended here, and abort those that the engine still has."""
        with self._changed:
            dropped = [part for part in ended if self._parts.pop(part.request_id, None)]
            if len(ended) == len(call.parts):
                self._calls.pop(call, None)
                self._outgoing.discard(call)
        for part in dropped:
            self._feeder.drop(part)

    def _cancel_loop(self) -> None:
        while not self._stopping.is_set():
            with self._changed:
                self._changed.wait_for(lambda: self._calls or self._stopping.is_set())
                # Triton never says of a call from model to model that it was cancelled: failsafe does, by its id.
                calls = [call for call in self._calls if call.error is None and ATTEMPT not in call.client_id]
            began = time.monotonic()
            for call in calls:
                if call.responder.is_cancelled():
                    with self._changed:
                        self._fail(call, CancelledError("cancelled by the client"))
            took = time.monotonic() - began
            self._stopping.wait(max(CANCEL_POLL_INTERVAL, took / CANCEL_POLL_SHARE))
