"""Answers of Anthropic's Messages API: a Message, or the events that build one.

Both are made of the same steps: consecutive ones of one kind are a content block.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

import msgspec
from pydantic_core import from_json

from tidewright_gateway.context import RequestContext
from tidewright_gateway.openai.answers import Answer, Call, CallDelta, Choice, Part, Step, event
from tidewright_gateway.openai.chat import ChatRequest
from tidewright_gateway.openai.dialect import Dialect
from tidewright_gateway.openai.errors import ApiError
from tidewright_gateway.openai.output import PlainParser, Text

_TEXT, _THINKING = "text", "thinking"


class MessagesAnswer(Answer):
    def __init__(self, context: RequestContext, request: ChatRequest, dialect: Dialect) -> None:
        super().__init__(context)
        self._request, self._dialect = request, dialect
        self._open: str | int | None = None
        """The block that the stream is in, as `_block_of` names it."""
        self._num_blocks = 0

    def choice(self, index: int, *, is_streamed: bool) -> Choice:
        choice = self._dialect.choice(self._context, self._request.tool_use, index, keeps_tokens=False)
        choice.parser = choice.parser or PlainParser()  # steps come from a parser
        choice.keeps_steps = not is_streamed
        return choice

    # Whole.

    def whole(self, choices: Sequence[Choice]) -> bytes:
        (choice,) = choices
        content = [_whole(block, steps, choice) for block, steps in groupby(choice.steps, _block_of)]
        message = {**self._message(choice, content), **self._ending(choice)}
        return json.dumps(message, ensure_ascii=False).encode()  # msgspec has no integers of more than 64 bits

    def _message(self, choice: Choice, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": f"msg_{self._context.request_id}",
            "type": "message",
            "role": "assistant",
            "model": self._request.model,
            "content": content,
            "stop_reason": None,
            "stop_sequence": None,
            "stop_details": None,
            "usage": self._usage(choice),
        }

    def _ending(self, choice: Choice) -> dict[str, Any]:
        is_stop_sequence = choice.finish_reason == "stop" and choice.stop_reason in (self._request.stop or ())
        reason = {"length": "max_tokens", "tool_calls": "tool_use"}.get(choice.finish_reason or "", "end_turn")
        found: dict[str, Any] = {
            "stop_reason": "stop_sequence" if is_stop_sequence else reason,
            "stop_sequence": choice.stop_reason if is_stop_sequence else None,
            "stop_details": None,
        }
        more = {"ended_by": choice.ended_by, "limited_by": self._context.limited_by}  # which Anthropic does not have
        return found | {name: value for name, value in more.items() if value}

    def _usage(self, choice: Choice) -> dict[str, Any]:
        found: dict[str, Any] = {
            "input_tokens": self._context.num_prompt_tokens - self._context.num_cached_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": self._context.num_cached_tokens,
            "output_tokens": self._context.num_tokens,
        }
        if choice.num_reasoning_tokens:
            found["output_tokens_details"] = {"thinking_tokens": choice.num_reasoning_tokens}
        return found

    # Streamed.

    def opening(self, choices: Sequence[Choice]) -> bytes:
        return _event("message_start", message=self._message(choices[0], []))

    def piece(self, choice: Choice, part: Part) -> bytes:
        return b"".join(self._step(block, steps) for block, steps in groupby(part.steps, _block_of))

    def _step(self, block: str | int, steps: Iterable[Step]) -> bytes:
        """What one piece adds to one block."""
        written, added = b"", list(steps)
        if block != self._open:
            written += self._close()
            self._open = block
            written += _event("content_block_start", index=self._num_blocks, content_block=_empty(added[0]))
        if text := "".join(map(_added, added)):
            written += _event("content_block_delta", index=self._num_blocks, delta=_delta(block, text))
        return written

    def _close(self) -> bytes:
        if self._open is None:
            return b""
        self._open, self._num_blocks = None, self._num_blocks + 1
        return _event("content_block_stop", index=self._num_blocks - 1)

    def closing(self, choices: Sequence[Choice]) -> bytes:
        (choice,) = choices
        ending = _event("message_delta", delta=self._ending(choice), usage=self._usage(choice))
        return self._close() + ending + _event("message_stop")

    def failure(self, error: ApiError) -> bytes:
        return event(error.anthropic_body(self._context.request_id), b"error")


def _event(name: str, **fields: Any) -> bytes:
    return event(msgspec.json.encode({"type": name, **fields}), name.encode())


def _block_of(step: Step) -> str | int:
    """The block that a step belongs to, among its neighbours; the index of a call."""
    if isinstance(step, CallDelta):
        return step.call.index
    return _TEXT if isinstance(step, Text) else _THINKING


def _added(step: Step) -> str:
    return step.arguments if isinstance(step, CallDelta) else step.text


def _empty(step: Step) -> dict[str, Any]:
    """The block that begins with this step."""
    if isinstance(step, CallDelta):
        return _tool_use(step.call, {})
    if isinstance(step, Text):
        return {"type": _TEXT, "text": ""}
    return {"type": _THINKING, "thinking": "", "signature": ""}


def _delta(block: str | int, text: str) -> dict[str, Any]:
    if block == _TEXT:
        return {"type": "text_delta", "text": text}
    if block == _THINKING:
        return {"type": "thinking_delta", "thinking": text}
    return {"type": "input_json_delta", "partial_json": text}


def _whole(block: str | int, steps: Iterable[Step], choice: Choice) -> dict[str, Any]:
    if isinstance(block, int):
        call = choice.calls[block]
        return _tool_use(call, _input(call.arguments))
    text = "".join(map(_added, steps))
    return {"type": _TEXT, "text": text} if block == _TEXT else {"type": _THINKING, "thinking": text, "signature": ""}


def _tool_use(call: Call, given: dict[str, Any]) -> dict[str, Any]:
    return {"type": "tool_use", "id": call.id, "name": call.name, "input": given}


def _input(arguments: str) -> dict[str, Any]:
    """As far as they go: the answer may end within them."""
    try:
        found = from_json(arguments or "{}", allow_partial=True, allow_inf_nan=False)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
