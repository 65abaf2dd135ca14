"""Messages of Anthropic's API and their content blocks, as requests have them."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import Field, StrictBool, StrictStr

from tidewright_gateway.openai.fields import ApiObject, Many


class _Block(ApiObject):
    place = "messages.content."
    without_effect = frozenset({"cache_control"})


class TextBlock(_Block):
    without_effect = frozenset({"cache_control", "citations"})

    type: Literal["text"]
    text: StrictStr


class SystemBlock(TextBlock):
    place = "system."


class ToolUseBlock(_Block):
    """A call of a tool in an earlier answer."""

    without_effect = frozenset({"cache_control", "caller"})

    type: Literal["tool_use"]
    id: StrictStr = Field(min_length=1)
    name: StrictStr = Field(min_length=1)
    input: dict[str, Any]
    """The arguments."""


class ToolResultBlock(_Block):
    """The result of a call."""

    type: Literal["tool_result"]
    tool_use_id: StrictStr
    """The id of the tool_use block in an earlier message."""
    content: StrictStr | Many[TextBlock] | None = None
    is_error: StrictBool | None = None
    """The model reads the content as an error."""


class ThinkingBlock(_Block):
    """Reasoning of an earlier answer, for templates that show it to the model."""

    without_effect = frozenset({"cache_control", "signature"})

    type: Literal["thinking"]
    thinking: StrictStr


class RedactedThinkingBlock(_Block):
    """Accepted and not shown to the model, which can't read it."""

    without_effect = frozenset({"cache_control", "data"})

    type: Literal["redacted_thinking"]


UserBlock = Annotated[TextBlock | ToolResultBlock, Field(discriminator="type")]
AssistantBlock = Annotated[
    TextBlock | ToolUseBlock | ThinkingBlock | RedactedThinkingBlock, Field(discriminator="type")
]
BLOCK_TYPES = tuple(
    get_args(kind.model_fields["type"].annotation)[0]
    for kind in (TextBlock, ToolUseBlock, ToolResultBlock, ThinkingBlock, RedactedThinkingBlock)
)


class UserTurn(ApiObject):
    place = "messages."

    role: Literal["user"]
    content: StrictStr | Many[UserBlock]
    """Text, or blocks of text and of results of tools."""


class AssistantTurn(ApiObject):
    """An earlier answer. As the last message it is the beginning of the answer, which continues it."""

    place = "messages."

    role: Literal["assistant"]
    content: StrictStr | Many[AssistantBlock]


class SystemTurn(ApiObject):
    """Instructions in the middle of a chat."""

    place = "messages."

    role: Literal["system"]
    content: StrictStr | Many[TextBlock]


Turn = Annotated[UserTurn | AssistantTurn | SystemTurn, Field(discriminator="role")]
