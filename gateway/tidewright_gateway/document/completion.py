"""Answers of completions."""

from __future__ import annotations

from typing import Literal

from tidewright_gateway.document.base import ABSENT, Shown
from tidewright_gateway.document.generation import (
    Ended,
    FinishReason,
    Generated,
    MaybeEnded,
    PromptLogprobs,
    Usage,
)


class CompletionLogprobs(Shown):
    """Columns, with a row for each token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    """null for the first token of an echoed prompt."""
    top_logprobs: list[dict[str, float] | None] | None
    """By the token's text; null with logprobs: 0."""
    text_offset: list[int]
    """Where the token's text begins, in characters."""


class CompletionChoice(Ended):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason
    token_ids: list[int] = ABSENT
    """With return_token_ids."""
    prompt_token_ids: list[int] = ABSENT
    """With return_token_ids."""
    prompt_logprobs: PromptLogprobs | None = ABSENT
    """With prompt_logprobs: by token id, the prompt's own first. The first token has none."""


class Completion(Generated):
    """The answer to a prompt, or to each of several."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: Usage


class CompletionChunkChoice(MaybeEnded):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    prompt_token_ids: list[int] = ABSENT
    """With return_token_ids, in the first event of a choice."""


class CompletionChunk(Generated):
    """An event of a streamed completion."""

    object: Literal["text_completion"]
    choices: list[CompletionChunkChoice]
    """Empty in the last event with usage."""
    usage: Usage | None = ABSENT
    """With stream_options.include_usage: in the last event, null in others."""
