"""Answers of the Responses API: Response objects, their items, and lists of their input."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from tidewright_gateway.admission.limits.store import LimitName
from tidewright_gateway.document.base import ABSENT, Shown
from tidewright_gateway.document.chat import TopLogprobs
from tidewright_gateway.openai.responses.request import FunctionToolChoice, TextFormat

ItemStatus = Literal["in_progress", "completed", "incomplete"]


class OutputText(Shown):
    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    """Empty."""
    logprobs: list[TopLogprobs] = ABSENT
    """Of text that the model wrote; empty if they were not asked for."""


class OutputReasoning(Shown):
    type: Literal["reasoning_text"]
    text: str


class OutputMessage(Shown):
    id: str
    type: Literal["message"]
    status: ItemStatus
    role: Literal["assistant"]
    content: list[OutputText]


class OutputReasoningItem(Shown):
    """What the model thought."""

    id: str
    type: Literal["reasoning"]
    status: ItemStatus = ABSENT
    summary: list[ShownSummary]
    content: list[OutputReasoning]


class ShownSummary(Shown):
    type: Literal["summary_text"]
    text: str


class OutputFunctionCall(Shown):
    id: str
    type: Literal["function_call"]
    status: ItemStatus
    call_id: str
    name: str
    arguments: str
    """JSON, as the model wrote it: it may be cut where the answer was."""


OutputItem = Annotated[OutputMessage | OutputReasoningItem | OutputFunctionCall, Field(discriminator="type")]


class ResponseFailure(Shown):
    code: Literal["invalid_prompt", "rate_limit_exceeded", "server_error"]
    message: str


class IncompleteDetails(Shown):
    reason: Literal["max_output_tokens"]


class ShownReasoning(Shown):
    effort: str | None
    summary: None


class ShownText(Shown):
    format: TextFormat
    verbosity: Literal["medium"]


class ShownTool(Shown):
    type: Literal["function"]
    name: str
    description: str | None
    parameters: dict[str, Any] | None
    strict: bool


class CachedInput(Shown):
    cached_tokens: int
    """Tokens that an engine's prefix cache had."""
    cache_write_tokens: int


class ReasoningOutput(Shown):
    reasoning_tokens: int


class ResponseUsage(Shown):
    input_tokens: int
    input_tokens_details: CachedInput
    output_tokens: int
    output_tokens_details: ReasoningOutput
    total_tokens: int


class ResponseObject(Shown):
    """The answer, with what the request said."""

    id: str
    object: Literal["response"]
    created_at: int
    """Seconds since 1970."""
    completed_at: int | None
    status: Literal["in_progress", "completed", "incomplete", "failed", "cancelled"]
    error: ResponseFailure | None
    incomplete_details: IncompleteDetails | None
    output: list[OutputItem]
    usage: ResponseUsage | None
    """null while it runs."""
    served_by: Literal["decoder", "smaller", "fallback"]
    """`fallback`: the small model answered, as the main one could not; `smaller`: a variant of the model, by load."""
    ended_by: str = ABSENT
    """What ended it early where OpenAI has no word for it, such as `timeout`; its status is incomplete then."""
    limited_by: LimitName = ABSENT
    """The caller's limit that ended it early."""
    background: Literal[False]
    model: str
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    previous_response_id: str | None
    reasoning: ShownReasoning
    service_tier: Literal["default"]
    store: bool
    """Whether it is stored."""
    temperature: float
    text: ShownText
    tool_choice: FunctionToolChoice
    tools: list[ShownTool]
    top_logprobs: int
    top_p: float
    truncation: Literal["auto", "disabled"]
    user: str | None


class DeletedResponse(Shown):
    id: str
    object: Literal["response"]
    deleted: Literal[True]


class ListedText(Shown):
    type: Literal["input_text"]
    text: str


class ListedRefusal(Shown):
    type: Literal["refusal"]
    refusal: str


class ListedMessage(Shown):
    id: str
    type: Literal["message"]
    status: ItemStatus
    role: Literal["user", "assistant", "system", "developer"]
    content: list[Annotated[ListedText | OutputText | ListedRefusal, Field(discriminator="type")]]


class ListedCallOutput(Shown):
    id: str
    type: Literal["function_call_output"]
    status: ItemStatus
    call_id: str
    output: str | list[ListedText]


class InputItemList(Shown):
    """A page of the items before the output of a response."""

    object: Literal["list"]
    data: list[
        Annotated[
            ListedMessage | OutputFunctionCall | ListedCallOutput | OutputReasoningItem, Field(discriminator="type")
        ]
    ]
    first_id: str | None
    last_id: str | None
    has_more: bool
