"""What comes of a request to Triton: pieces of an answer, whole answers, embeddings, the state of a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tidewright_client.answers import Answer, Usage


@dataclass(frozen=True, slots=True)
class Logprob:
    """One token at one position, as the model gave it."""

    logprob: float
    rank: int
    """1 is the most likely one."""
    text: str


TokenLogprobs = dict[int, Logprob]
"""By token id: the token at one position, and the most likely ones there."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of an answer. What was not asked for, or comes with another piece, is None."""

    text: str
    token_ids: list[int]
    finish_reason: str | None = None
    """In the last piece of an output: `stop`, `length` or `timeout`."""
    index: int = 0
    """Of its output, where `n` asks for several."""
    served_by: str = ""
    """The model that answered: `decoder` or `fallback`."""
    fallback_reason: str | None = None
    """Why it was not the decoder."""
    logprobs: list[TokenLogprobs] | None = None
    """Of each token of this piece, if asked for."""
    cumulative_logprob: float | None = None
    """Of the output's tokens so far, if logprobs were asked for."""
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    """Of the prompt, with the first piece, if asked for."""
    stop_reason: str | int | None = None
    """In the last piece: the stop string or token id that ended the text."""
    num_prompt_tokens: int | None = None
    """None if token ids were sent."""
    num_cached_tokens: int | None = None
    """With the first piece: prompt tokens that the prefix cache had."""


@dataclass(frozen=True)
class Output:
    """One output of a prompt, as far as it came."""

    text: str
    token_ids: list[int]
    finish_reason: str | None
    logprobs: list[TokenLogprobs] | None = None
    cumulative_logprob: float | None = None
    stop_reason: str | int | None = None


@dataclass(frozen=True)
class TritonAnswer(Answer):
    """An answer; `text` and `finish_reason` are those of the first output."""

    outputs: tuple[Output, ...] = ()
    fallback_reason: str | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    num_cached_tokens: int | None = None

    @property
    def token_ids(self) -> list[int]:
        return self.outputs[0].token_ids if self.outputs else []


@dataclass(frozen=True)
class Embedding:
    vector: list[float]
    num_prompt_tokens: int
    request_id: str


@dataclass(frozen=True)
class Health:
    """Whether a model takes requests; true if it does."""

    ok: bool
    trouble: str = ""
    """Why not."""

    def __bool__(self) -> bool:
        return self.ok


@dataclass(frozen=True)
class Status:
    """The answer to `status`; docs/api.md says what each field means."""

    trouble: str
    draining: bool
    silence: float
    waiting: float
    wait: float
    kv_usage: float
    active: int = 0
    max_model_len: int = 0
    max_running: int = 0
    embedding_size: int = 0
    model: str = ""
    protocol: int = 1
    fields: Mapping[str, Any] = field(default_factory=dict)
    """All that the server said, also what this client does not know."""


@dataclass
class _Parts:
    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    last: Piece | None = None


class Collector:
    """Pieces that add up to an answer."""

    def __init__(self, request_id: str, model: str, num_outputs: int = 1, prompt_tokens: int | None = None) -> None:
        """`prompt_tokens`: if they are known before the server tells them."""
        self._request_id, self._model = request_id, model
        self._parts = [_Parts() for _ in range(num_outputs)]
        self._prompt_tokens = prompt_tokens
        self._cached: int | None = None
        self._prompt_logprobs: list[TokenLogprobs | None] | None = None
        self._served_by: str | None = None
        self._fallback_reason: str | None = None

    def add(self, pieces: Iterable[Piece]) -> None:
        for piece in pieces:
            parts = self._parts[piece.index]
            parts.texts.append(piece.text)
            parts.token_ids += piece.token_ids
            if piece.logprobs is not None:
                parts.logprobs = [*(parts.logprobs or ()), *piece.logprobs]
            parts.last = piece
            self._served_by = piece.served_by or self._served_by
            self._fallback_reason = piece.fallback_reason or self._fallback_reason
            self._prompt_logprobs = self._prompt_logprobs or piece.prompt_logprobs
            if piece.num_prompt_tokens is not None:
                self._prompt_tokens = piece.num_prompt_tokens
            if piece.num_cached_tokens is not None:
                self._cached = piece.num_cached_tokens

    def answer(self) -> TritonAnswer:
        """What came so far."""
        outputs = tuple(map(_output, self._parts))
        reason = outputs[0].finish_reason
        completion = sum(len(output.token_ids) for output in outputs)
        usage = None
        if self._prompt_tokens is not None:
            usage = Usage(self._prompt_tokens, completion, self._prompt_tokens + completion)
        return TritonAnswer(
            text=outputs[0].text,
            finish_reason=reason,
            ended_by="timeout" if reason == "timeout" else None,
            usage=usage,
            request_id=self._request_id,
            served_by=self._served_by,
            model=self._model,
            outputs=outputs,
            fallback_reason=self._fallback_reason,
            prompt_logprobs=self._prompt_logprobs,
            num_cached_tokens=self._cached,
        )


def _output(parts: _Parts) -> Output:
    last = parts.last
    return Output(
        "".join(parts.texts),
        parts.token_ids,
        last.finish_reason if last else None,
        parts.logprobs,
        last.cumulative_logprob if last else None,
        last.stop_reason if last else None,
    )
