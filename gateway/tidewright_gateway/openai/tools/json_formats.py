"""Formats in which a call of a tool is a JSON object."""

from __future__ import annotations

import secrets
import string
from collections.abc import Generator, Sequence
from typing import Any

from tidewright_gateway.openai.tools.base import ToolFormat, lark_object, several, to_json
from tidewright_gateway.openai.tools.definitions import Function, ToolUse
from tidewright_gateway.openai.tools.scanner import MalformedError, ToolScanner


class Hermes(ToolFormat):
    """`<tool_call>` with a JSON object for each call: Hermes, Qwen, and models without a format of their own."""

    name = "hermes"
    markers = ("<tool_call>",)
    opening = "<tool_call>"
    instruction = """\
To call a function, write a JSON object with its name and its arguments between these markers:
<tool_call>
{"name": "the name", "arguments": {}}
</tool_call>"""

    def scanner(self, use: ToolUse) -> ToolScanner:
        return _HermesScanner()

    def text(self, calls: Sequence[dict[str, Any]]) -> str:
        return "\n".join(f"<tool_call>\n{to_json(call)}\n</tool_call>" for call in calls)

    def _call(self, function: Function) -> str:
        return f'"\\n" {lark_object(function, "arguments")} "\\n</tool_call>"'

    def _behind_opening(self, most: int) -> str:
        return several(f'"\\n" {self._opening}', most)


class _HermesScanner(ToolScanner):
    def _scan(self) -> Generator[None, str, None]:
        while (yield from self._until("<tool_call>")):
            with self._attempt("<tool_call>"):
                if (yield from self._after_blanks()) != "{":
                    raise MalformedError
                yield from self._call_object()
                yield from self._skip("</tool_call>")


class Mistral(ToolFormat):
    """`[TOOL_CALLS]` with a list of JSON objects; newer models write a name and its arguments behind each marker."""

    name = "mistral"
    markers = ("[TOOL_CALLS]",)
    opening = "[TOOL_CALLS]"
    instruction = 'To call functions, write [TOOL_CALLS][{"name": "the name", "arguments": {}}] and nothing else.'

    def scanner(self, use: ToolUse) -> ToolScanner:
        return _MistralScanner()

    def text(self, calls: Sequence[dict[str, Any]]) -> str:
        return f"[TOOL_CALLS]{to_json(list(calls))}"

    def make_id(self) -> str:
        """Mistral's templates take no other ids than these."""
        return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))

    def _call(self, function: Function) -> str:
        return lark_object(function, "arguments")

    def _behind_opening(self, most: int) -> str:
        calls = several('", "', most)
        return f'"[" {calls} "]"'


class _MistralScanner(ToolScanner):
    def _scan(self) -> Generator[None, str, None]:
        while (yield from self._until("[TOOL_CALLS]")):
            with self._attempt("[TOOL_CALLS]"):
                first = yield from self._after_blanks()
                if first == "[":
                    yield from self._list()
                elif first == "{":
                    yield from self._call_object()
                else:
                    yield from self._named(first)

    def _list(self) -> Generator[None, str, None]:
        character = ","
        while character == ",":
            if (yield from self._after_blanks()) != "{":
                raise MalformedError
            yield from self._call_object()
            character = yield from self._after_blanks()

    def _named(self, first: str) -> Generator[None, str, None]:
        """`name{…}` or `name[ARGS]{…}`, and in some versions `name[CALL_ID]…[ARGS]{…}`."""
        name = first
        while (character := (yield from self._next())) not in ("{", "[", ""):
            name += character
        if character == "[" and not (yield from self._skip_until("ARGS]")):
            raise MalformedError
        if character == "[":
            character = yield from self._after_blanks()
        if not name.strip() or character != "{":
            raise MalformedError
        self._begin(name.strip())
        yield from self._argument_object(character)


class LlamaJson(ToolFormat):
    """The whole answer is a JSON object with `name` and `parameters`, or several between semicolons: Llama 3."""

    name = "llama3_json"
    markers = ("<|python_tag|>", '{"name": function name, "parameters":')

    instruction = 'To call a function, write {"name": "the name", "parameters": {}} and nothing else.'

    def scanner(self, use: ToolUse) -> ToolScanner:
        return _LlamaScanner(use.names)

    def text(self, calls: Sequence[dict[str, Any]]) -> str:
        return "; ".join(to_json({"name": call["name"], "parameters": call["arguments"]}) for call in calls)

    def _call(self, function: Function) -> str:
        return lark_object(function, "parameters")

    def _behind_opening(self, most: int) -> str:
        return several('"; "', most)


class _LlamaScanner(ToolScanner):
    def __init__(self, names: frozenset[str]) -> None:
        self._names = names
        super().__init__()

    def _scan(self) -> Generator[None, str, None]:
        character, is_call = ";", True
        while character == ";" and is_call:
            calls = self._num_calls
            with self._attempt(";" if calls else ""):
                first = yield from self._after_blanks()
                if first == "<":
                    yield from self._expect("|python_tag|>")
                    first = yield from self._after_blanks()
                if first != "{":
                    raise MalformedError
                yield from self._call_object(self._names)
            if is_call := self._num_calls > calls:
                character = yield from self._after_blanks()
        if is_call:
            self._unread(character)
