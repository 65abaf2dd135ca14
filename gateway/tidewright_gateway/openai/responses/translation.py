"""A Responses request as the chat request that it means. No I/O."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tidewright_gateway.openai.chat import ChatRequest
from tidewright_gateway.openai.errors import ApiError, invalid
from tidewright_gateway.openai.messages import (
    AssistantMessage,
    Calls,
    ChatMessage,
    InputMessage,
    ToolMessage,
    check_arguments,
    text_of,
)
from tidewright_gateway.openai.protocol import SamplingFields
from tidewright_gateway.openai.responses.items import (
    FunctionCallItem,
    FunctionCallOutputItem,
    Item,
    ItemReference,
    MessageItem,
    ReasoningItem,
)
from tidewright_gateway.openai.responses.request import (
    AllowedFunctions,
    FunctionChoice,
    ResponsesRequest,
    TextFormat,
)

_SAME = (*SamplingFields.model_fields, "parallel_tool_calls", "chat_template_kwargs")
"""Fields that both requests have."""


def input_items(body: ResponsesRequest) -> Sequence[Item | ItemReference]:
    """A text is a message of the user."""
    if isinstance(body.input, str):
        return [MessageItem(role="user", content=body.input)] if body.input else []
    return body.input or []


def to_chat(body: ResponsesRequest, items: Sequence[Item], num_previous: int = 0) -> ChatRequest:
    """
    Args:
        items: the conversation, of which the first `num_previous` are those of the previous response.

    Raises:
        ApiError: they make no chat.
    """
    if len(items) == num_previous and not num_previous:
        raise invalid("input is empty; send a text or at least one item", "input")
    messages = messages_of(items, num_previous)
    if body.instructions is not None:
        messages.insert(0, InputMessage(role="system", content=body.instructions))
    fields = {name: getattr(body, name) for name in _SAME}
    num_logprobs = body.num_logprobs
    return ChatRequest(
        **fields,
        messages=messages,
        max_tokens=body.max_output_tokens,
        tools=_tools(body),
        tool_choice=_tool_choice(body.tool_choice),
        response_format=_response_format(body.text.format if body.text else None),
        reasoning_effort=body.reasoning.effort if body.reasoning else None,
        logprobs=None if num_logprobs is None else True,
        top_logprobs=num_logprobs,
    )


def _tools(body: ResponsesRequest) -> list[dict[str, Any]] | None:
    if body.tools is None:
        return None
    return [{"type": "function", "function": tool.model_dump(exclude={"type"})} for tool in body.tools]


def _tool_choice(choice: Any) -> Any:
    if isinstance(choice, FunctionChoice):
        return _named(choice)
    if isinstance(choice, AllowedFunctions):
        allowed = {"mode": choice.mode, "tools": [_named(tool) for tool in choice.tools]}
        return {"type": "allowed_tools", "allowed_tools": allowed}
    return choice


def _named(choice: FunctionChoice) -> dict[str, Any]:
    return {"type": "function", "function": {"name": choice.name}}


def _response_format(format: TextFormat | None) -> dict[str, Any] | None:
    if format is None:
        return None
    if format.type != "json_schema":
        return {"type": format.type}
    if format.schema_ is None:
        raise invalid("text.format of type json_schema needs schema", "text.format.schema")
    return {"type": "json_schema", "json_schema": {"name": format.name or "", "schema": format.schema_}}


def messages_of(items: Sequence[Item], num_previous: int = 0) -> list[ChatMessage]:
    """One message for what the model said at a time: its reasoning, text and calls.

    Raises:
        ApiError: calls and outputs don't fit together, or the arguments of a call are no JSON object.
    """
    made, calls = _Conversation(), Calls()
    for number, item in enumerate(items):
        if number >= num_previous:
            made.take(item, calls, f"input.{number - num_previous}")
            continue
        try:
            made.take(item, calls, "its item")
        except ApiError as error:  # such as a call that max_output_tokens cut
            told = f"previous_response_id: it can't be continued: {error}"
            raise invalid(told, "previous_response_id") from None
    return made.messages()


class _Conversation:
    def __init__(self) -> None:
        self._messages: list[ChatMessage] = []
        self._reasoning, self._text = list[str](), list[str]()
        self._calls: list[dict[str, Any]] = []

    def take(self, item: Item, calls: Calls, place: str) -> None:
        """Raises ApiError: it does not fit what came before."""
        if isinstance(item, ReasoningItem):
            self._reason(item.text)
        elif isinstance(item, FunctionCallItem):
            check_arguments(item.arguments, f"{place}.arguments")
            calls.ask(item.call_id, f"{place}.call_id")
            self._call(item)
        elif isinstance(item, FunctionCallOutputItem):
            calls.answer(item.call_id, f"{place}.call_id")
            self._add(ToolMessage(role="tool", content=text_of(item.output), tool_call_id=item.call_id))
        elif item.role == "assistant":
            self._say(item.text)
        else:
            self._add(InputMessage(role=item.role, content=item.text))

    def messages(self) -> list[ChatMessage]:
        self._end()
        return self._messages

    def _add(self, message: ChatMessage) -> None:
        self._end()
        self._messages.append(message)

    def _reason(self, text: str) -> None:
        if self._text or self._calls:
            self._end()
        self._reasoning.append(text)

    def _say(self, text: str) -> None:
        # Behind a call, it is more of the same answer: nothing may come between calls and their outputs.
        if self._text and not self._calls:
            self._end()
        self._text.append(text)

    def _call(self, item: FunctionCallItem) -> None:
        function = {"name": item.name, "arguments": item.arguments}
        self._calls.append({"id": item.call_id, "type": "function", "function": function})

    def _end(self) -> None:
        """What the model said is whole."""
        if self._reasoning or self._text or self._calls:
            said = AssistantMessage(
                role="assistant",
                content="".join(self._text) if self._text else None,
                reasoning_content="\n".join(self._reasoning) if self._reasoning else None,
                tool_calls=self._calls or None,
            )
            self._messages.append(said)
        self._reasoning, self._text, self._calls = [], [], []
