"""Request bodies of Anthropic's Messages API: honoured fields, those without effect, and those that are refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, StrictBool, StrictInt, StrictStr

from tidewright_gateway.anthropic.blocks import BLOCK_TYPES, SystemBlock, Turn
from tidewright_gateway.openai.fields import ApiObject, Many, Number
from tidewright_gateway.openai.protocol import Body
from tidewright_gateway.openai.tools.definitions import ApiTool, ToolName


class CustomTool(ApiTool):
    """A tool that the caller runs."""

    path = "/v1/messages"
    place = "tools."
    without_effect = frozenset(
        {"cache_control", "defer_loading", "allowed_callers", "input_examples", "eager_input_streaming"}
    )

    type: Literal["custom"] | None = None
    name: ToolName
    """Letters, digits, `_`, `-` and `.`; at most 64 characters."""
    description: StrictStr | None = None
    input_schema: dict[str, Any]
    """A JSON schema of an object."""
    strict: StrictBool | None = None
    """Calls follow the schema exactly, also with tool_choice auto."""


class _Choice(ApiObject):
    place = "tool_choice."

    disable_parallel_tool_use: StrictBool | None = None
    """true: at most one call."""


class AutoToolChoice(_Choice):
    """The model decides."""

    type: Literal["auto"]


class AnyToolChoice(_Choice):
    """The answer is a call of one of the tools."""

    type: Literal["any"]


class NamedToolChoice(_Choice):
    """The answer is a call of this tool."""

    type: Literal["tool"]
    name: StrictStr


class NoToolChoice(_Choice):
    """No tool may be called."""

    type: Literal["none"]


AnthropicToolChoice = Annotated[
    AutoToolChoice | AnyToolChoice | NamedToolChoice | NoToolChoice, Field(discriminator="type")
]


class ThinkingConfig(ApiObject):
    place = "thinking."
    without_effect = frozenset({"budget_tokens", "display"})

    type: Literal["enabled", "disabled", "adaptive"]
    """Sets the variable enable_thinking of the model's chat template; adaptive is as enabled."""


class OutputFormat(ApiObject):
    place = "output_config.format."

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")
    """The JSON schema that the answer follows."""


class OutputConfig(ApiObject):
    place = "output_config."

    effort: StrictStr | None = None
    """The variable reasoning_effort of the model's chat template."""
    format: OutputFormat | None = None


class CallerMetadata(ApiObject):
    place = "metadata."

    user_id: StrictStr | None = None
    """The end user: has limits of its own within the key's, and shares no KV cache with other users."""


class Conversation(Body):
    """What the prompt is made of."""

    without_effect = frozenset(
        {
            "cache_control",
            "context_management",
            "diagnostics",
            "inference_geo",
            "service_tier",
            "speed",
            "user_profile_id",
            "workspace_id",
        }
    )
    refused: ClassVar[Mapping[str, str]] = {
        "container": "the server runs no code",
        "mcp_servers": "the server calls no tools itself; send the tools of the MCP server in tools",
        "output_format": "use output_config.format",
    }

    part_types = BLOCK_TYPES

    model: StrictStr
    """Model name, as in /v1/models."""
    messages: Many[Turn] = Field(min_length=1)
    """The chat so far."""
    system: StrictStr | Many[SystemBlock] | None = None
    """The system prompt."""
    tools: Many[CustomTool] | None = None
    """Tools that the model may call."""
    tool_choice: AnthropicToolChoice | None = None
    """Whether the model calls tools. Default: auto."""
    thinking: ThinkingConfig | None = None
    """Whether the model thinks before it answers. Default: as its chat template has it."""
    output_config: OutputConfig | None = None


class MessagesRequest(Conversation):
    max_tokens: StrictInt = Field(ge=1)
    """Maximum tokens of the answer; it ends earlier where the model's context does."""
    stop_sequences: Many[StrictStr] | None = None
    """Stop before any of these texts."""
    temperature: Annotated[Number, Field(ge=0, le=1)] | None = None
    """Sampling temperature, at most 1; 0 is greedy. Default: 1."""
    top_p: Number | None = None
    """Sample from the most likely tokens that together have this probability."""
    top_k: StrictInt | None = None
    """Sample from this many most likely tokens; 0: all."""
    stream: StrictBool | None = None
    """Stream the answer as server-sent events."""
    metadata: CallerMetadata | None = None


class CountTokensRequest(Conversation):
    pass
