"""Answers of chat completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tidewright.tokenization import Tokenizer
from tidewright_gateway.context import RequestContext
from tidewright_gateway.openai.answers import CallDelta, Choice, Part
from tidewright_gateway.openai.chat import ChatRequest
from tidewright_gateway.openai.dialect import Dialect
from tidewright_gateway.openai.logprobs import Position, TokenEntries
from tidewright_gateway.openai.openai_answer import OpenAiAnswer


class ChatAnswer(OpenAiAnswer):
    prefix, whole_object, piece_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, context: RequestContext, request: ChatRequest, dialect: Dialect, tokenizer: Tokenizer) -> None:
        super().__init__(context, request)
        self._request, self._dialect = request, dialect
        skips = request.skip_special_tokens is not False
        self._entries = TokenEntries(tokenizer, self._num_logprobs or 0, skip_special_tokens=skips)

    def choice(self, index: int, *, is_streamed: bool) -> Choice:
        return self._dialect.choice(self._context, self._request.tool_use, index, keeps_tokens=not is_streamed)

    def opening(self, choices: Sequence[Choice]) -> bytes:
        more = self._about_prompt(choices)
        return b"".join(self._opening(choice.index, more) for choice in choices)

    def _opening(self, index: int, more: dict[str, Any]) -> bytes:
        delta = {"role": "assistant", "content": ""}
        opened = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        return self._event([opened], self._usage_at_first(), more=more)

    def _about_prompt(self, choices: Sequence[Choice]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if self._returns_ids:
            found["prompt_token_ids"] = self._context.generations[0].prompt
        if self._request.prompt_logprobs is not None:
            found["prompt_logprobs"] = choices[0].prompt_logprobs
        return found

    def _whole_choice(self, choice: Choice) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
        if choice.reasoning:
            message["reasoning_content"] = choice.reasoning
        if choice.calls:
            message["content"] = choice.text or None
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in choice.calls
            ]
        return {
            "index": choice.index,
            "message": message,
            "logprobs": self._logprobs(choice.logprobs),
            "finish_reason": choice.finish_reason,
        }

    def _piece_choice(self, choice: Choice, part: Part) -> dict[str, Any]:
        delta: dict[str, Any] = {}
        if part.text or (part.token_ids and choice.parser is None):
            delta["content"] = part.text
        if part.reasoning:
            delta["reasoning_content"] = part.reasoning
        if part.calls:
            delta["tool_calls"] = _deltas(part.calls)
        return {
            "index": choice.index,
            "delta": delta,
            "logprobs": self._logprobs(part.positions),
            "finish_reason": choice.finish_reason,
        }

    def _logprobs(self, positions: Sequence[Position]) -> dict[str, Any] | None:
        if self._num_logprobs is None:
            return None
        return {"content": self._entries.of(positions), "refusal": None}


def _deltas(calls: Sequence[CallDelta]) -> list[dict[str, Any]]:
    """One for each call: the head of a new one has the first part of its arguments."""
    found: dict[int, dict[str, Any]] = {}
    for delta in calls:
        if delta.is_new:
            function = {"name": delta.call.name, "arguments": ""}
            found[delta.call.index] = {
                "index": delta.call.index,
                "id": delta.call.id,
                "type": "function",
                "function": function,
            }
        one = found.setdefault(delta.call.index, {"index": delta.call.index, "function": {"arguments": ""}})
        one["function"]["arguments"] += delta.arguments
    return list(found.values())
