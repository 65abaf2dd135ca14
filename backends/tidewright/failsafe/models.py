"""What `failsafe` needs of the models behind it, without Triton; ensemble/failsafe/1/model.py has it from BLS."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from tidewright.resilience.outcome import Outcome
from tidewright.schema import KILLS_ENGINES, FinishReason, SamplingParams

# How the text of an error ends, if it is one of ours.
_BY_REASON: dict[str, Outcome] = {
    "[invalid]": Outcome.INVALID,
    "[cancelled]": Outcome.CANCELLED,
    "[overloaded]": Outcome.OVERLOADED,
    "[timeout]": Outcome.REQUEST_TIMEOUT,
    "[engine_failed]": Outcome.ENGINE_FAILED,
}
_REASONS: dict[Outcome, FinishReason] = {
    Outcome.INVALID: "invalid",
    Outcome.CANCELLED: "cancelled",
    Outcome.OVERLOADED: "overloaded",
    Outcome.REQUEST_TIMEOUT: "timeout",
}


class ModelError(Exception):
    """A model answered with an error, or there is none to answer."""

    def __init__(self, message: str, outcome: Outcome | None = None) -> None:
        text, _, mark = message.rpartition(" ")
        known = _BY_REASON.get(mark)
        super().__init__(text if known else message)
        if known and KILLS_ENGINES in text:
            known = Outcome.ENGINE_KILLED
        self.outcome = outcome or known or (Outcome.STUB_DIED if "Stub process" in message else Outcome.UNAVAILABLE)

    @property
    def reason(self) -> FinishReason:
        return _REASONS.get(self.outcome, "engine_failed")


@dataclass(frozen=True)
class Order:
    """What one attempt asks of a model. All else of the request is the same for every attempt."""

    request_id: str
    sampling: SamplingParams
    resume_ids: list[int]


@dataclass(frozen=True)
class Reply:
    """One response of a model."""

    content: object
    """Of Triton; handed on as it is."""
    token_ids: list[int]
    final: bool


class Request(Protocol):
    """One request of one caller, as Triton has it."""

    fits_fallback: bool
    """The fallback can be asked the same."""
    continues: bool
    """Token ids mean the same to both models: one can go on with what the other began."""

    def generate(self, model: str, order: Order) -> Iterator[Reply]:
        """Must be read to its end, or Triton can't unload the model. Blocks; raises ModelError."""
        ...

    def send(self, reply: Reply, served_by: str, fallback_reason: str, names: bool) -> None:
        """Hand on a response; `names`: with who served it, and why it was not the decoder."""
        ...

    def fail(self, message: str, reason: FinishReason) -> None: ...

    def is_cancelled(self) -> bool:
        """Whether the caller hung up. May be asked until it has ended."""
        ...


class Control(Protocol):
    def __call__(self, model: str, word: str) -> str:
        """The answer of a model to its input `control`. Blocks for up to a second; raises ModelError."""
        ...
