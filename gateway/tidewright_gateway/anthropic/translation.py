"""From a body of Anthropic's API to the one internal request. No I/O."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, ClassVar

import msgspec

from tidewright_gateway.anthropic.blocks import (
    AssistantTurn,
    SystemTurn,
    TextBlock,
    ThinkingBlock,
    ToolResultBlock,
    ToolUseBlock,
    UserTurn,
)
from tidewright_gateway.anthropic.protocol import (
    AnyToolChoice,
    Conversation,
    CustomTool,
    MessagesRequest,
    NamedToolChoice,
    NoToolChoice,
)
from tidewright_gateway.openai.chat import ChatRequest
from tidewright_gateway.openai.errors import ApiError, invalid
from tidewright_gateway.openai.messages import (
    AssistantMessage,
    Calls,
    ChatMessage,
    FunctionCall,
    InputMessage,
    ToolCall,
    ToolMessage,
    text_of,
)
from tidewright_gateway.openai.protocol import JsonSchema, ResponseFormat
from tidewright_gateway.openai.tools.definitions import Function, FunctionName, NamedTool, Tool


class TranslatedRequest(ChatRequest):
    """Its errors have Anthropic's names of the fields, but for the places that `as_sent` renames."""

    names_of_ours: ClassVar[Mapping[str, str]] = {"stop": "stop_sequences"}

    @property
    def schema_field(self) -> str:
        return "output_config.format" if self.response_format else ""


def chat_of(body: Conversation) -> TranslatedRequest:
    """Raises ApiError: the messages, or the tools, don't fit together."""
    own: dict[str, Any] = {}
    if isinstance(body, MessagesRequest):
        own = {
            "max_tokens": body.max_tokens,
            "stop": body.stop_sequences,
            "temperature": body.temperature,
            "top_p": body.top_p,
            "top_k": body.top_k,
            "stream": body.stream,
            "user": body.metadata.user_id if body.metadata else None,
        }
    choice, config = body.tool_choice, body.output_config
    request = TranslatedRequest(
        model=body.model,
        messages=_messages(body),
        continue_final_message=_continues(body.messages),
        tools=[_tool(tool) for tool in body.tools] if body.tools else None,
        tool_choice=_choice(body),
        parallel_tool_calls=False if choice and choice.disable_parallel_tool_use else None,
        chat_template_kwargs={"enable_thinking": body.thinking.type != "disabled"} if body.thinking else None,
        reasoning_effort=config.effort if config else None,
        response_format=_format(config.format.schema_) if config and config.format else None,
        **own,
    )
    try:
        _ = request.tool_use  # which checks the tools
    except ApiError as error:
        raise as_sent(error) from None
    return request


_PLACE = re.compile(r"\b(tools\.\d+)\.function\.(\w+)")


def as_sent(error: ApiError) -> ApiError:
    """The same error, with the place in a tool as Anthropic's API has it."""

    def theirs(found: re.Match[str]) -> str:
        return f"{found[1]}.{'input_schema' if found[2] == 'parameters' else found[2]}"

    error.param = error.param and _PLACE.sub(theirs, error.param)
    error.args = (_PLACE.sub(theirs, str(error)),)
    return error


def _tool(tool: CustomTool) -> Tool:
    function = Function(name=tool.name, description=tool.description, parameters=tool.input_schema, strict=tool.strict)
    return Tool(type="function", function=function)


def _choice(body: Conversation) -> Any:
    """As chat completions have it."""
    choice = body.tool_choice
    if isinstance(choice, NamedToolChoice):
        return NamedTool(type="function", function=FunctionName(name=choice.name))
    if isinstance(choice, AnyToolChoice):
        return "required"
    return "none" if isinstance(choice, NoToolChoice) else None


def _format(schema: dict[str, Any]) -> ResponseFormat:
    return ResponseFormat(type="json_schema", json_schema=JsonSchema(schema=schema))


def _continues(turns: Sequence[UserTurn | AssistantTurn | SystemTurn]) -> bool | None:
    """Whether the answer continues the last message. Raises ApiError: it can't."""
    last, place = turns[-1], f"messages.{len(turns) - 1}"
    if not isinstance(last, AssistantTurn):
        return None
    blocks = _blocks(last.content)
    if any(isinstance(block, ToolUseBlock) for block in blocks):
        raise invalid(f"{place}: its tool_use blocks need tool_result blocks in a user message after it", place)
    if not any(isinstance(block, TextBlock) and block.text.strip() for block in blocks):
        raise invalid(f"{place}: the last message is an answer without text to continue; send a user message", place)
    return True


def _messages(body: Conversation) -> list[ChatMessage]:
    found: list[ChatMessage] = []
    if system := text_of(body.system):
        found.append(InputMessage(role="system", content=system))
    asked = Calls()
    for number, turn in enumerate(body.messages):
        if isinstance(turn, AssistantTurn):
            found.append(_answer(turn, f"messages.{number}", asked))
        elif isinstance(turn, UserTurn):
            found += _user(turn, f"messages.{number}", asked)
        else:
            found.append(InputMessage(role="system", content=text_of(turn.content)))
    return _joined(found)


def _answer(turn: AssistantTurn, place: str, asked: Calls) -> AssistantMessage:
    text, thinking, calls = "", "", list[ToolCall]()
    for at, block in enumerate(_blocks(turn.content)):
        if isinstance(block, TextBlock):
            text += block.text
        elif isinstance(block, ThinkingBlock):
            thinking += block.thinking
        elif isinstance(block, ToolUseBlock):
            arguments = _json(block.input, f"{place}.content.{at}.input")
            calls.append(ToolCall(id=block.id, function=FunctionCall(name=block.name, arguments=arguments)))
            asked.ask(block.id, f"{place}.content.{at}.id")
    return AssistantMessage(
        role="assistant", content=text, reasoning_content=thinking or None, tool_calls=calls or None
    )


def _user(turn: UserTurn, place: str, asked: Calls) -> list[ChatMessage]:
    found: list[ChatMessage] = []
    for is_text, group in groupby(enumerate(_blocks(turn.content)), lambda pair: isinstance(pair[1], TextBlock)):
        if is_text:
            found.append(InputMessage(role="user", content="".join(block.text for _, block in group)))
        else:
            found += [_result(block, f"{place}.content.{at}", asked) for at, block in group]
    return found or [InputMessage(role="user", content="")]


def _result(block: ToolResultBlock, place: str, asked: Calls) -> ToolMessage:
    asked.answer(block.tool_use_id, f"{place}.tool_use_id")
    text = text_of(block.content)
    if block.is_error and not text.lower().startswith("error"):
        text = f"Error: {text}"
    return ToolMessage(role="tool", content=text, tool_call_id=block.tool_use_id)


def _blocks(content: str | Sequence[Any]) -> Sequence[Any]:
    return [TextBlock(type="text", text=content)] if isinstance(content, str) else content


def _json(value: dict[str, Any], place: str) -> str:
    try:
        return msgspec.json.encode(value).decode()
    except (RecursionError, OverflowError):
        raise invalid(f"{place} has too many objects within each other, or too large a number", place) from None


def _joined(messages: Sequence[ChatMessage]) -> list[ChatMessage]:
    """Consecutive messages of one role as one, as Anthropic's API does: many templates want the roles to alternate."""
    found: list[ChatMessage] = []
    for role, group in groupby(messages, lambda message: message.role):
        same: list[Any] = list(group)
        if len(same) == 1 or role == "tool":
            found += same
        elif role == "assistant":
            found.append(_one_answer(same))
        else:
            found.append(InputMessage(role=same[0].role, content="\n".join(one.text for one in same)))
    return found


def _one_answer(parts: Sequence[AssistantMessage]) -> AssistantMessage:
    return AssistantMessage(
        role="assistant",
        content="\n".join(part.text for part in parts if part.text),
        reasoning_content="\n".join(part.reasoning_content for part in parts if part.reasoning_content) or None,
        tool_calls=[call for part in parts for call in part.tool_calls or ()] or None,
    )
