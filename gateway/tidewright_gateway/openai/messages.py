"""Messages of a chat, as chat completions have them; the other APIs are translated to these."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Protocol

import msgspec
from pydantic import Field, StrictStr

from tidewright_gateway.openai.errors import invalid
from tidewright_gateway.openai.fields import ApiObject, Many


class HasText(Protocol):
    @property
    def text(self) -> str: ...


def text_of(content: str | Sequence[HasText] | None) -> str:
    """Of a content that is a text, or a list of parts of one."""
    if content is None:
        return ""
    return content if isinstance(content, str) else "".join(part.text for part in content)


class TextPart(ApiObject):
    without_effect = frozenset({"cache_control", "annotations"})
    place = "messages.content."

    type: Literal["text"]
    text: StrictStr


class _Message(ApiObject):
    place = "messages."

    content: StrictStr | Many[TextPart] | None
    name: StrictStr | None = None
    """Passed to the model's chat template; most have no use for it."""

    @property
    def text(self) -> str:
        return text_of(self.content)

    def turn(self) -> dict[str, Any]:
        """The message as chat templates take it."""
        found: dict[str, Any] = {"role": self.role, "content": self.text}  # type: ignore[attr-defined]
        if self.name is not None:
            found["name"] = self.name
        return found


class InputMessage(_Message):
    """A message to the model."""

    without_effect = frozenset({"cache_control"})

    role: Literal["system", "developer", "user"]
    content: StrictStr | Many[TextPart]


class FunctionCall(ApiObject):
    place = "messages.tool_calls.function."

    name: StrictStr = Field(min_length=1)
    arguments: StrictStr
    """JSON of an object."""


class ToolCall(ApiObject):
    place = "messages.tool_calls."
    without_effect = frozenset({"index"})

    id: StrictStr = Field(min_length=1)
    type: Literal["function"] = "function"
    function: FunctionCall

    def turn(self) -> dict[str, Any]:
        """With its arguments as an object, as templates take them; `check_history` has seen that they are one."""
        arguments = msgspec.json.decode(self.function.arguments or "{}")
        return {"id": self.id, "type": "function", "function": {"name": self.function.name, "arguments": arguments}}


class AssistantMessage(_Message):
    """An answer of the model, as history; the empty fields of this API's own answers are accepted."""

    without_effect = frozenset({"cache_control", "annotations", "audio", "refusal"})

    role: Literal["assistant"]
    content: StrictStr | Many[TextPart] | None = None
    reasoning_content: StrictStr | None = None
    """The reasoning of that answer, for templates that show it to the model."""
    tool_calls: Many[ToolCall] | None = None
    """Calls of functions that the model asked for."""

    def turn(self) -> dict[str, Any]:
        found = super().turn()
        if self.reasoning_content is not None:
            found["reasoning_content"] = self.reasoning_content
        if self.tool_calls:
            found["tool_calls"] = [call.turn() for call in self.tool_calls]
        return found


class ToolMessage(_Message):
    """The result of a function call."""

    without_effect = frozenset({"cache_control"})

    role: Literal["tool"]
    content: StrictStr | Many[TextPart]
    tool_call_id: StrictStr
    """The id of the call in an earlier assistant message."""

    def turn(self) -> dict[str, Any]:
        return {**super().turn(), "tool_call_id": self.tool_call_id}


ChatMessage = InputMessage | AssistantMessage | ToolMessage
Message = Annotated[ChatMessage, Field(discriminator="role")]


def check_history(messages: Sequence[ChatMessage]) -> None:
    """Raises ApiError: a tool message answers no call, or the arguments of a call are no JSON object."""
    asked: set[str] = set()
    for number, message in enumerate(messages):
        if isinstance(message, AssistantMessage):
            for at, call in enumerate(message.tool_calls or ()):
                _check_arguments(call.function.arguments, f"messages.{number}.tool_calls.{at}.function.arguments")
                asked.add(call.id)
        elif isinstance(message, ToolMessage) and message.tool_call_id not in asked:
            param = f"messages.{number}.tool_call_id"
            raise invalid(
                f"{param}: no earlier assistant message has a tool call with the id {message.tool_call_id!r}", param
            )


def _check_arguments(text: str, param: str) -> None:
    if not is_json_object(text or "{}"):
        raise invalid(f"{param} is not the JSON of an object", param)


def is_json_object(text: str) -> bool:
    try:
        return isinstance(msgspec.json.decode(text), dict)
    except (msgspec.DecodeError, RecursionError, UnicodeEncodeError):
        return False
