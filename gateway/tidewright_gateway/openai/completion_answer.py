"""Answers of completions, with the prompt and its log-probabilities where they are asked for."""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from typing import Any

from tidewright.tokenization import Tokenizer
from tidewright_gateway.context import RequestContext
from tidewright_gateway.openai.answers import Choice, Part
from tidewright_gateway.openai.offsets import Offsets
from tidewright_gateway.openai.openai_answer import OpenAiAnswer
from tidewright_gateway.openai.protocol import CompletionRequest


class CompletionAnswer(OpenAiAnswer):
    prefix, whole_object, piece_object = "cmpl", "text_completion", "text_completion"

    def __init__(self, context: RequestContext, request: CompletionRequest, tokenizer: Tokenizer) -> None:
        super().__init__(context, request)
        self._only_scores = request.only_scores
        self._offsets = functools.cache(lambda index: Offsets(tokenizer, context.generations[index].prompt))

    def choice(self, index: int, *, is_streamed: bool) -> Choice:
        return Choice(index, keeps_logprobs=not is_streamed)

    def opening(self, choices: Sequence[Choice]) -> bytes:
        if not self._context.echoes:
            return b""
        return b"".join(
            self._event(
                [{"index": at.index, "text": self._context.echoes[at.index], "logprobs": None, "finish_reason": None}]
            )
            for at in choices
        )

    def _whole_choice(self, choice: Choice) -> dict[str, Any]:
        echoes = self._context.echoes
        return {
            "index": choice.index,
            "text": (echoes[choice.index] if echoes else "") + choice.text,
            "logprobs": self._logprobs(choice, choice.logprobs),
            "finish_reason": choice.finish_reason,
        }

    def _piece_choice(self, choice: Choice, part: Part) -> dict[str, Any]:
        return {
            "index": choice.index,
            "text": part.text,
            "logprobs": self._logprobs(choice, part.positions),
            "finish_reason": choice.finish_reason,
        }

    def _logprobs(self, choice: Choice, positions: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
        """`positions`: those that `choice` has taken, or taken last."""
        if self._num_logprobs is None:
            return None
        chosen = [next(iter(position.items())) for position in positions]
        # No text follows what has ended, also where tokens of a stop string were cut off.
        end = len(choice.text) if choice.finish_reason else sys.maxsize
        offsets = self._offsets(choice.index)
        return {
            "tokens": [entry["decoded_token"] for _, entry in chosen],
            "token_logprobs": [entry["logprob"] for _, entry in chosen],
            "top_logprobs": [_by_text(position) for position in positions] if self._num_logprobs else None,
            "text_offset": [min(offsets.next(int(id), entry["decoded_token"]), end) for id, entry in chosen],
        }


def _by_text(position: dict[str, Any]) -> dict[str, float]:
    """Two tokens can have the same text: the less likely one is named by its id, as vLLM does."""
    found: dict[str, float] = {}
    for id, entry in sorted(position.items(), key=lambda item: item[1]["rank"]):
        text = entry["decoded_token"]
        found[f"token_id:{id}" if text in found else text] = entry["logprob"]
    return found
