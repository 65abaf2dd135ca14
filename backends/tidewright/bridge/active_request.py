"""A request in flight: its caller, its deadline, its n sequences, and how it ends.

`request.py` has the request as it was sent; here is what has come of it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from tidewright.bridge.output_sequence import ANSWERED, OutputSequence, seconds_since
from tidewright.bridge.request import GenerationRequest
from tidewright.bridge.response import Responder, Response
from tidewright.engine.messages import SequenceOutput
from tidewright.errors import RequestError, TimedOutError, seconds_text
from tidewright.schema import ATTEMPT, FinishReason, Timings
from tidewright.tokenization import Tokenizer
from tidewright.tracing.trace_context import TraceParent


@dataclass(frozen=True)
class Origin:
    """Where a request comes from, for logs and traces."""

    trace: TraceParent
    is_tritons: bool
    """Triton traces it too: the span in `trace` is Triton's own."""


class ActiveRequest:
    """One request. `RequestsInFlight.changed` guards `error` and `abandoned`; the rest is the sender's."""

    def __init__(
        self,
        parsed: GenerationRequest,
        responder: Responder,
        tokenizer: Tokenizer,
        engine_request_ids: list[int],
        arrived_at: float,
        deadline: float | None,
        client_id: str = "",
        origin: Origin | None = None,
    ) -> None:
        self.origin = origin
        self.validated_at = time.monotonic()
        self.parsed = parsed
        self.responder = responder
        self.client_id = client_id  # empty if the client gave none
        self.arrived_at = arrived_at  # time.monotonic()
        self.deadline = deadline  # likewise
        self.error: RequestError | None = None
        self.abandoned = False  # Triton took no response for so long that it was given up
        self.askable = True  # Triton can be asked whether its client hung up
        self.sequences = [OutputSequence(self, index, id_, tokenizer) for index, id_ in enumerate(engine_request_ids)]

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why it ended, once all sequences have ended."""
        reasons = [sequence.delta.finish_reason for sequence in self.sequences]
        return None if None in reasons else next(reason for reason in ANSWERED if reason in reasons)

    @property
    def failure(self) -> RequestError | None:
        """The error that it ends with, if it does: all of its sequences then share that fate."""
        for sequence in self.sequences:
            if sequence.refusal:
                return sequence.refusal
        if self.finish_reason is None:
            return self.error
        has_tokens = self.parsed.resume_ids or any(sequence.num_tokens for sequence in self.sequences)
        if self.finish_reason == "timeout" and not has_tokens:
            return TimedOutError(
                self.sequences[0].timeout_message
                or f"timed out after {seconds_text(self.parsed.sampling.timeout)} s while queued, "
                "before the first token; raise timeout, or try again when fewer requests wait"
            )
        return None

    @property
    def has_unsent_output(self) -> bool:
        return any(sequence.delta.text or sequence.delta.token_ids for sequence in self.sequences)

    @property
    def trace_id(self) -> str:
        """For logs; empty if its caller gave none."""
        return self.origin.trace.trace_id if self.origin else ""

    def end_overdue(self, why: str) -> None:
        """Ends it, although no engine has: none is up, or it hangs. With `RequestsInFlight.changed` held."""
        message = f"timed out after {seconds_text(self.parsed.sampling.timeout)} s; {why}"
        for sequence in self.sequences:
            if not sequence.overdue:
                sequence.overdue = True
                sequence.arrived.append(SequenceOutput(sequence.engine_request_id, [], "timeout", message=message))

    def timings(self) -> Timings:
        """As of now, which is its end."""
        now = time.monotonic()
        return Timings(
            arrived=time.time() - (now - self.arrived_at),
            validated=seconds_since(self.arrived_at, self.validated_at),
            ended=seconds_since(self.arrived_at, now),
            triton_span=self.origin.trace.span_id if self.origin and self.origin.is_tritons else "",
            sequences=[sequence.timings() for sequence in self.sequences],
        )

    def response(self) -> Response:
        """What has come since the last response."""
        # All sequences share the prompt; the first one reports it.
        first = self.sequences[0]
        return Response([sequence.delta for sequence in self.sequences], first.prompt_logprobs, first.num_cached_tokens)


def ids_of(request: ActiveRequest) -> dict[str, str | None]:
    """For log lines: the caller's id, and of a request of failsafe which attempt at it this is."""
    request_id, _, attempt = request.client_id.partition(ATTEMPT)
    return {"request_id": request_id or None, "attempt": attempt or None, "trace_id": request.trace_id or None}
