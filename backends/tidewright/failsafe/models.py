"""What `failsafe` needs of the models behind it, without Triton; ensemble/failsafe/1/model.py has it from BLS."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from tidewright.schema import FinishReason, SamplingParams


@dataclass(frozen=True)
class Order:
    """What one attempt asks of a model. All else of the request is the same for every attempt."""

    request_id: str
    sampling: SamplingParams
    resume_ids: list[int]


@dataclass(frozen=True)
class ModelReply:
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

    def generate(self, model: str, order: Order) -> Iterator[ModelReply]:
        """Must be read to its end, or Triton can't unload the model. Blocks; raises ModelError."""
        ...

    def send(self, reply: ModelReply, served_by: str, fallback_reason: str, names: bool) -> None:
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
