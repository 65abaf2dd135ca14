"""Answers of chat completions."""

from __future__ import annotations

from typing import Literal

from tidewright_gateway.document.base import ABSENT, Shown
from tidewright_gateway.document.generation import (
    Ended,
    FinishReason,
    Generated,
    MaybeEnded,
    PromptLogprobs,
    Usage,
)


class TokenLogprob(Shown):
    token: str
    logprob: float
    bytes: list[int]
    """UTF-8 of its text; those of all tokens are the text."""


class TopLogprobs(TokenLogprob):
    top_logprobs: list[TokenLogprob]
    """The most likely tokens at this place, most likely first."""


class ChatLogprobs(Shown):
    content: list[TopLogprobs]
    refusal: None


class CalledFunction(Shown):
    name: str
    arguments: str
    """JSON, as the model wrote it: it may be cut where the answer was."""


class ChatToolCall(Shown):
    id: str
    type: Literal["function"]
    function: CalledFunction


class ChatAnswer(Shown):
    role: Literal["assistant"]
    content: str | None
    """null if there are only calls."""
    refusal: None
    reasoning_content: str = ABSENT
    """What the model thought before."""
    tool_calls: list[ChatToolCall] = ABSENT


class ChatChoice(Ended):
    index: int
    message: ChatAnswer
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    token_ids: list[int] = ABSENT
    """With return_token_ids."""


class ChatCompletion(Generated):
    """The answer to a chat."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] = ABSENT
    """With return_token_ids."""
    prompt_logprobs: PromptLogprobs | None = ABSENT
    """With prompt_logprobs: by token id, the prompt's own first. The first token has none."""


class CalledFunctionDelta(Shown):
    name: str = ABSENT
    """In the first delta of a call."""
    arguments: str
    """To be appended."""


class ChatToolCallDelta(Shown):
    index: int
    """Of the call in the message."""
    id: str = ABSENT
    """In the first delta of a call, as `type`."""
    type: Literal["function"] = ABSENT
    function: CalledFunctionDelta


class ChatDelta(Shown):
    """What a chunk adds to a message."""

    role: Literal["assistant"] = ABSENT
    content: str = ABSENT
    reasoning_content: str = ABSENT
    tool_calls: list[ChatToolCallDelta] = ABSENT


class ChatChunkChoice(MaybeEnded):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None


class ChatCompletionChunk(Generated):
    """An event of a streamed chat."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]
    """Empty in the last event with usage."""
    usage: Usage | None = ABSENT
    """With stream_options.include_usage: in the last event, null in others."""
    prompt_token_ids: list[int] = ABSENT
    """With return_token_ids, in the first event."""
