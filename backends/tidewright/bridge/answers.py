"""What a request is answered with what has come of it, and what the statistics learn of that."""

from __future__ import annotations

import logging
import time

from tidewright.bridge.call import Call, ids_of
from tidewright.bridge.statistics import RequestStatistics
from tidewright.bridge.traces import BridgeTraces
from tidewright.engine.messages import SequenceOutput
from tidewright.errors import CancelledError
from tidewright.logs import event
from tidewright.schema import FinishReason

log = logging.getLogger(__name__)


class Answers:
    """For the sender's threads; never two of them with the same call."""

    def __init__(self, statistics: RequestStatistics, traces: BridgeTraces | None = None) -> None:
        self._statistics, self._traces = statistics, traces

    def ended(self, call: Call, reason: FinishReason, since_arrival: float | None = None) -> None:
        if call.abandoned:  # then it was counted
            return
        self._statistics.finished(reason, since_arrival)
        log.debug("ended: %s", reason, extra=event("request_ended", **ids_of(call)))
        if self._traces:
            self._traces.ended(call, reason)

    def answer(self, call: Call, arrived: list[list[SequenceOutput]]) -> FinishReason | None:
        """Send what there is to send of one call; why it is over, None if it goes on."""
        new_tokens = [part.take(outputs) for part, outputs in zip(call.parts, arrived, strict=True)]
        if failure := call.failure:
            call.responder.fail(failure)
            self.ended(call, failure.reason)
            return failure.reason
        reason = call.finish_reason
        if reason or (call.request.stream and call.has_news):
            chunk = call.chunk()
            if reason and call.request.returns.timings:
                chunk.timings = call.timings()
            call.responder.send(chunk, final=reason is not None)
            for part in call.parts:
                part.next_piece()
        if call.abandoned:
            if call.error and not reason:
                call.responder.fail(call.error)
            return CancelledError.reason
        now = time.monotonic()
        self._time_tokens(call, new_tokens, now)
        if reason:
            self.ended(call, reason, now - call.arrived_at)
        return reason

    def _time_tokens(self, call: Call, new_tokens: list[int], now: float) -> None:
        """Tokens that leave together share the time since the sequence's last response."""
        first = all(part.last_sent is None for part in call.parts)
        for part, count in zip(call.parts, new_tokens, strict=True):
            if not count:
                continue
            if first:
                self._statistics.first_token(part.queued_seconds, now - call.arrived_at)
                first = False
            if part.last_sent is not None:
                self._statistics.further_tokens((now - part.last_sent) / count, count)
            elif count > 1:
                self._statistics.further_tokens(0.0, count - 1)
            part.last_sent = now
