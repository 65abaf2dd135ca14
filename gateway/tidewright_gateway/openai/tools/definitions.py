"""Tools that a chat offers to the model, and what of them it may or must call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, StrictBool, StrictStr, model_validator
from pydantic_core import PydanticCustomError

from tidewright_gateway.openai.errors import invalid
from tidewright_gateway.openai.fields import ApiObject, Many

MAX_TOOLS = 128
ToolName = Annotated[StrictStr, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]


class Function(ApiObject):
    place = "tools.function."

    name: ToolName
    """Letters, digits, `_`, `-` and `.`; at most 64 characters."""
    description: StrictStr | None = None
    parameters: dict[str, Any] | None = None
    """A JSON schema of an object; without one, the function takes no arguments."""
    strict: StrictBool | None = None
    """Calls follow the schema exactly, also with tool_choice "auto"."""


_FORMS = {
    "/v1/chat/completions": '{"type": "function", "function": {"name": "...", "parameters": {...}}}',
    "/v1/responses": '{"type": "function", "name": "...", "parameters": {...}}',
    "/v1/messages": '{"name": "...", "input_schema": {...}}',
}


class ApiTool(ApiObject):
    """A tool as one of the APIs has it; one in the form of another is refused with the form that is wanted."""

    path: ClassVar[str]

    @model_validator(mode="before")
    @classmethod
    def _of_this_api(cls, given: Any) -> Any:
        path = _path_of(given) if isinstance(given, dict) else None
        if path in (None, cls.path):
            return given
        forms = {"other": path, "here": cls.path, "form": _FORMS[cls.path]}
        raise PydanticCustomError("other_form", "this is a tool of {other}; in {here} it is {form}", forms)


def _path_of(tool: dict[str, Any]) -> str | None:
    """The API whose form it has; None if that is open."""
    if "input_schema" in tool:
        return "/v1/messages"
    if isinstance(tool.get("function"), dict):
        return "/v1/chat/completions"
    is_function = tool.get("type") == "function" or "parameters" in tool
    return "/v1/responses" if is_function and "name" in tool else None


class Tool(ApiTool):
    path = "/v1/chat/completions"
    place = "tools."
    without_effect = frozenset({"cache_control"})

    type: Literal["function"]
    function: Function


class FunctionName(ApiObject):
    name: StrictStr


class NamedTool(ApiObject):
    type: Literal["function"]
    function: FunctionName


class AllowedTools(ApiObject):
    mode: Literal["auto", "required"]
    tools: Many[NamedTool] = Field(min_length=1)


class AllowedToolsChoice(ApiObject):
    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


ToolChoice = (
    Literal["none", "auto", "required"] | Annotated[NamedTool | AllowedToolsChoice, Field(discriminator="type")]
)


@dataclass(frozen=True)
class ToolUse:
    """The tools of a chat that the model may call."""

    functions: tuple[Function, ...]
    numbers: tuple[int, ...]
    """The place of each in the list of tools."""
    is_forced: bool = False
    """The answer is a call."""
    is_parallel: bool = True
    """It may make several calls."""

    @property
    def is_strict(self) -> bool:
        return any(function.strict for function in self.functions)

    @property
    def names(self) -> frozenset[str]:
        return frozenset(function.name for function in self.functions)


def tool_use(tools: list[Tool] | None, choice: Any, parallel: bool | None) -> ToolUse | None:
    """What the model may call; None if nothing. `choice`: a ToolChoice, or None if there is none.

    Raises:
        ApiError: the tools can't be used, or the choice names none of them.
    """
    functions = [tool.function for tool in tools or ()]
    _check(functions)
    named = {function.name: function for function in functions}
    if choice == "none" or (not functions and choice in (None, "auto")):
        return None
    if not functions:
        raise invalid("tool_choice asks for a call, but there are no tools", "tool_choice")
    is_parallel = parallel is not False
    if isinstance(choice, NamedTool):
        return _use([_find(named, choice)], functions, is_forced=True, is_parallel=False)
    if isinstance(choice, AllowedToolsChoice):
        allowed = choice.allowed_tools
        chosen = [_find(named, tool) for tool in allowed.tools]
        return _use(chosen, functions, is_forced=allowed.mode == "required", is_parallel=is_parallel)
    return _use(functions, functions, is_forced=choice == "required", is_parallel=is_parallel)


def _use(chosen: list[Function], functions: list[Function], *, is_forced: bool, is_parallel: bool) -> ToolUse:
    numbers = {function.name: number for number, function in enumerate(functions)}
    return ToolUse(tuple(chosen), tuple(numbers[one.name] for one in chosen), is_forced, is_parallel)


def _find(named: dict[str, Function], tool: NamedTool) -> Function:
    name = tool.function.name
    if name not in named:
        raise invalid(f"tool_choice names {name!r}, which is none of the tools", "tool_choice")
    return named[name]


def _check(functions: list[Function]) -> None:
    if len(functions) > MAX_TOOLS:
        raise invalid(f"{len(functions)} tools are more than {MAX_TOOLS}", "tools")
    seen: set[str] = set()
    for number, function in enumerate(functions):
        place = f"tools.{number}.function"
        if function.name in seen:
            raise invalid(f"{place}.name: {function.name!r} is the name of an earlier tool, too", f"{place}.name")
        seen.add(function.name)
        if function.parameters and function.parameters.get("type", "object") != "object":
            message = f'{place}.parameters: must be the schema of an object, with "type": "object"'
            raise invalid(message, f"{place}.parameters")
