"""What answers of chats and completions share."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tidewright_gateway.admission.limits.store import LimitName
from tidewright_gateway.document.base import ABSENT, Shown

FinishReason = Literal["stop", "length", "tool_calls"]


class PromptTokensDetails(Shown):
    cached_tokens: int
    """Tokens that an engine's prefix cache had."""


class Usage(Shown):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class RankedLogprob(Shown):
    logprob: float
    rank: int
    """1 is the most likely token."""
    decoded_token: str


PromptLogprobs = list[dict[str, RankedLogprob] | None]
"""By token id, the prompt's own token first; the first token of a prompt has none."""


class Generated(Shown):
    """The head of an answer."""

    id: str
    created: int = Field(ge=0)
    """Seconds since 1970."""
    model: str
    served_by: Literal["decoder", "smaller", "fallback"]
    """`fallback`: the small model answered, as the main one could not; `smaller`: a variant of the model, by load."""
    limited_by: LimitName = ABSENT
    """The caller's limit that ended it early."""


class Ended(Shown):
    """Of a choice that has ended."""

    stop_reason: str | int | None
    """The stop text or the token id that ended it."""
    ended_by: str = ABSENT
    """What ended it early where OpenAI has no word for it, such as `timeout`; finish_reason is `length` then."""


class MaybeEnded(Shown):
    """Of a choice of a chunk; its last one has a finish_reason."""

    finish_reason: FinishReason | None
    stop_reason: str | int | None = ABSENT
    """The stop text or the token id that ended it; only in its last chunk."""
    ended_by: str = ABSENT
    """What ended it early where OpenAI has no word for it, such as `timeout`; finish_reason is `length` then."""
    token_ids: list[int] = ABSENT
    """With return_token_ids."""
