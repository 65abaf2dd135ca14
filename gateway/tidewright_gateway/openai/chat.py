"""Chats: what the model's chat template makes a prompt of, and the request of chat completions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar, Literal

from pydantic import Field, StrictBool, StrictInt, StrictStr

from tidewright.schema import SamplingParams
from tidewright_gateway.openai.errors import invalid
from tidewright_gateway.openai.fields import ApiObject, Many
from tidewright_gateway.openai.messages import Message, check_history
from tidewright_gateway.openai.protocol import Body, GenerationBody
from tidewright_gateway.openai.tools.definitions import Function, Tool, ToolChoice, ToolUse, tool_use


class Chat(ApiObject):
    """What the model's chat template makes a prompt of."""

    messages: Many[Message] = Field(min_length=1)
    """The chat so far."""
    tools: Many[Tool] | None = None
    """Functions that the model may call."""
    chat_template_kwargs: dict[StrictStr, Any] | None = None
    """Variables for the model's chat template, such as {"enable_thinking": false}."""
    add_generation_prompt: StrictBool | None = None
    """false: the prompt ends with the last message, without the beginning of an answer."""
    continue_final_message: StrictBool | None = None
    """The answer continues the last message."""

    @property
    def variables(self) -> dict[str, Any]:
        """Variables of the template other than messages and tools.

        Raises:
            ApiError: they contradict each other, or the messages.
        """
        own = self.chat_template_kwargs or {}
        for name in own:
            if name in _OWN_VARIABLES or not name.isidentifier():
                raise invalid(
                    f"chat_template_kwargs: {name!r} is no variable that a request may set", "chat_template_kwargs"
                )
        if self.continue_final_message and self.add_generation_prompt:
            message = "continue_final_message and add_generation_prompt exclude each other"
            raise invalid(message, "continue_final_message")
        begins = self.add_generation_prompt is not False and not self.continue_final_message
        return {**own, "add_generation_prompt": begins}

    @property
    def offered(self) -> Sequence[Function]:
        """The functions that the prompt describes."""
        use = tool_use(self.tools, None, None)
        return use.functions if use else ()


_OWN_VARIABLES = ("messages", "tools", "add_generation_prompt", "continue_final_message")


class ChatRequest(GenerationBody, Chat):
    names_of_ours: ClassVar[Mapping[str, str]] = {"logprobs": "top_logprobs"}
    forms: ClassVar[Mapping[str, str]] = {
        "tool_choice": '"none", "auto", "required", {"type": "function", "function": {"name": "..."}}, or '
        '{"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [...]}} with mode "auto" or "required"'
    }
    refused: ClassVar[Mapping[str, str]] = {
        **GenerationBody.refused,
        "functions": "use tools",
        "function_call": "use tool_choice",
        "audio": "this model writes text only",
        "web_search_options": "the server calls no tools itself",
    }

    max_completion_tokens: StrictInt | None = None
    """OpenAI's newer name of max_tokens."""
    logprobs: StrictBool | None = None
    """Return the log-probability of each token."""
    top_logprobs: StrictInt | None = None
    """Also of this many most likely tokens."""
    tool_choice: ToolChoice | None = None
    """Whether the model calls tools: auto (default), none, required, or the one that is named."""
    parallel_tool_calls: StrictBool | None = None
    """false: at most one call. Default: true."""
    reasoning_effort: StrictStr | None = None
    """A variable of the model's chat template."""
    modalities: Many[Literal["text"]] | None = None
    """Only text."""

    def num_logprobs(self) -> int | None:
        if self.top_logprobs is not None and not self.logprobs:
            raise invalid("top_logprobs needs logprobs: true", "top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def asked_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @cached_property
    def tool_use(self) -> ToolUse | None:
        return tool_use(self.tools, self.tool_choice, self.parallel_tool_calls)

    @property
    def offered(self) -> Sequence[Function]:
        return self.tool_use.functions if self.tool_use else ()

    @property
    def variables(self) -> dict[str, Any]:
        found = super().variables
        return found if self.reasoning_effort is None else {"reasoning_effort": self.reasoning_effort, **found}

    def sampling(self, defaults: Mapping[str, Any] | None = None) -> SamplingParams:
        if self.asked_tokens is not None and self.max_tokens not in (None, self.asked_tokens):
            raise invalid("max_tokens and max_completion_tokens differ; send one", "max_tokens")
        check_history(self.messages)
        return super().sampling(defaults)


class TokenizeRequest(Body, Chat):
    prompt: StrictStr | None = None
    """Either this or messages."""
    messages: Many[Message] | None = None  # type: ignore[assignment] # here, a prompt may stand instead
    add_special_tokens: StrictBool | None = None
    """false: a prompt gets no special tokens of the tokenizer, such as BOS. Default: true."""
