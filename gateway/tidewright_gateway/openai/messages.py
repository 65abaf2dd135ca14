"""Messages of a chat, as chat completions have them; the other APIs are translated to these."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Protocol

import msgspec
from pydantic import Field, StrictStr

from tidewright_gateway.openai.errors import MAX_SHOWN, invalid
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


class RefusalPart(ApiObject):
    """The model's words where it did not do as it was asked."""

    place = "messages.content."

    type: Literal["refusal"]
    refusal: StrictStr

    @property
    def text(self) -> str:
        return self.refusal


AnswerPart = Annotated[TextPart | RefusalPart, Field(discriminator="type")]


class _Message(ApiObject):
    place = "messages."

    name: StrictStr | None = None
    """Passed to the model's chat template; most have no use for it."""

    @property
    def text(self) -> str:
        return text_of(self.content)  # type: ignore[attr-defined]

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
    content: StrictStr | Many[AnswerPart] | None = None
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


class Calls:
    """The calls of a conversation, in its order: what each API checks of them. Its methods raise ApiError.

    Ids tell calls apart until they are answered; some servers count from 0 in each answer.
    """

    def __init__(self) -> None:
        self._answered: dict[str, bool] = {}

    def ask(self, call_id: str, place: str) -> None:
        """A call; `place` is that of its id."""
        if self._answered.get(call_id) is False:
            raise invalid(f"{place}: an earlier call without a result has the id {_shown(call_id)}, too", place)
        self._answered[call_id] = False

    def answer(self, call_id: str, place: str) -> None:
        """The result of a call."""
        if call_id not in self._answered:
            raise invalid(f"{place}: no earlier message has a call with the id {_shown(call_id)}", place)
        if self._answered[call_id]:
            raise invalid(f"{place}: the call with the id {_shown(call_id)} has a result already; send one", place)
        self._answered[call_id] = True


def check_history(messages: Sequence[ChatMessage]) -> None:
    """Raises ApiError: calls and results don't fit together, or the arguments of a call are no JSON object."""
    calls = Calls()
    for number, message in enumerate(messages):
        if isinstance(message, AssistantMessage):
            for at, call in enumerate(message.tool_calls or ()):
                place = f"messages.{number}.tool_calls.{at}"
                check_arguments(call.function.arguments, f"{place}.function.arguments")
                calls.ask(call.id, f"{place}.id")
        elif isinstance(message, ToolMessage):
            calls.answer(message.tool_call_id, f"messages.{number}.tool_call_id")


def check_arguments(text: str, place: str) -> None:
    """Raises ApiError: the arguments of a call are none."""
    if not is_json_object(text or "{}"):
        raise invalid(f"{place} is not the JSON of an object", place)


def _shown(call_id: str) -> str:
    return repr(call_id[:MAX_SHOWN])


def is_json_object(text: str) -> bool:
    try:
        return isinstance(msgspec.json.decode(text), dict)
    except (msgspec.DecodeError, RecursionError, UnicodeEncodeError):
        return False
