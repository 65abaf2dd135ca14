"""One request on its way: its n sequences, the text of each, and what its next response will carry."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Literal, Protocol

from tidewright.bridge.request import GenerationRequest
from tidewright.bridge.text_stream import TextStream
from tidewright.engine.messages import SequenceOutput, StepTimes, TokenLogprob
from tidewright.errors import (
    EngineUnavailableError,
    InvalidRequestError,
    OverloadedError,
    RequestError,
    TimedOutError,
)
from tidewright.schema import ATTEMPT, FinishReason, SequenceTimings, Timings
from tidewright.tokenization import Tokenizer
from tidewright.tracing.trace_context import TraceParent

# Ends that have an answer. The first of them that one of n sequences had is the reason of the whole request.
_ANSWERED: tuple[FinishReason, ...] = ("timeout", "length", "stop")


@dataclass(slots=True)
class Piece:
    """What one response carries of one sequence."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    logprobs: list[list[TokenLogprob]] = field(default_factory=list)
    cumulative_logprob: float = 0.0  # of the sequence so far
    stop_reason: str | int | None = None  # the stop string, or the one of stop_token_ids, that ended it
    embedding: bytes | None = None  # of the prompt, instead of all of the above: little-endian float32


@dataclass(slots=True)
class Chunk:
    """What one response carries: a piece of each sequence, in their order."""

    pieces: list[Piece]
    # Of prompt tokens 1, 2, …; once, if the caller asked for it.
    prompt_logprobs: list[list[TokenLogprob]] | None = None
    # Prompt tokens that the prefix cache had; with the first tokens.
    num_cached_tokens: int | None = None
    # Of the whole request; with the last response, if the caller asked for it.
    timings: Timings | None = None


class Responder(Protocol):
    """The way back to one caller."""

    def send(self, chunk: Chunk, final: bool) -> None: ...

    def fail(self, error: RequestError) -> None: ...

    def is_cancelled(self) -> bool: ...


MAX_EVENTS = 32  # preemptions and replays of a sequence that are kept


@dataclass(frozen=True)
class Origin:
    """Where a request comes from, for logs and traces."""

    trace: TraceParent
    is_tritons: bool
    """Triton traces it too: the span in `trace` is Triton's own."""


class Part:
    """One of a call's sequences: a request of its own for the engine.

    `Bridge._changed` guards `arrived` and `overdue`. The engine client's thread writes `token_ids` and `progressed`
    while an engine has it, the feeder's in between; `deaths` is the feeder's. The rest is the sender's alone.
    """

    def __init__(self, call: Call, index: int, request_id: int, tokenizer: Tokenizer) -> None:
        self.call = call
        self.index = index  # among the call's
        self.request_id = request_id
        self.arrived: list[SequenceOutput] = []
        self.token_ids = list(call.request.resume_ids)  # all that came, also those that are not sent yet
        self.progressed = False  # tokens came since an engine was given it last
        self.deaths = 0  # of engines that had it, since a token came
        self.overdue = False  # its timeout passed, and no engine ended it
        self.piece = Piece(text=call.request.echo)
        self.prompt_logprobs: list[list[TokenLogprob]] | None = None
        self.num_cached_tokens: int | None = None
        self.num_tokens = 0
        self.last_sent: float | None = None  # time.monotonic() of its latest tokens
        self.queued_seconds = 0.0
        self.refusal: RequestError | None = None
        self.timeout_message = ""
        self.engine_is_done = False
        # For traces; times of time.monotonic().
        self.sent_at: float | None = None  # the feeder's
        self.ended_at: float | None = None
        self.events: list[tuple[Literal["preempted", "replayed"], float]] = []  # the sender's and the feeder's
        self._times: StepTimes | None = None
        self._cached_tokens = 0
        self._stop_token_ids = call.request.sampling.stop_token_ids
        self._text = TextStream(tokenizer, call.request.prompt_token_ids, call.request.sampling)
        for token_id in call.request.resume_ids:
            self._text.push(token_id)  # the caller has that text

    @property
    def has_new_tokens(self) -> bool:
        return len(self.token_ids) > len(self.call.request.resume_ids)

    @property
    def over(self) -> bool:
        return self.piece.finish_reason is not None

    def happened(self, what: Literal["preempted", "replayed"], at: float) -> None:
        if len(self.events) < MAX_EVENTS:
            self.events.append((what, at))

    def given(self, at: float) -> None:
        """To an engine."""
        if self.deaths:
            self.happened("replayed", at)
        if not self.has_new_tokens:
            self.sent_at = at

    def timings(self) -> SequenceTimings:
        arrived_at, times = self.call.arrived_at, self._times
        return SequenceTimings(
            sent=None if self.sent_at is None else _since(arrived_at, self.sent_at),
            began=_since(arrived_at, times.began) if times else None,
            chunks=times.chunks if times else 0,
            cached_tokens=self._cached_tokens,
            first_token=_since(arrived_at, times.first_token) if times else None,
            ended=None if self.ended_at is None else _since(arrived_at, self.ended_at),
            tokens=self.num_tokens,
            events=[(what, _since(arrived_at, at)) for what, at in self.events],
        )

    def take(self, outputs: list[SequenceOutput]) -> int:
        """Add tokens to the next piece, up to and including the one that ends the sequence; return how many."""
        before = self.num_tokens
        for output in outputs:
            if self.over or self.refusal:
                break
            self._take_tokens(output)
            if output.finish_reason is not None:
                self.engine_is_done = True
                self._take_end(output, output.finish_reason)
        if self.over and self.ended_at is None:
            self.ended_at = time.monotonic()
        return self.num_tokens - before

    def next_piece(self) -> None:
        """The piece was sent: begin the next one."""
        done = self.piece
        self.piece = Piece("", [], done.finish_reason, [], done.cumulative_logprob, done.stop_reason)
        self.prompt_logprobs = self.num_cached_tokens = None

    def _take_tokens(self, output: SequenceOutput) -> None:
        piece = self.piece
        piece.embedding = output.embedding
        if output.times is not None:
            self._take_times(output, output.times)
        if output.prompt_logprobs is not None:
            self.prompt_logprobs = output.prompt_logprobs
        if output.token_ids and not self.num_tokens:
            self.queued_seconds = output.queued_seconds
            self.num_cached_tokens = output.cached_tokens
        num_shown = len(output.token_ids)
        if output.finish_reason == "stop" and not self.call.request.sampling.include_stop_str_in_output:
            num_shown -= 1  # the token that ended it
        for index, token_id in enumerate(output.token_ids):
            if index < num_shown:
                piece.text += self._text.push(token_id)
            piece.token_ids.append(token_id)
            self.num_tokens += 1
            if output.logprobs is not None:
                piece.logprobs.append(output.logprobs[index])
                piece.cumulative_logprob += output.logprobs[index][0].logprob
            if self._text.stopped_by is not None:
                piece.finish_reason, piece.stop_reason = "stop", self._text.stopped_by
                return

    def _take_times(self, output: SequenceOutput, times: StepTimes) -> None:
        if times.began and self._times is None:  # a further engine tells its own
            self._times, self._cached_tokens = times, output.cached_tokens
        for at in times.preempted:
            self.happened("preempted", at)

    def _take_end(self, output: SequenceOutput, reason: FinishReason) -> None:
        if self.over:
            return
        piece, message = self.piece, output.message
        if reason in _ANSWERED:
            piece.text += self._text.finish()
            piece.finish_reason, piece.stop_reason = reason, self._text.stopped_by
            if piece.stop_reason is not None:
                piece.finish_reason = "stop"
            elif reason == "stop" and piece.token_ids and piece.token_ids[-1] in self._stop_token_ids:
                piece.stop_reason = piece.token_ids[-1]
            self.timeout_message = message
        elif reason == "invalid":
            # The bridge checked all that it knows, so this is a limit that only the engine knows.
            self.refusal = InvalidRequestError(message or "the engine refused the request; see its log")
        elif reason == "overloaded":
            self.refusal = OverloadedError(message or "the engine has no room for the request; try again later")
        else:
            self.refusal = EngineUnavailableError(message or f"the engine ended the request: {reason}")


class Call:
    """One request of one caller. `Bridge._changed` guards `error` and `abandoned`; the rest is the sender's."""

    def __init__(
        self,
        request: GenerationRequest,
        responder: Responder,
        tokenizer: Tokenizer,
        request_ids: list[int],
        arrived_at: float,
        deadline: float | None,
        client_id: str = "",
        origin: Origin | None = None,
    ) -> None:
        self.origin = origin
        self.validated_at = time.monotonic()
        self.request = request
        self.responder = responder
        self.client_id = client_id  # empty if the client gave none
        self.arrived_at = arrived_at  # time.monotonic()
        self.deadline = deadline  # likewise
        self.error: RequestError | None = None
        self.abandoned = False  # Triton took no response for so long that it was given up
        self.askable = True  # Triton can be asked whether its client hung up
        self.parts = [Part(self, index, id_, tokenizer) for index, id_ in enumerate(request_ids)]

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why it ended, once all sequences have ended."""
        reasons = [part.piece.finish_reason for part in self.parts]
        return None if None in reasons else next(reason for reason in _ANSWERED if reason in reasons)

    @property
    def failure(self) -> RequestError | None:
        """The error that it ends with, if it does: all of its sequences then share that fate."""
        for part in self.parts:
            if part.refusal:
                return part.refusal
        if self.finish_reason is None:
            return self.error
        has_tokens = self.request.resume_ids or any(part.num_tokens for part in self.parts)
        if self.finish_reason == "timeout" and not has_tokens:
            return TimedOutError(
                self.parts[0].timeout_message
                or f"timed out after {self.request.sampling.timeout:.3g} s while queued, before the first token; "
                "raise timeout, or try again when fewer requests wait"
            )
        return None

    @property
    def has_news(self) -> bool:
        return any(part.piece.text or part.piece.token_ids for part in self.parts)

    @property
    def trace_id(self) -> str:
        """For logs; empty if its caller gave none."""
        return self.origin.trace.trace_id if self.origin else ""

    def end_overdue(self, why: str) -> None:
        """Ends it, although no engine has: none is up, or it hangs. With `Bridge._changed` held."""
        message = f"timed out after {self.request.sampling.timeout:g} s; {why}"
        for part in self.parts:
            if not part.overdue:
                part.overdue = True
                part.arrived.append(SequenceOutput(part.request_id, [], "timeout", message=message))

    def timings(self) -> Timings:
        """As of now, which is its end."""
        now = time.monotonic()
        return Timings(
            arrived=time.time() - (now - self.arrived_at),
            validated=_since(self.arrived_at, self.validated_at),
            ended=_since(self.arrived_at, now),
            triton_span=self.origin.trace.span_id if self.origin and self.origin.is_tritons else "",
            sequences=[part.timings() for part in self.parts],
        )

    def chunk(self) -> Chunk:
        # Of the prompt, which all sequences share, only the first one tells.
        first = self.parts[0]
        return Chunk([part.piece for part in self.parts], first.prompt_logprobs, first.num_cached_tokens)


def _since(arrived_at: float, at: float) -> float:
    """In seconds, to the microsecond: as text, more is noise."""
    return round(at - arrived_at, 6)


def ids_of(call: Call) -> dict[str, str | None]:
    """For log lines: the caller's id, and of a request of failsafe which attempt at it this is."""
    request_id, _, attempt = call.client_id.partition(ATTEMPT)
    return {"request_id": request_id or None, "attempt": attempt or None, "trace_id": call.trace_id or None}
