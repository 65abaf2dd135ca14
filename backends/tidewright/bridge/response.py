"""A response to a request, and the way back to its caller."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from tidewright.engine.messages import TokenLogprob
from tidewright.errors import RequestError
from tidewright.schema import FinishReason, Timings


@dataclass(slots=True)
class Delta:
    """What a sequence got since the last response."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    logprobs: list[list[TokenLogprob]] = field(default_factory=list)
    cumulative_logprob: float = 0.0  # of the sequence so far
    stop_reason: str | int | None = None  # the stop string, or the one of stop_token_ids, that ended it
    embedding: bytes | None = None  # of the prompt, instead of all of the above: little-endian float32


@dataclass(slots=True)
class Response:
    """What one response carries: a delta of each sequence, in order."""

    deltas: list[Delta]
    # Of prompt tokens 1, 2, …; once, if the caller asked for it.
    prompt_logprobs: list[list[TokenLogprob]] | None = None
    # Prompt tokens that the prefix cache had; with the first tokens.
    num_cached_tokens: int | None = None
    # Of the whole request; with the last response, if the caller asked for it.
    timings: Timings | None = None


class Responder(Protocol):
    """The way back to one caller."""

    def send(self, response: Response, final: bool) -> None: ...

    def fail(self, error: RequestError) -> None: ...

    def is_cancelled(self) -> bool: ...
