"""Calls of tools as a Python list."""

from __future__ import annotations

import ast
import json
from collections.abc import Generator, Sequence
from typing import Any

from tidewright_gateway.openai.tools.base import ToolFormat, lark_schema, literal, several
from tidewright_gateway.openai.tools.definitions import Function, ToolUse
from tidewright_gateway.openai.tools.scanner import MalformedError, ToolScanner


class Pythonic(ToolFormat):
    """The whole answer is a Python list of calls, `[f(a=1), g()]`: Llama 4, and Llama 3.2's smaller models."""

    name = "pythonic"
    markers = ("[func_name1(params_name1=params_value1",)

    instruction = "To call functions, write a Python list of the calls, such as [name(argument=1)], and nothing else."

    def scanner(self, use: ToolUse) -> ToolScanner:
        return _PythonicScanner(use.names)

    def text(self, calls: Sequence[dict[str, Any]]) -> str:
        return f"[{', '.join(_python_call(call) for call in calls)}]"

    def _call(self, function: Function) -> str:
        return f'{literal(function.name + "(**")} {lark_schema(function)} ")"'

    def _behind_opening(self, most: int) -> str:
        calls = several('", "', most)
        return f'"[" {calls} "]"'


class _PythonicScanner(ToolScanner):
    def __init__(self, names: frozenset[str]) -> None:
        self._names = names
        super().__init__()

    def _scan(self) -> Generator[None, str, None]:
        with self._attempt():
            character = yield from self._after_blanks()
            if character != "[":
                raise MalformedError
            character = ","
            while character == ",":
                yield from self._call((yield from self._after_blanks()))
                character = yield from self._after_blanks()
            if character != "]":
                raise MalformedError

    def _call(self, first: str) -> Generator[None, str, None]:
        name = first
        while (character := (yield from self._next())) not in ("(", ""):
            name += character
        if name.strip() not in self._names:
            raise MalformedError
        self._begin(name.strip())
        told = "{"
        character = yield from self._after_blanks()
        while character != ")":
            if character == "*":
                yield from self._expect("*")
                inner = (yield from self._value((yield from self._after_blanks()))).strip()[1:-1].strip()
                character = yield from self._after_blanks()
            else:
                key = character
                while (character := (yield from self._next())) not in ("=", ""):
                    key += character
                value, character = yield from self._expression()
                inner = f"{json.dumps(key.strip())}: {json.dumps(_python(value), ensure_ascii=False)}"
            if inner:
                self._arguments(told + inner)
                told = ", "
            if character == ",":
                character = yield from self._after_blanks()
            elif character != ")":
                raise MalformedError
        self._arguments("{}" if told == "{" else "}")

    def _expression(self) -> Generator[None, str, tuple[str, str]]:
        """A Python expression, and the comma or bracket behind it."""
        text, depth, quote, is_escaped = "", 0, "", False
        while character := (yield from self._next()):
            if quote:
                is_escaped, ends = character == "\\" and not is_escaped, character == quote and not is_escaped
                quote = "" if ends else quote
            elif character in "'\"":
                quote = character
            elif character in "([{":
                depth += 1
            elif character in ",)" and not depth:
                return text, character
            elif character in ")]}":
                depth -= 1
            text += character
        raise MalformedError


def _python(text: str) -> Any:
    """The value of a Python literal, in which JSON's words may stand as well. Raises MalformedError."""
    try:
        return _value_of(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        raise MalformedError from None


_WORDS = {"true": True, "false": False, "null": None}


def _value_of(node: ast.expr) -> Any:
    if isinstance(node, ast.Name) and node.id in _WORDS:
        return _WORDS[node.id]
    if isinstance(node, ast.Dict):
        return {
            str(_value_of(key)): _value_of(value)
            for key, value in zip(node.keys, node.values, strict=True)
            if key is not None
        }
    if isinstance(node, ast.List | ast.Tuple | ast.Set):
        return [_value_of(item) for item in node.elts]
    found = ast.literal_eval(node)
    # Bytes and complex numbers have no JSON, and half of a surrogate pair is no text.
    json.dumps(found, ensure_ascii=False, allow_nan=False).encode()
    return found


def _python_call(call: dict[str, Any]) -> str:
    return f"{call['name']}({', '.join(f'{name}={value!r}' for name, value in call['arguments'].items())})"
