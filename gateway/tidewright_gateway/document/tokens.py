"""Answers about tokens."""

from __future__ import annotations

from tidewright_gateway.document.base import Shown


class Tokenized(Shown):
    tokens: list[int]
    count: int
    max_model_len: int
    """Tokens of prompt and answer that the model takes."""


class Detokenized(Shown):
    prompt: str


class TokenCount(Shown):
    input_tokens: int
