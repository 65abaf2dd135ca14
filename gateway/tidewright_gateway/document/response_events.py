"""The typed events of a streamed response."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, RootModel

from tidewright_gateway.document.base import Shown
from tidewright_gateway.document.chat import TopLogprobs
from tidewright_gateway.document.response import OutputItem, OutputReasoning, OutputText, ResponseObject


class _Event(Shown):
    sequence_number: int


class ResponseStateEvent(_Event):
    """The first two events, and the last one."""

    type: Literal[
        "response.created",
        "response.in_progress",
        "response.completed",
        "response.incomplete",
        "response.failed",
    ]
    response: ResponseObject


class OutputItemEvent(_Event):
    """An item begins or has ended."""

    type: Literal["response.output_item.added", "response.output_item.done"]
    output_index: int
    item: OutputItem


class _PartEvent(_Event):
    item_id: str
    output_index: int
    content_index: int


class ContentPartEvent(_PartEvent):
    """A part of an item begins or has ended."""

    type: Literal["response.content_part.added", "response.content_part.done"]
    part: Annotated[OutputText | OutputReasoning, Field(discriminator="type")]


class OutputTextDelta(_PartEvent):
    type: Literal["response.output_text.delta"]
    delta: str
    logprobs: list[TopLogprobs]


class OutputTextDone(_PartEvent):
    type: Literal["response.output_text.done"]
    text: str
    logprobs: list[TopLogprobs]


class ReasoningTextDelta(_PartEvent):
    type: Literal["response.reasoning_text.delta"]
    delta: str


class ReasoningTextDone(_PartEvent):
    type: Literal["response.reasoning_text.done"]
    text: str


class ArgumentsDelta(_Event):
    type: Literal["response.function_call_arguments.delta"]
    item_id: str
    output_index: int
    delta: str


class ArgumentsDone(_Event):
    type: Literal["response.function_call_arguments.done"]
    item_id: str
    output_index: int
    arguments: str


class ResponseErrorEvent(_Event):
    """Before response.failed."""

    type: Literal["error"]
    code: str
    message: str
    param: str | None


class ResponseEvent(
    RootModel[
        Annotated[
            ResponseStateEvent
            | OutputItemEvent
            | ContentPartEvent
            | OutputTextDelta
            | OutputTextDone
            | ReasoningTextDelta
            | ReasoningTextDone
            | ArgumentsDelta
            | ArgumentsDone
            | ResponseErrorEvent,
            Field(discriminator="type"),
        ]
    ]
):
    """An event of a streamed response; sequence_number counts them."""
