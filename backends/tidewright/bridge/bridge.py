"""Requests in flight: hands them to the engine, makes text of its tokens, and ends each exactly once.

Four threads meet here. Triton's calls `submit`; the engine client's delivers tokens; the sender turns them into
responses; the canceller asks Triton who hung up. Only the sender answers a request once it was submitted.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
import time

import msgspec

from tidewright.bridge.call import Call, Part, Responder
from tidewright.bridge.engine_client import EngineClient, EngineEvents
from tidewright.bridge.request import GenerationRequest
from tidewright.bridge.statistics import EngineFigures, RequestStatistics
from tidewright.config import Settings
from tidewright.engine.messages import Abort, EngineConfig, EngineStats, Ready, SequenceOutput, Submit
from tidewright.errors import (
    CancelledError,
    EngineUnavailableError,
    InvalidRequestError,
    OverloadedError,
    RequestError,
    TimedOutError,
)
from tidewright.schema import FinishReason, SamplingParams
from tidewright.tokenization import Tokenizer

log = logging.getLogger(__name__)

CANCEL_POLL_INTERVAL = 0.01  # seconds
CANCEL_POLL_SHARE = 0.05  # of one core, at most: asking Triton is a round trip to its process


class Bridge:
    """Owns the engine client and every request between Triton and the engine."""

    def __init__(self, settings: Settings, config: EngineConfig, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._limit = settings.max_running + settings.max_waiting
        self._ids = itertools.count(1)
        self._calls: dict[Call, None] = {}  # in order of arrival
        self._parts: dict[int, Part] = {}  # sequences that have not ended, by the engine's request id
        self._dirty: dict[Call, None] = {}  # have something for the sender; in order of arrival
        self._changed = threading.Condition()
        self._stopping = threading.Event()
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
        self._engine_figures = EngineFigures()
        self.statistics = RequestStatistics()
        self.engine: Ready | None = None
        """What the running engine said of itself; kept while it restarts."""

    @property
    def engine_up(self) -> bool:
        return self._client.available

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
        self._client.start()
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End the engine; what is still in flight ends with `EngineUnavailableError`."""
        self._client.stop()
        self._fail_all("the server is shutting down")
        self._stopping.set()
        with self._changed:
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def submit(self, request: GenerationRequest, responder: Responder) -> None:
        """Queue a valid request; its answer comes through `responder`.

        Raises:
            TimedOutError: its timeout is over already.
            OverloadedError: as many sequences as may run and wait are already in flight.
            InvalidRequestError: it has more sequences than may ever be in flight.
            EngineUnavailableError: the engine is restarting.
        """
        arrived_at = time.monotonic()
        sampling = request.sampling
        deadline = None if sampling.timeout is None else arrived_at + sampling.timeout
        if deadline is not None and deadline <= time.monotonic():
            raise TimedOutError(f"timed out at once: timeout is {sampling.timeout:g} s; raise it or leave it out")
        call = Call(request, responder, self._tokenizer, [next(self._ids) for _ in range(sampling.n)], arrived_at)
        with self._changed:
            self._check_room(sampling.n)
            self._calls[call] = None
            self._parts.update((part.request_id, part) for part in call.parts)
            self._changed.notify_all()
        try:
            for index, part in enumerate(call.parts):
                self._client.send(
                    Submit(
                        part.request_id,
                        request.prompt_token_ids,
                        _sampling_of(sampling, index),
                        deadline,
                        request.bad_words_ids,
                    )
                )
        except EngineUnavailableError:
            self._forget(call, call.parts)
            raise
        with self._changed:
            call.submitted = True
            if call.error or any(part.arrived for part in call.parts):
                self._wake_sender(call)

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
                if part is not None:
                    part.arrived.append(output)
                    self._wake_sender(part.call)

    def _on_stats(self, stats: EngineStats) -> None:
        self._engine_figures.update(stats)

    def _on_up(self, ready: Ready) -> None:
        self.engine = ready

    def _on_lost(self, cause: str) -> None:
        self._engine_figures.engine_lost()
        self._fail_all(f"the engine died while it worked on this request ({cause}); it is being restarted")

    def _fail_all(self, message: str) -> None:
        with self._changed:
            for call in self._calls:
                self._fail(call, EngineUnavailableError(message))

    def _fail(self, call: Call, error: RequestError) -> None:
        """With `_changed` held: let the sender end it with an error, unless it has one."""
        call.error = call.error or error
        self._wake_sender(call)

    def _wake_sender(self, call: Call) -> None:
        """With `_changed` held. Before all of a call is submitted it must not end: its aborts would come too early.

        After its end it must not be answered again, as when a cancel is noticed while the last response goes out.
        """
        if call.submitted and call in self._calls:
            self._dirty[call] = None
            self._changed.notify_all()

    def _send_loop(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._dirty or self._stopping.is_set())
                if not self._dirty:
                    return
                call = next(iter(self._dirty))
                del self._dirty[call]
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
                self._dirty.pop(call, None)
        for part in dropped:
            if not part.engine_is_done:
                with contextlib.suppress(EngineUnavailableError):  # then there is nothing left to abort
                    self._client.send(Abort(part.request_id))

    def _cancel_loop(self) -> None:
        while not self._stopping.is_set():
            with self._changed:
                self._changed.wait_for(lambda: self._calls or self._stopping.is_set())
                calls = [call for call in self._calls if call.submitted and call.error is None]
            began = time.monotonic()
            for call in calls:
                if call.responder.is_cancelled():
                    with self._changed:
                        self._fail(call, CancelledError("cancelled by the client"))
            took = time.monotonic() - began
            self._stopping.wait(max(CANCEL_POLL_INTERVAL, took / CANCEL_POLL_SHARE))


def _sampling_of(sampling: SamplingParams, index: int) -> SamplingParams:
    """What the engine gets for one of n sequences: its own seed; and the prompt, which all share, is reported once."""
    if index == 0:
        return sampling
    assert sampling.seed is not None
    return msgspec.structs.replace(sampling, seed=(sampling.seed + index) % 2**63, prompt_logprobs=None)
