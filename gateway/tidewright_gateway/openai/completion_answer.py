"""Answers of completions, with the prompt and its log-probabilities where they are asked for."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from tidewright.tokenization import Tokenizer
from tidewright_gateway.context import RequestContext
from tidewright_gateway.openai.answers import Choice, Part
from tidewright_gateway.openai.offsets import Offsets
from tidewright_gateway.openai.openai_answer import OpenAiAnswer, usage
from tidewright_gateway.openai.protocol import CompletionRequest

Entry = dict[str, Any]
"""`{logprob, rank, decoded_token}`"""


class CompletionAnswer(OpenAiAnswer):
    prefix, whole_object, piece_object = "cmpl", "text_completion", "text_completion"

    def __init__(self, context: RequestContext, request: CompletionRequest, tokenizer: Tokenizer) -> None:
        super().__init__(context, request)
        self._request, self._tokenizer = request, tokenizer
        skips = request.skip_special_tokens is not False
        self._offsets = functools.cache(lambda index: Offsets(tokenizer, context.generations[index].prompt, skips))
        self._unopened = set(range(len(context.generations)))  # choices of which a stream has nothing yet

    def choice(self, index: int, *, is_streamed: bool) -> Choice:
        return Choice(index, keeps_tokens=not is_streamed)

    def piece(self, choice: Choice, part: Part) -> bytes:
        written = b""
        if choice.index in self._unopened and self._context.echoes:
            echo = {"text": self._echo(choice), "logprobs": self._prompt_logprobs(choice)}
            opened = {"index": choice.index, **echo, "finish_reason": None, **self._opened(choice)}
            written = self._event([opened], self._usage_at_first())
        return written + super().piece(choice, part)

    def _opened(self, choice: Choice) -> dict[str, Any]:
        """What the first piece of a choice has beside others."""
        is_first = choice.index in self._unopened
        self._unopened.discard(choice.index)
        return self._prompt_ids(choice) if is_first else {}

    def _prompt_ids(self, choice: Choice) -> dict[str, Any]:
        return {"prompt_token_ids": self._context.generations[choice.index].prompt} if self._returns_ids else {}

    def _whole_choice(self, choice: Choice) -> dict[str, Any]:
        of_prompt, own = self._prompt_logprobs(choice), self._own_logprobs(choice, choice.logprobs)
        joined = (
            own and {name: values and [*values, *own[name]] for name, values in of_prompt.items()} if of_prompt else own
        )
        return {
            "index": choice.index,
            "text": self._echo(choice) + self._own_text(choice.text),
            "logprobs": joined,
            "finish_reason": choice.finish_reason,
        }

    def _piece_choice(self, choice: Choice, part: Part) -> dict[str, Any]:
        return {
            "index": choice.index,
            "text": self._own_text(part.text),
            "logprobs": self._own_logprobs(choice, part.positions),
            "finish_reason": choice.finish_reason,
            **self._opened(choice),
        }

    def _extras(self, choice: Choice) -> dict[str, Any]:
        found = super()._extras(choice) | self._prompt_ids(choice)
        if self._request.prompt_logprobs is not None:
            found["prompt_logprobs"] = choice.prompt_logprobs
        return found

    def _usage(self) -> dict[str, Any]:
        found = super()._usage()
        return found | usage(self._context.num_prompt_tokens, 0) if self._request.only_scores else found

    def _echo(self, choice: Choice) -> str:
        return self._context.echoes[choice.index] if self._context.echoes else ""

    def _own_text(self, text: str) -> str:
        return "" if self._request.only_scores else text

    def _own_logprobs(self, choice: Choice, positions: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
        """`positions`: those that `choice` has taken, or taken last."""
        if self._num_logprobs is None:
            return None
        if self._request.only_scores:
            positions = ()
        begin = len(self._echo(choice))
        # No text follows what has ended, also where tokens of a stop string were cut off.
        end = begin + len(choice.text) if choice.finish_reason else sys.maxsize
        offsets = self._offsets(choice.index)
        chosen = [next(iter(position.items())) for position in positions]
        at = [min(begin + offsets.next(int(id), entry["decoded_token"]), end) for id, entry in chosen]
        return self._columns([entry for _, entry in chosen], positions, at)

    def _prompt_logprobs(self, choice: Choice) -> dict[str, Any] | None:
        """Of the echo."""
        if self._num_logprobs is None or not self._context.echoes or choice.prompt_logprobs is None:
            return None
        prompt = self._context.generations[choice.index].prompt
        added, end = self._tokenizer.num_added(prompt), len(self._echo(choice))
        offsets = Offsets(self._tokenizer, [], skip_special_tokens=False)
        entries, at = [], []
        for number, (token_id, position) in enumerate(zip(prompt, choice.prompt_logprobs, strict=True)):
            text = self._tokenizer.token_text(token_id)
            entries.append(position[str(token_id)] if position else {"decoded_token": text, "logprob": None})
            at.append(min(offsets.next(token_id, text), end) if number >= added else 0)
        return self._columns(entries, choice.prompt_logprobs, at)

    def _columns(
        self, chosen: Sequence[Entry], positions: Iterable[dict[str, Any] | None], offsets: list[int]
    ) -> dict[str, Any]:
        return {
            "tokens": [entry["decoded_token"] for entry in chosen],
            "token_logprobs": [entry["logprob"] for entry in chosen],
            "top_logprobs": [position and _by_text(position) for position in positions] if self._num_logprobs else None,
            "text_offset": offsets,
        }


def _by_text(position: dict[str, Any]) -> dict[str, float]:
    """Two tokens can have the same text: the less likely one is named by its id, as vLLM does."""
    found: dict[str, float] = {}
    for id, entry in sorted(position.items(), key=lambda item: item[1]["rank"]):
        text = entry["decoded_token"]
        found[f"token_id:{id}" if text in found else text] = entry["logprob"]
    return found
