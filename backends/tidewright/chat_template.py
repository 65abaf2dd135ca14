"""Chat messages to the text that the model was trained to see, by the template that comes with it."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

MAX_ITERATIONS = 100_000  # of all ranges of a template together, for one prompt


class TemplateError(ValueError):
    """The template refuses the messages, or can't compute with them; the message is for the caller."""


class ChatTemplate:
    """A model's chat template, in the variant for chats with tools where there is one."""

    def __init__(self, source: str | list[dict[str, str]], special_tokens: Mapping[str, str]) -> None:
        """
        Args:
            source: as the tokenizer's configuration has it: one, or several as `{"name", "template"}`.
            special_tokens: texts by name, such as `bos_token`.

        Raises:
            jinja2.TemplateError: it is no template.
        """
        named = {"default": source} if isinstance(source, str) else {one["name"]: one["template"] for one in source}
        self._sources = named
        environment = _environment()
        self._templates = {name: environment.from_string(text) for name, text in named.items()}
        self._special_tokens = dict(special_tokens)

    def mentions(self, word: str) -> bool:
        """Whether one of its variants has this word anywhere: the sign that it knows a role, a variable or a marker."""
        return any(word in source for source in self._sources.values())

    def render(
        self, messages: list[dict[str, Any]], limit: int = 0, variables: Mapping[str, Any] = MappingProxyType({})
    ) -> str:
        """The prompt for these messages.

        Args:
            messages: as the template takes them; arguments of tool calls are objects.
            limit: characters after which rendering stops, as the text is too long anyway; 0 is no limit.
            variables: `tools`, `add_generation_prompt`, and what else the template reads.

        Raises:
            TemplateError: there is none.
        """
        name = "tool_use" if variables.get("tools") and "tool_use" in self._templates else "default"
        if name not in self._templates:
            raise TemplateError(f"the model has no chat template named {name!r}")
        # Documents are none, but known: templates ask `documents is not none`.
        known = {"tools": None, "documents": None, **variables, **self._special_tokens, "messages": messages}
        known["range"] = _bounded_range()
        text, length = [], 0
        try:
            for piece in self._templates[name].generate(known):
                text.append(piece)
                length += len(piece)
                if 0 < limit < length:
                    break
        except Exception as error:  # whatever the template can't compute with in these messages
            raise TemplateError(f"the model's chat template refuses the messages: {error}") from None
        return "".join(text)


def _bounded_range() -> Callable[..., range]:
    """Python's `range` for one prompt: templates have no other loop that is longer than what they are given."""
    left = MAX_ITERATIONS

    def make(*bounds: int) -> range:
        nonlocal left
        found = range(*bounds)
        left -= len(found)
        if left < 0:
            raise jinja2.TemplateError(f"its loops have more than {MAX_ITERATIONS} turns")
        return found

    return make


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks what to train on; for serving, the marked text is just text."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> jinja2.Environment:
    """The environment that chat templates are written for: that of transformers' apply_chat_template."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda pattern: datetime.datetime.now().strftime(pattern)
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML, which would reach the model."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
