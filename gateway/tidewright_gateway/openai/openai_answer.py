"""What chat completions and completions share: their objects, and their usage."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import msgspec

from tidewright_gateway.context import RequestContext
from tidewright_gateway.openai.answers import DONE, Answer, Choice, Part, event
from tidewright_gateway.openai.protocol import GenerationBody
from tidewright_gateway.replicas.triton import least_of


class OpenAiAnswer(Answer):
    prefix = whole_object = piece_object = ""

    def __init__(self, context: RequestContext, request: GenerationBody) -> None:
        super().__init__(context)
        self._head = {"id": f"{self.prefix}-{context.request_id}", "created": int(time.time()), "model": request.model}
        self._num_logprobs = request.num_logprobs()
        self._returns_ids = bool(request.return_token_ids)
        options = request.stream_options
        self._with_usage = bool(options and options.include_usage)
        self._with_usage_so_far = self._with_usage and bool(options and options.continuous_usage_stats)
        self._tells_tokens = self._num_logprobs is not None or self._returns_ids or self._with_usage_so_far
        self._served_by = "decoder"

    def whole(self, choices: Sequence[Choice]) -> bytes:
        context = self._context
        served_by = least_of({choice.served_by for choice in choices})
        return msgspec.json.encode(
            {
                **self._head,
                "object": self.whole_object,
                "choices": [self._whole_choice(choice) | self._extras(choice) for choice in choices],
                "usage": self._usage(),
                "served_by": served_by,
                **({"limited_by": context.limited_by} if context.limited_by else {}),
                **self._about_prompt(choices),
            }
        )

    def piece(self, choice: Choice, part: Part) -> bytes:
        self._served_by = least_of({self._served_by, choice.served_by})
        if choice.parser and part.is_empty and not (choice.finish_reason or self._tells_tokens):
            return b""  # its meaning is not certain yet
        made = self._piece_choice(choice, part)
        if self._returns_ids:
            made["token_ids"] = part.token_ids
        if choice.finish_reason:
            made |= self._end_extras(choice)
        limited_by = self._context.limited_by if choice.finish_reason else None
        usage = self._usage() if self._with_usage_so_far else None
        return self._event([made], usage, choice.served_by, limited_by)

    def closing(self, choices: Sequence[Choice]) -> bytes:
        return (self._event([], self._usage(), self._served_by) if self._with_usage else b"") + DONE

    def _about_prompt(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """Fields about the prompt that OpenAI does not have."""
        return {}

    def _extras(self, choice: Choice) -> dict[str, Any]:
        """Fields of a whole choice that OpenAI does not have."""
        return self._end_extras(choice) | ({"token_ids": choice.token_ids} if self._returns_ids else {})

    def _end_extras(self, choice: Choice) -> dict[str, Any]:
        found: dict[str, Any] = {"stop_reason": choice.stop_reason}
        if choice.ended_by:
            found["ended_by"] = choice.ended_by
        return found

    def _usage(self) -> dict[str, Any]:
        context = self._context
        found = usage(context.num_prompt_tokens, context.num_tokens)
        found["prompt_tokens_details"] = {"cached_tokens": context.num_cached_tokens}
        return found

    def _usage_at_first(self) -> dict[str, Any] | None:
        """Of an event before those with tokens."""
        if not self._with_usage_so_far:
            return None
        return self._usage() | usage(self._context.num_prompt_tokens, 0)

    def _event(
        self,
        choices: list[dict[str, Any]],
        usage: dict[str, Any] | None = None,
        served_by: str = "decoder",
        limited_by: str | None = None,
        more: dict[str, Any] | None = None,
    ) -> bytes:
        piece: dict[str, Any] = {**self._head, "object": self.piece_object, "choices": choices, "served_by": served_by}
        if limited_by:
            piece["limited_by"] = limited_by
        if self._with_usage:
            piece["usage"] = usage
        if more:
            piece |= more
        return event(msgspec.json.encode(piece))

    @abstractmethod
    def _whole_choice(self, choice: Choice) -> dict[str, Any]: ...

    @abstractmethod
    def _piece_choice(self, choice: Choice, part: Part) -> dict[str, Any]: ...


def usage(prompt: int, completion: int) -> dict[str, Any]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
