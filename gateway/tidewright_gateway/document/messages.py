"""Answers of Anthropic's Messages API."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, RootModel

from tidewright_gateway.admission.limits.store import LimitName
from tidewright_gateway.document.base import ABSENT, Shown
from tidewright_gateway.document.errors import AnthropicError

StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]


class TextContent(Shown):
    type: Literal["text"]
    text: str


class ThinkingContent(Shown):
    type: Literal["thinking"]
    thinking: str
    signature: str


class ToolUseContent(Shown):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


MessageContent = Annotated[TextContent | ThinkingContent | ToolUseContent, Field(discriminator="type")]


class ThinkingTokens(Shown):
    thinking_tokens: int


class MessageUsage(Shown):
    input_tokens: int
    """Those of the prompt that no cache had."""
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    """Those of the prompt that an engine's prefix cache had."""
    output_tokens: int
    output_tokens_details: ThinkingTokens = ABSENT


class MessageEnding(Shown):
    stop_reason: StopReason | None
    """null where a stream begins."""
    stop_sequence: str | None
    """The text that ended it."""
    stop_details: None
    ended_by: str = ABSENT
    """What ended it early where Anthropic has no word for it, such as `timeout`; stop_reason is `max_tokens` then."""
    limited_by: LimitName = ABSENT
    """The caller's limit that ended it early."""


class AnthropicMessage(MessageEnding):
    """The answer to a chat."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[MessageContent]
    usage: MessageUsage


class MessageStart(Shown):
    type: Literal["message_start"]
    message: AnthropicMessage


class ContentBlockStart(Shown):
    type: Literal["content_block_start"]
    index: int
    content_block: MessageContent


class TextAdded(Shown):
    type: Literal["text_delta"]
    text: str


class ThinkingAdded(Shown):
    type: Literal["thinking_delta"]
    thinking: str


class InputAdded(Shown):
    type: Literal["input_json_delta"]
    partial_json: str


class ContentBlockDelta(Shown):
    type: Literal["content_block_delta"]
    index: int
    delta: Annotated[TextAdded | ThinkingAdded | InputAdded, Field(discriminator="type")]


class ContentBlockStop(Shown):
    type: Literal["content_block_stop"]
    index: int


class MessageDelta(Shown):
    type: Literal["message_delta"]
    delta: MessageEnding
    usage: MessageUsage


class MessageStop(Shown):
    type: Literal["message_stop"]


class MessageEvent(
    RootModel[
        Annotated[
            MessageStart
            | ContentBlockStart
            | ContentBlockDelta
            | ContentBlockStop
            | MessageDelta
            | MessageStop
            | AnthropicError,
            Field(discriminator="type"),
        ]
    ]
):
    """An event of a streamed message; an error ends the stream."""
