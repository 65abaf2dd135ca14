"""What the server answers: events of a stream, whole answers, and how the first add up to the second. No I/O."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Union


class ShapeError(ValueError):
    """JSON of another shape than an answer's."""


@dataclass(frozen=True)
class Usage:
    """Numbers of tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


@dataclass(frozen=True)
class ToolCall:
    """A function that the model calls. In a stream, a part of one: `arguments` of the same `index` join."""

    index: int
    id: str
    """Empty in a part behind the first, as is `name`."""
    name: str
    arguments: str
    """JSON, once it is whole."""

    def parsed(self) -> dict[str, Any]:
        """The arguments. Raises ValueError if they are no JSON object, as a cut answer leaves them."""
        arguments = json.loads(self.arguments)
        if not isinstance(arguments, dict):
            raise ValueError(f"the arguments of {self.name} are no JSON object: {self.arguments}")
        return arguments


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Finish:
    reason: str
    """`stop`, `length`, `tool_calls`, or whatever a newer server says."""
    ended_by: str | None = None
    """What ended it if its tokens did not, such as `timeout`."""
    limited_by: str | None = None
    """The limit of the API key that ended it."""


@dataclass(frozen=True)
class UsageReport:
    usage: Usage


Event = Union[Text, ToolCall, Finish, UsageReport]  # noqa: UP007 - Python 3.10 users may ask for its arguments
"""Of a stream."""


@dataclass(frozen=True)
class Answer:
    text: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    finish_reason: str | None = None
    ended_by: str | None = None
    limited_by: str | None = None
    usage: Usage | None = None
    request_id: str | None = None
    """The answer's name in the server's logs."""
    served_by: str | None = None
    """`decoder` or `fallback`."""
    model: str | None = None

    def message(self) -> dict[str, Any]:
        """It as the next message of a chat."""
        made: dict[str, Any] = {"role": "assistant", "content": self.text}
        if self.tool_calls:
            made["tool_calls"] = [
                {"id": one.id, "type": "function", "function": {"name": one.name, "arguments": one.arguments}}
                for one in self.tool_calls
            ]
        return made


CALL_SIZE = 64
"""Bytes that a tool call counts for beside its texts, so that empty ones are bounded as well."""


class Accumulator:
    """Adds events up to an Answer."""

    def __init__(self, request_id: str | None = None) -> None:
        self.request_id = request_id
        self.is_finished = False
        self.size = 0
        """Bytes of text and tool calls."""
        # Not lists: a part of a few characters would take many times its size.
        self._text = io.StringIO()
        self._calls: dict[int, tuple[str, str, io.StringIO]] = {}
        self._finish: Finish | None = None
        self._usage: Usage | None = None
        self._served_by: str | None = None
        self._model: str | None = None

    def chunk(self, told: Any) -> list[Event]:
        """The events of a chunk of a stream. Raises ShapeError."""
        if not isinstance(told, dict):
            raise ShapeError("not an object")
        self._model = optional_text(told, "model") or self._model
        self._served_by = optional_text(told, "served_by") or self._served_by
        choices = told.get("choices", [])
        if not isinstance(choices, list):
            raise ShapeError("choices is not a list")
        limited_by = optional_text(told, "limited_by")
        events = [event for choice in choices for event in _events_of(choice, limited_by)]
        if usage := _usage(told):
            events.append(UsageReport(usage))
        for event in events:
            self.add(event)
        return events

    @property
    def is_begun(self) -> bool:
        return bool(self.size or self._finish or self._usage)

    def served_by(self, name: str | None) -> None:
        self._served_by = name or self._served_by

    def add(self, event: Event) -> None:
        if isinstance(event, Text):
            self._text.write(event.text)
            self.size += _size(event.text)
        elif isinstance(event, ToolCall):
            self.size += _size(event.id + event.name + event.arguments)
            self.size += 0 if event.index in self._calls else CALL_SIZE
            id, name, arguments = self._calls.get(event.index, ("", "", io.StringIO()))
            arguments.write(event.arguments)
            self._calls[event.index] = id or event.id, name or event.name, arguments
        elif isinstance(event, Finish):
            self._finish = event
            self.is_finished = True
        else:
            self._usage = event.usage

    def answer(self) -> Answer:
        """So far."""
        return Answer(
            text=self._text.getvalue(),
            tool_calls=tuple(
                ToolCall(index, id, name, arguments.getvalue())
                for index, (id, name, arguments) in sorted(self._calls.items())
            ),
            finish_reason=self._finish.reason if self._finish else None,
            ended_by=self._finish.ended_by if self._finish else None,
            limited_by=self._finish.limited_by if self._finish else None,
            usage=self._usage,
            request_id=self.request_id,
            served_by=self._served_by,
            model=self._model,
        )


def whole(told: Any, request_id: str | None) -> Answer:
    """An answer that was not streamed. Raises ShapeError."""
    if not isinstance(told, dict) or not isinstance(choices := told.get("choices"), list) or not choices:
        raise ShapeError("it has no choices")
    accumulator = Accumulator(request_id)
    accumulator.chunk(told)
    if not accumulator.is_finished:
        raise ShapeError("its choice has no finish_reason")
    return accumulator.answer()


def _events_of(choice: Any, limited_by: str | None) -> Iterator[Event]:
    """Of a choice of a chunk or of a whole answer, of a chat or of a completion."""
    if not isinstance(choice, dict):
        raise ShapeError("a choice is not an object")
    said = choice.get("delta") or choice.get("message") or {}
    if not isinstance(said, dict):
        raise ShapeError("a choice's message is not an object")
    if text := optional_text(said, "content") or optional_text(choice, "text"):
        yield Text(text)
    calls = said.get("tool_calls") or []
    if not isinstance(calls, list):
        raise ShapeError("tool_calls is not a list")
    for position, call in enumerate(calls):
        yield _call(call, position)
    if reason := optional_text(choice, "finish_reason"):
        yield Finish(reason, optional_text(choice, "ended_by"), limited_by)


def _call(call: Any, position: int) -> ToolCall:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        raise ShapeError("a tool call has no function")
    index = call.get("index", position)
    if not isinstance(index, int):
        raise ShapeError("the index of a tool call is no number")
    texts = optional_text(call, "id"), optional_text(function, "name"), optional_text(function, "arguments")
    return ToolCall(index, *(text or "" for text in texts))


def _usage(told: dict[str, Any]) -> Usage | None:
    usage = told.get("usage")
    if not usage:
        return None
    try:
        prompt, completion = int(usage["prompt_tokens"]), int(usage.get("completion_tokens", 0))
        return Usage(prompt, completion, int(usage.get("total_tokens", prompt + completion)))
    except (TypeError, KeyError, ValueError, OverflowError, AttributeError):
        raise ShapeError("usage has no token counts") from None


def _size(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode(errors="surrogatepass"))


def optional_text(told: dict[str, Any], name: str) -> str | None:
    """Raises ShapeError."""
    value = told.get(name)
    if value is not None and not isinstance(value, str):
        raise ShapeError(f"{name} is not a text")
    return value
