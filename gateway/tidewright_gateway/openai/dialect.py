"""How one model takes and writes what a chat is made of: tools, reasoning, roles. Read from its chat template."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from msgspec.structs import replace

from tidewright.schema import MAX_GRAMMAR_LENGTH, SamplingParams
from tidewright.tokenization import Tokenizer
from tidewright_gateway.config.api import ApiSettings
from tidewright_gateway.context import RequestContext
from tidewright_gateway.openai.answers import Choice
from tidewright_gateway.openai.errors import invalid
from tidewright_gateway.openai.output import OutputParser, PlainParser, ReasoningParser
from tidewright_gateway.openai.tools.base import lark_schema
from tidewright_gateway.openai.tools.definitions import Function, ToolUse
from tidewright_gateway.openai.tools.formats import FORMATS, format_of

THINK = ("<think>", "</think>")

_OFFER = """\
You can call these functions. Each is described by a JSON object with its name, its description and the JSON schema of \
its parameters:
<tools>
{tools}
</tools>
{instruction}
The results come between <tool_response> and </tool_response>."""


class Dialect:
    def __init__(self, tokenizer: Tokenizer, settings: ApiSettings) -> None:
        template = tokenizer.chat_template
        made = format_of(template) if settings.tool_format == "auto" else FORMATS[settings.tool_format]
        special = [tokenizer.special_id(text) for text in (made.opening, *THINK) if text]
        self.tool_format = made(tokenizer.special_id(made.opening))
        self.knows_tools = template is not None and template.mentions("tools")
        """The template describes tools by itself."""
        self._knows_developer = template is not None and template.mentions("developer")
        thinks = template is not None and template.mentions(THINK[1])
        self._thinks = thinks if settings.reasoning == "auto" else settings.reasoning == "think"
        self.needs_special_tokens = any(id is not None for id in special)
        """Its markers are special tokens, which are no part of a text unless asked for."""

        self.defaults = tokenizer.sampling_defaults if settings.generation_config == "model" else {}
        """Sampling parameters of requests that have none of their own."""

    def guide(self, sampling: SamplingParams, use: ToolUse | None) -> SamplingParams:
        """Sampling parameters with which calls can be read, and are as they must be.

        Raises:
            ApiError: they can't be.
        """
        if self.needs_special_tokens and (use or self._thinks):
            sampling = replace(sampling, skip_special_tokens=False)
        if use is None:
            return sampling
        if use.is_forced:
            sampling = replace(sampling, stop=None)  # a call is no text
        if sampling.guided and sampling.guided_json is None:
            raise invalid("guided output and tools exclude each other, unless tool_choice is none", "tool_choice")
        if not (use.is_forced or use.is_strict or sampling.guided):
            return sampling
        schema = sampling.guided_json
        assert schema is None or isinstance(schema, str)  # SamplingParams writes an object as text
        try:
            grammar = self.tool_format.grammar(use, schema)
        except (RecursionError, ValueError) as error:
            place = _place_of_wrong_schema(use)
            raise invalid(f"{place}: is no JSON schema: {error}", place) from None
        if len(grammar) > MAX_GRAMMAR_LENGTH:
            message = f"the schemas of the tools have {len(grammar)} characters; a forced or strict call allows "
            raise invalid(f"{message}{MAX_GRAMMAR_LENGTH}", "tools")
        return replace(sampling, guided_json=None, guided_grammar=grammar)

    def choice(self, context: RequestContext, use: ToolUse | None, index: int, *, keeps_tokens: bool) -> Choice:
        """An empty choice that reads what this model writes."""
        parser: OutputParser | None = self.tool_format.scanner(use) if use else None
        if self._thinks and not context.is_guided:
            has_begun = context.prompt_end.rstrip().endswith(THINK[0])
            parser = ReasoningParser(*THINK, parser or PlainParser(), has_begun=has_begun)
        max_calls = None if use is None or use.is_parallel else 1
        only_calls = use is not None and use.is_forced
        return Choice(index, parser, self.tool_format.make_id, max_calls, keeps_tokens, only_calls=only_calls)

    def turns(self, turns: Sequence[dict[str, Any]], functions: Sequence[Function]) -> list[dict[str, Any]]:
        """The messages, with what the template has no words for said in those that it has.

        Args:
            turns: as `Message.turn` makes them.
            functions: of the tools that are offered.
        """
        found = [self._with_known_role(turn) for turn in turns]
        if self.knows_tools:
            return found
        found = self._with_tools_as_text(found)
        if functions:
            tools = "\n".join(json.dumps(describe(one)["function"], ensure_ascii=False) for one in functions)
            offer = _OFFER.format(tools=tools, instruction=self.tool_format.instruction)
            if found and found[0]["role"] == "system":
                found[0] = {**found[0], "content": f"{found[0]['content']}\n\n{offer}"}
            else:
                found.insert(0, {"role": "system", "content": offer})
        return found

    def _with_known_role(self, turn: dict[str, Any]) -> dict[str, Any]:
        if turn["role"] == "developer" and not self._knows_developer:
            return {**turn, "role": "system"}
        return turn

    def _with_tools_as_text(self, turns: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Calls and results as text. Results are the user's, as some templates have no role for them."""
        found: list[dict[str, Any]] = []
        behind_result = False
        for turn in turns:
            is_result = turn["role"] == "tool"
            if is_result:
                turn = {"role": "user", "content": f"<tool_response>\n{turn['content']}\n</tool_response>"}
            elif calls := turn.get("tool_calls"):
                text = self.tool_format.text([call["function"] for call in calls])
                turn = {"role": turn["role"], "content": "\n".join(filter(None, [turn["content"], text]))}
            if behind_result and turn["role"] == "user":  # some templates want the roles to alternate
                found[-1] = {"role": "user", "content": f"{found[-1]['content']}\n{turn['content']}"}
            else:
                found.append(turn)
                behind_result = is_result
        return found


def _place_of_wrong_schema(use: ToolUse) -> str:
    for number, function in zip(use.numbers, use.functions, strict=True):
        try:
            lark_schema(function)
        except (RecursionError, ValueError):
            return f"tools.{number}.function.parameters"
    return "tools"


def describe(function: Function) -> dict[str, Any]:
    """A function as chat templates take it."""
    parameters = function.parameters or {"type": "object", "properties": {}}
    found = {"name": function.name, "description": function.description or "", "parameters": parameters}
    return {"type": "function", "function": found}
