"""Answers requests with the tokens that have come, and counts and times that."""

from __future__ import annotations

import logging
import time

from tidewright.bridge.active_request import ActiveRequest, ids_of
from tidewright.bridge.stats import RequestStats
from tidewright.bridge.traces import BridgeTraces
from tidewright.engine.messages import SequenceOutput
from tidewright.engine.targets import Targets
from tidewright.errors import CancelledError
from tidewright.logs import event
from tidewright.schema import FinishReason

log = logging.getLogger(__name__)


class Answers:
    """For the sender's threads; never two of them with the same request."""

    def __init__(self, stats: RequestStats, traces: BridgeTraces | None, targets: Targets) -> None:
        self._stats, self._traces, self._targets = stats, traces, targets

    def ended(self, request: ActiveRequest, reason: FinishReason, since_arrival: float | None = None) -> None:
        if request.abandoned:  # then it was counted
            return
        self._stats.finished(reason, since_arrival)
        log.debug("ended: %s", reason, extra=event("request_ended", **ids_of(request)))
        if self._traces:
            self._traces.ended(request, reason)

    def answer(self, request: ActiveRequest, arrived: list[list[SequenceOutput]]) -> FinishReason | None:
        """Send what there is to send of one request; why it is over, None if it goes on."""
        new_tokens = [sequence.take(outputs) for sequence, outputs in zip(request.sequences, arrived, strict=True)]
        if failure := request.failure:
            request.responder.fail(failure)
            self.ended(request, failure.reason)
            return failure.reason
        reason = request.finish_reason
        if reason or (request.parsed.stream and request.has_unsent_output):
            response = request.response()
            if reason and request.parsed.returns.timings:
                response.timings = request.timings()
            request.responder.send(response, final=reason is not None)
            for sequence in request.sequences:
                sequence.next_delta()
        if request.abandoned:
            if request.error and not reason:
                request.responder.fail(request.error)
            return CancelledError.reason
        now = time.monotonic()
        self._time_tokens(request, new_tokens, now)
        if reason:
            self.ended(request, reason, now - request.arrived_at)
            if reason in ("stop", "length"):
                self._compare(request, now)
        return reason

    def _compare(self, request: ActiveRequest, now: float) -> None:
        """With the latency targets."""
        sampling = request.parsed.sampling
        ttft, tpot = self._targets.ttft(sampling), self._targets.tpot(sampling)
        # An embedding has no tokens: it is what comes first.
        first = min((sequence.first_sent or now for sequence in request.sequences), default=now) - request.arrived_at
        longest = max(sequence.seconds_per_token for sequence in request.sequences)
        self._stats.within(not ttft or first <= ttft, not tpot or longest <= tpot)

    def _time_tokens(self, request: ActiveRequest, new_tokens: list[int], now: float) -> None:
        """Tokens that leave together share the time since the sequence's last response."""
        first = all(sequence.last_sent is None for sequence in request.sequences)
        for sequence, count in zip(request.sequences, new_tokens, strict=True):
            if not count:
                continue
            if first:
                self._stats.first_token(sequence.queued_seconds, now - request.arrived_at)
                first = False
            if sequence.last_sent is not None:
                self._stats.further_tokens((now - sequence.last_sent) / count, count)
            elif count > 1:
                self._stats.further_tokens(0.0, count - 1)
            sequence.first_sent = sequence.first_sent or now
            sequence.last_sent = now
