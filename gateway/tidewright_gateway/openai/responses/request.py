"""Bodies of POST /v1/responses: which fields are honoured, accepted without effect, or refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, StrictBool, StrictInt, StrictStr, field_validator
from pydantic_core import PydanticCustomError

from tidewright_gateway.openai.errors import MAX_SHOWN
from tidewright_gateway.openai.fields import ApiObject, Many
from tidewright_gateway.openai.protocol import SamplingFields
from tidewright_gateway.openai.responses.items import InputItem, refused, with_types
from tidewright_gateway.openai.tools.definitions import ApiTool, Function

LOGPROBS = "message.output_text.logprobs"
MAX_METADATA, MAX_METADATA_NAME, MAX_METADATA_VALUE = 16, 64, 512  # OpenAI's
_TOOL_CHOICES = ("function", "allowed_tools")


class FunctionTool(ApiTool, Function):
    path = "/v1/responses"
    place = "tools."
    without_effect = frozenset({"cache_control", "defer_loading", "allowed_callers", "output_schema"})

    type: Literal["function"]


class FunctionChoice(ApiObject):
    place = "tool_choice."

    type: Literal["function"]
    name: StrictStr


class AllowedFunctions(ApiObject):
    place = "tool_choice."

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Many[FunctionChoice] = Field(min_length=1)


FunctionToolChoice = (
    Literal["none", "auto", "required"] | Annotated[FunctionChoice | AllowedFunctions, Field(discriminator="type")]
)


class TextFormat(ApiObject):
    place = "text.format."

    type: Literal["text", "json_object", "json_schema"]
    name: StrictStr | None = None
    description: StrictStr | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    """The JSON schema that the answer follows, for json_schema."""
    strict: StrictBool | None = None


class TextOptions(ApiObject):
    place = "text."
    without_effect = frozenset({"verbosity"})

    format: TextFormat | None = None


class ReasoningOptions(ApiObject):
    place = "reasoning."
    without_effect = frozenset({"summary", "generate_summary", "context", "mode"})

    effort: StrictStr | None = None
    """A variable of the model's chat template."""


class ResponseStreamOptions(ApiObject):
    place = "stream_options."
    without_effect = frozenset({"include_obfuscation"})


class ResponsesRequest(SamplingFields):
    without_effect = frozenset(
        {
            "access_programs",
            "image",
            "max_tool_calls",
            "moderation",
            "prompt_cache_key",
            "prompt_cache_options",
            "prompt_cache_retention",
            "safety_identifier",
            "service_tier",
        }
    )
    forms: ClassVar[Mapping[str, str]] = {
        "tool_choice": '"none", "auto", "required", {"type": "function", "name": "..."}, or '
        '{"type": "allowed_tools", "mode": "auto", "tools": [...]} with mode "auto" or "required"'
    }
    refused: ClassVar[Mapping[str, str]] = {
        "conversation": "send previous_response_id",
        "prompt": "send instructions and input",
        "context_management": 'send truncation: "auto", or fewer items',
        "background_options": "the answer comes with this request",
        "messages": "send input",
        "max_tokens": "send max_output_tokens",
        "response_format": "send text.format",
        "reasoning_effort": "send reasoning.effort",
        "functions": "send tools",
        "n": "send the request several times",
    }

    input: StrictStr | Many[InputItem] | None = None
    """A text, which is a message of the user, or a list of items: messages, function calls and their outputs,
    reasoning, and references (item_reference) to items of stored responses. Items of other tools are refused."""
    instructions: StrictStr | None = None
    """A system message before everything else; that of an earlier response does not count."""
    previous_response_id: StrictStr | None = None
    """The input and the output of this stored response come before the input."""
    store: StrictBool | None = None
    """Whether the response is stored, to be retrieved and continued. Default: true."""
    stream_options: ResponseStreamOptions | None = None
    max_output_tokens: StrictInt | None = None
    """Maximum tokens of the answer, reasoning included. Default: the rest of the context."""
    tools: Many[FunctionTool] | None = None
    """Functions that the model may call. Tools of other types are refused by name."""
    tool_choice: FunctionToolChoice | None = None
    """Whether the model calls tools: auto (default), none, required, or the one that is named."""
    parallel_tool_calls: StrictBool | None = None
    """false: at most one call. Default: true."""
    text: TextOptions | None = None
    """format: generate JSON, or JSON that follows a schema."""
    reasoning: ReasoningOptions | None = None
    include: (
        Many[
            Literal[
                "message.output_text.logprobs",
                "reasoning.encrypted_content",
                "file_search_call.results",
                "web_search_call.results",
                "web_search_call.action.sources",
                "message.input_image.image_url",
                "computer_call_output.output.image_url",
                "code_interpreter_call.outputs",
            ]
        ]
        | None
    ) = None
    """message.output_text.logprobs: return the log-probability of each token of the text. Reasoning items have their
    text in any case; the others are about items that this server does not make."""
    top_logprobs: StrictInt | None = None
    """Also of this many most likely tokens."""
    truncation: Literal["auto", "disabled"] | None = None
    """auto: the oldest items are left out if the input is longer than the model's context. Default: disabled."""
    metadata: dict[StrictStr, StrictStr] | None = None
    """Up to 16 texts with names, stored with the response."""
    background: StrictBool | None = None
    """Only false."""

    chat_template_kwargs: dict[StrictStr, Any] | None = None
    """Variables for the model's chat template, such as {"enable_thinking": false}."""

    @field_validator("input", mode="before")
    @classmethod
    def _items_have_types(cls, value: Any) -> Any:
        return with_types(value) if isinstance(value, list) else value

    @field_validator("tools", mode="before")
    @classmethod
    def _only_functions(cls, value: Any) -> Any:
        for number, tool in enumerate(value if isinstance(value, list) else ()):
            _check_type(tool, ("function",), f"tools.{number}")
        return value

    @field_validator("tool_choice", mode="before")
    @classmethod
    def _only_choices_of_functions(cls, value: Any) -> Any:
        _check_type(value, _TOOL_CHOICES, "tool_choice")
        return value

    @field_validator("background")
    @classmethod
    def _not_in_background(cls, value: bool | None) -> bool | None:
        if value:
            raise refused("background is not supported: the answer comes with this request", "background")
        return value

    @field_validator("metadata")
    @classmethod
    def _little_metadata(cls, value: dict[str, str] | None) -> dict[str, str] | None:
        for name, text in (value or {}).items():
            if len(name) > MAX_METADATA_NAME or len(text) > MAX_METADATA_VALUE:
                message = "a name has at most {name} characters, its text at most {text}"
                limits = {"name": MAX_METADATA_NAME, "text": MAX_METADATA_VALUE}
                raise PydanticCustomError("metadata", message, limits)
        if value and len(value) > MAX_METADATA:
            raise PydanticCustomError("metadata", "at most {most} texts", {"most": MAX_METADATA})
        return value

    @property
    def num_logprobs(self) -> int | None:
        """Top log-probabilities at each token; None if none are asked for."""
        if self.top_logprobs:
            return self.top_logprobs
        return 0 if LOGPROBS in (self.include or ()) else None


def _check_type(given: Any, types: tuple[str, ...], place: str) -> None:
    kind = given.get("type") if isinstance(given, dict) else None
    if isinstance(kind, str) and kind not in types:
        message = f"{place}: a tool of type {kind[:MAX_SHOWN]!r} is not supported; only functions can be called here"
        raise refused(message, f"{place}.type")
