"""What is common to the formats in which models write calls of tools.

A grammar is Lark with JSON schemas within, as llguidance reads it
(https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md); each schema stays whole, so its `$ref`s hold.
"""

from __future__ import annotations

import json
import re
import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from tidewright_gateway.openai.tools.definitions import Function, ToolUse
from tidewright_gateway.openai.tools.scanner import ToolScanner

MAX_CALLS = 16  # of one answer whose grammar allows several
# One line, as Python's json.dumps writes it: free white space lets a small model write nothing else.
_ONE_LINE = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}


class ToolFormat(ABC):
    name = ""
    markers: tuple[str, ...] = ()
    """Texts in a chat template that show that its model writes this format."""
    opening = ""
    """What announces calls within other text; empty if an answer is either calls or text."""
    instruction = ""
    """How to write a call, for a model whose template says nothing of tools."""

    def __init__(self, opening_id: int | None = None) -> None:
        """`opening_id`: the token id of `opening`, if it is a special token."""
        self.opening_id = opening_id
        self._opening = literal(self.opening) if opening_id is None else f"<[{opening_id}]>"

    @abstractmethod
    def scanner(self, use: ToolUse) -> ToolScanner: ...

    @abstractmethod
    def text(self, calls: Sequence[dict[str, Any]]) -> str:
        """Calls of an earlier answer, each with `name` and `arguments`."""

    def make_id(self) -> str:
        """The id of a new call."""
        return f"call_{secrets.token_hex(12)}"

    def grammar(self, use: ToolUse, answer: str | None) -> str:
        """Lark of what the model may write.

        Args:
            answer: a JSON schema of an answer without calls; None for any text.
        """
        calls = [f"call_{number}: {self._call(function)}" for number, function in enumerate(use.functions)]
        names = " | ".join(f"call_{number}" for number in range(len(calls)))
        behind = self._behind_opening(MAX_CALLS if use.is_parallel else 1)
        rules = [f"behind: {behind}", f"one: {names}", *calls]
        opened = f"{self._opening} behind" if self.opening else "behind"
        if use.is_forced:
            return "\n".join([f"start: {opened}", *rules])
        if answer is not None:
            return "\n".join([f"start: {opened} | %json {one_line(json.loads(answer))}", *rules])
        if not self.opening:
            return "\n".join(["start: behind | TEXT", r"TEXT: /([^\s{\[<](.|\n)*)?/", *rules])
        if self.opening_id is not None:
            return "\n".join([f"start: TEXT ({opened} TEXT)?", r"TEXT: /(.|\n)*/", *rules])
        # The lazy one ends as soon as it can: text has no opening in it.
        return "\n".join(
            ["start: TEXT | opened behind", r"TEXT: /(.|\n)*/", f"opened[lazy]: TEXT {self._opening}", *rules]
        )

    @abstractmethod
    def _call(self, function: Function) -> str:
        """Lark of one call."""

    @abstractmethod
    def _behind_opening(self, most: int) -> str:
        """Lark of one to `most` of the rule `one`, without the opening."""


_OF_CALL = re.compile(r"call_(\d+):")


def grammar_lines(grammar: str, use: ToolUse, place: Callable[[int], str], answer: str) -> list[str]:
    """The field of the request that each line of a grammar comes from.

    Args:
        place: of the schema of a tool, by its number.
        answer: the field of the answer without calls.
    """
    found = []
    for line in grammar.split("\n"):
        if call := _OF_CALL.match(line):
            found.append(place(use.numbers[int(call[1])]))
        else:
            found.append(answer if line.startswith("start:") else "tools")
    return found


def several(between: str, most: int) -> str:
    """Lark of one to `most` of the rule `one`, with `between` in between."""
    return f"one ({between} one){{0,{most - 1}}}" if most > 1 else "one"


def lark_object(function: Function, key: str) -> str:
    """Lark of `{"name": …, "arguments": …}`.

    In the words of JSON's own grammar: a longer one would hide the answer in JSON that may stand instead.
    """
    words = ["{", '"name"', ": ", json.dumps(function.name), ", ", f'"{key}"', ": "]
    return f'{" ".join(map(literal, words))} {lark_schema(function)} "}}"'


def lark_schema(function: Function) -> str:
    schema = function.parameters or {}
    return f"%json {one_line(closed({'type': 'object', **schema}))}"


_SAYS_NOTHING = {"type", "title", "description", "$defs", "definitions", "$schema"}


def closed(schema: Any) -> Any:
    """The schema, without arguments that it does not name, where it does not say that there may be others."""
    if not isinstance(schema, dict):
        return schema
    found = {key: _closed_parts(key, value) for key, value in schema.items()}
    is_composed = any(key in found for key in ("allOf", "anyOf", "oneOf", "$ref", "patternProperties"))
    says_all = "properties" in found or found.keys() <= _SAYS_NOTHING
    if found.get("type") == "object" and says_all and not is_composed:
        found.setdefault("additionalProperties", False)
    return found


def _closed_parts(key: str, value: Any) -> Any:
    if key in ("properties", "$defs", "definitions") and isinstance(value, dict):
        return {name: closed(part) for name, part in value.items()}
    if key == "items":
        return closed(value)
    if key in ("anyOf", "oneOf") and isinstance(value, list):
        return [closed(part) for part in value]
    return value


def one_line(schema: dict[str, Any]) -> str:
    return json.dumps({**schema, "x-guidance": _ONE_LINE}, ensure_ascii=False)


def to_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def literal(text: str) -> str:
    """Lark's literal of a text."""
    return json.dumps(text, ensure_ascii=False)
