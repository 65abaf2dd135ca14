"""One of a request's n output sequences: its tokens so far, their text, and what the next response carries of it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Literal

from tidewright.bridge.response import Delta
from tidewright.bridge.text_stream import TextStream
from tidewright.engine.messages import SequenceOutput, StepTimes, TokenLogprob
from tidewright.errors import EngineUnavailableError, InvalidRequestError, OverloadedError, RequestError
from tidewright.schema import FinishReason, SequenceTimings
from tidewright.tokenization import Tokenizer

if TYPE_CHECKING:
    from tidewright.bridge.active_request import ActiveRequest

# Reasons that end a sequence with an answer. A request ends with the first of them that one of its sequences has.
ANSWERED: tuple[FinishReason, ...] = ("timeout", "length", "stop")
MAX_EVENTS = 32  # preemptions and replays of a sequence that are kept


class OutputSequence:
    """`RequestsInFlight.changed` guards `arrived` and `overdue`. The engine client's thread writes `token_ids` and
    `progressed` while an engine has it, the feeder's in between; `accepted` and `deaths` are the feeder's. The rest is
    the sender's alone.
    """

    def __init__(self, request: ActiveRequest, index: int, engine_request_id: int, tokenizer: Tokenizer) -> None:
        self.request = request
        self.index = index  # among the request's
        self.engine_request_id = engine_request_id  # the engine takes each sequence as a request
        self.arrived: list[SequenceOutput] = []
        self.token_ids = list(request.parsed.resume_ids)  # all that came, also those that are not sent yet
        self.progressed = False  # tokens came since an engine was given it last
        self.accepted = False  # given to an engine, or held for one
        self.deaths = 0  # of engines that had it, since a token came
        self.overdue = False  # its timeout passed, and no engine ended it
        self.delta = Delta(text=request.parsed.echo)
        self.prompt_logprobs: list[list[TokenLogprob]] | None = None
        self.num_cached_tokens: int | None = None
        self.num_tokens = 0
        self.first_sent: float | None = None  # time.monotonic() of its first tokens,
        self.last_sent: float | None = None  # and of its latest
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
        self._stop_token_ids = request.parsed.sampling.stop_token_ids
        self._text = TextStream(tokenizer, request.parsed.prompt_token_ids, request.parsed.sampling)
        for token_id in request.parsed.resume_ids:
            self._text.push(token_id)  # the caller has that text

    @property
    def has_new_tokens(self) -> bool:
        return len(self.token_ids) > len(self.request.parsed.resume_ids)

    @property
    def seconds_per_token(self) -> float:
        """Between its first and its last token, on average; 0 if there is only one."""
        if self.first_sent is None or self.last_sent is None:
            return 0.0
        return (self.last_sent - self.first_sent) / max(self.num_tokens - 1, 1)

    @property
    def over(self) -> bool:
        return self.delta.finish_reason is not None

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
        arrived_at, times = self.request.arrived_at, self._times
        return SequenceTimings(
            sent=None if self.sent_at is None else seconds_since(arrived_at, self.sent_at),
            began=seconds_since(arrived_at, times.began) if times else None,
            chunks=times.chunks if times else 0,
            cached_tokens=self._cached_tokens,
            first_token=seconds_since(arrived_at, times.first_token) if times else None,
            ended=None if self.ended_at is None else seconds_since(arrived_at, self.ended_at),
            tokens=self.num_tokens,
            events=[(what, seconds_since(arrived_at, at)) for what, at in self.events],
        )

    def take(self, outputs: list[SequenceOutput]) -> int:
        """Add tokens to the next delta, up to and including the one that ends the sequence; return how many."""
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

    def next_delta(self) -> None:
        """The delta was sent: begin the next one."""
        done = self.delta
        self.delta = Delta("", [], done.finish_reason, [], done.cumulative_logprob, done.stop_reason)
        self.prompt_logprobs = self.num_cached_tokens = None

    def _take_tokens(self, output: SequenceOutput) -> None:
        delta = self.delta
        delta.embedding = output.embedding
        if output.times is not None:
            self._take_times(output, output.times)
        if output.prompt_logprobs is not None:
            self.prompt_logprobs = output.prompt_logprobs
        if output.token_ids and not self.num_tokens:
            self.queued_seconds = output.queued_seconds
            self.num_cached_tokens = output.cached_tokens
        num_shown = len(output.token_ids)
        if output.finish_reason == "stop" and not self.request.parsed.sampling.include_stop_str_in_output:
            num_shown -= 1  # the token that ended it
        for index, token_id in enumerate(output.token_ids):
            if index < num_shown:
                delta.text += self._text.push(token_id)
            delta.token_ids.append(token_id)
            self.num_tokens += 1
            if output.logprobs is not None:
                delta.logprobs.append(output.logprobs[index])
                delta.cumulative_logprob += output.logprobs[index][0].logprob
            if self._text.stopped_by is not None:
                delta.finish_reason, delta.stop_reason = "stop", self._text.stopped_by
                return

    def _take_times(self, output: SequenceOutput, times: StepTimes) -> None:
        if times.began and self._times is None:  # a further engine tells its own
            self._times, self._cached_tokens = times, output.cached_tokens
        for at in times.preempted:
            self.happened("preempted", at)

    def _take_end(self, output: SequenceOutput, reason: FinishReason) -> None:
        if self.over:
            return
        delta, message = self.delta, output.message
        if reason in ANSWERED:
            delta.text += self._text.finish()
            delta.finish_reason, delta.stop_reason = reason, self._text.stopped_by
            if delta.stop_reason is not None:
                delta.finish_reason = "stop"
            elif reason == "stop" and delta.token_ids and delta.token_ids[-1] in self._stop_token_ids:
                delta.stop_reason = delta.token_ids[-1]
            self.timeout_message = message
        elif reason == "invalid":
            # The bridge checked all that it knows, so this is a limit that only the engine knows.
            self.refusal = InvalidRequestError(message or "the engine refused the request; see its log")
        elif reason == "overloaded":
            self.refusal = OverloadedError(message or "the engine has no room for the request; try again later")
        else:
            self.refusal = EngineUnavailableError(message or f"the engine ended the request: {reason}")


def seconds_since(arrived_at: float, at: float) -> float:
    """In seconds, to the microsecond: as text, more is noise."""
    return round(at - arrived_at, 6)
