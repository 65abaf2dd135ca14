"""The formats that are known, and which of them a model writes."""

from __future__ import annotations

from tidewright.chat_template import ChatTemplate
from tidewright_gateway.openai.tools.base import ToolFormat
from tidewright_gateway.openai.tools.json_formats import Hermes, LlamaJson, Mistral
from tidewright_gateway.openai.tools.pythonic import Pythonic

FORMATS: dict[str, type[ToolFormat]] = {made.name: made for made in (Hermes, Mistral, LlamaJson, Pythonic)}


def format_of(template: ChatTemplate | None) -> type[ToolFormat]:
    """The format that a model writes, by the words of its chat template."""
    if template:
        for found in FORMATS.values():
            if any(map(template.mentions, found.markers)):
                return found
    return Hermes
