"""Items of a response's input, as the Responses API has them. Outputs come back as input, so both have one form."""

from __future__ import annotations

import re
import secrets
from abc import abstractmethod
from typing import Annotated, Any, Literal

from pydantic import Field, StrictStr, model_validator
from pydantic_core import PydanticCustomError

from tidewright_gateway.openai.errors import MAX_SHOWN
from tidewright_gateway.openai.fields import ApiObject, Many
from tidewright_gateway.openai.messages import RefusalPart, text_of

RESPONSE = "resp"  # before the id of a response
_OUTPUT_ID = re.compile(r"[a-z]{2,4}_([0-9a-f]{48})[0-9a-f]{4,8}")
_MADE_BY_SERVERS = frozenset({"status", "created_by"})


class InputText(ApiObject):
    place = "input.content."
    without_effect = frozenset({"annotations", "logprobs", "cache_control", "prompt_cache_breakpoint"})

    type: Literal["input_text", "output_text"]
    text: StrictStr


class InputRefusal(RefusalPart):
    place = "input.content."
    without_effect = frozenset({"annotations", "logprobs"})


Content = StrictStr | Many[InputText]


class _Item(ApiObject):
    place = "input."
    without_effect = _MADE_BY_SERVERS

    id: StrictStr | None = None
    """Kept, so that it is found in the input items of a stored response; it refers to nothing."""

    @abstractmethod
    def shown(self) -> dict[str, Any]:
        """As the API lists input items."""


class MessageItem(_Item):
    """A message; an object with a role and without a type is one."""

    without_effect = _MADE_BY_SERVERS | {"phase"}

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: StrictStr | Many[Annotated[InputText | InputRefusal, Field(discriminator="type")]]

    @model_validator(mode="after")
    def _only_answers_refuse(self) -> MessageItem:
        if self.role != "assistant" and any(isinstance(part, InputRefusal) for part in self.content):
            raise PydanticCustomError("refusal", "only a message of the assistant may have a part of type refusal")
        return self

    @property
    def text(self) -> str:
        return text_of(self.content)

    def shown(self) -> dict[str, Any]:
        parts = [self.content] if isinstance(self.content, str) else self.content
        return {
            "id": self.id or new_id("msg"),
            "type": "message",
            "status": "completed",
            "role": self.role,
            "content": [self._shown(part) for part in parts],
        }

    def _shown(self, part: str | InputText | InputRefusal) -> dict[str, Any]:
        if isinstance(part, InputRefusal):
            return {"type": "refusal", "refusal": part.refusal}
        text = part if isinstance(part, str) else part.text
        if self.role == "assistant":
            return {"type": "output_text", "text": text, "annotations": []}
        return {"type": "input_text", "text": text}


class FunctionCallItem(_Item):
    """A call that the model made."""

    without_effect = _MADE_BY_SERVERS | {"caller", "namespace"}

    type: Literal["function_call"]
    call_id: StrictStr = Field(min_length=1)
    name: StrictStr = Field(min_length=1)
    arguments: StrictStr
    """JSON of an object."""

    def shown(self) -> dict[str, Any]:
        return {
            "id": self.id or new_id("fc"),
            "type": "function_call",
            "status": "completed",
            "call_id": self.call_id,
            "name": self.name,
            "arguments": self.arguments,
        }


class FunctionCallOutputItem(_Item):
    """What a call returned."""

    without_effect = _MADE_BY_SERVERS | {"caller", "name", "namespace"}

    type: Literal["function_call_output"]
    call_id: StrictStr
    """Of the call, which is an earlier item."""
    output: Content

    def shown(self) -> dict[str, Any]:
        output = self.output
        if not isinstance(output, str):
            output = [{"type": "input_text", "text": part.text} for part in output]  # type: ignore[misc]
        return {
            "id": self.id or new_id("fco"),
            "type": "function_call_output",
            "status": "completed",
            "call_id": self.call_id,
            "output": output,
        }


class SummaryText(ApiObject):
    place = "input.summary."

    type: Literal["summary_text"]
    text: StrictStr


class ReasoningText(ApiObject):
    place = "input.content."

    type: Literal["reasoning_text"]
    text: StrictStr


class ReasoningItem(_Item):
    """What the model thought before an answer, for chat templates that show it to the model."""

    without_effect = _MADE_BY_SERVERS | {"encrypted_content"}

    type: Literal["reasoning"]
    summary: Many[SummaryText] | None = None
    """Is used if there is no content."""
    content: Many[ReasoningText] | None = None

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.content or self.summary or ())

    def shown(self) -> dict[str, Any]:
        return {
            "id": self.id or new_id("rs"),
            "type": "reasoning",
            "summary": [{"type": part.type, "text": part.text} for part in self.summary or ()],
            "content": [{"type": part.type, "text": part.text} for part in self.content or ()],
        }


class ItemReference(ApiObject):
    """An item of the output of a stored response, in place of the item itself."""

    type: Literal["item_reference"]
    id: StrictStr


Item = MessageItem | FunctionCallItem | FunctionCallOutputItem | ReasoningItem
InputItem = Annotated[Item | ItemReference, Field(discriminator="type")]
ITEM_TYPES = ("message", "function_call", "function_call_output", "reasoning", "item_reference")


def with_types(items: list[Any]) -> list[Any]:
    """The items, each with its type. Raises PydanticCustomError: one has a type that this server has no use for."""
    return [_with_type(item, f"input.{number}") for number, item in enumerate(items)]


def _with_type(item: Any, place: str) -> Any:
    if not isinstance(item, dict):
        return item
    kind = item.get("type")
    if kind is None:
        kind = "message" if "role" in item else "item_reference" if set(item) <= {"id", "type"} and item else None
    if isinstance(kind, str) and kind not in ITEM_TYPES:
        message = f"{place}: an item of type {kind[:MAX_SHOWN]!r} is not supported: the only tools here are functions"
        raise refused(message, f"{place}.type")
    return item if kind is None else {**item, "type": kind}


def refused(message: str, field: str) -> PydanticCustomError:
    """`parsing` makes an error of it that names the field."""
    return PydanticCustomError("refused_field", "{message}", {"message": message, "field": field})


def new_id(prefix: str) -> str:
    return f"{prefix}_{secrets.token_hex(24)}"


def output_id(prefix: str, response_id: str, index: int) -> str:
    """Of an item of a response's output: the id of its response can be read from it."""
    return f"{prefix}_{response_id.rpartition('_')[2]}{index:04x}"


def response_of(item_id: str) -> str | None:
    """The id of the response whose output has this item; None if it is no such id."""
    found = _OUTPUT_ID.fullmatch(item_id)
    return f"{RESPONSE}_{found[1]}" if found else None
