"""Answers of embeddings and scores."""

from __future__ import annotations

from typing import Literal

from tidewright_gateway.document.base import Shown


class PromptUsage(Shown):
    prompt_tokens: int
    total_tokens: int


class Embedding(Shown):
    object: Literal["embedding"]
    index: int
    """Of the text in the input."""
    embedding: list[float] | str
    """Numbers, or base64 of little-endian float32, as encoding_format says."""


class EmbeddingList(Shown):
    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: PromptUsage


class Score(Shown):
    index: int
    object: Literal["score"]
    score: float
    """Cosine similarity."""


class ScoreList(Shown):
    id: str
    object: Literal["list"]
    created: int
    """Seconds since 1970."""
    model: str
    data: list[Score]
    usage: PromptUsage
