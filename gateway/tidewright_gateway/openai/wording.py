"""Errors of a model's side, in the words of the request that they are about."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tidewright.resilience.errors import ModelError
from tidewright.resilience.outcome import Outcome
from tidewright.schema import SamplingParams
from tidewright_gateway.openai.errors import ApiError, invalid, of_model

_GRAMMAR = re.compile(r"(?P<name>guided_\w+): (?:at (?P<line>\d+)\(\d+\): )?(?P<why>.*?)(?: \d+ \| .*)?", re.DOTALL)
_FAILED = "guided output failed: "  # of a grammar that was good until it was used
_FIRST = re.compile(rf"({'|'.join(SamplingParams.__struct_fields__)})\b")


@dataclass(frozen=True)
class Wording:
    """Of one request."""

    names: Mapping[str, str] = field(default_factory=dict)
    """What the request calls sampling parameters that it names differently."""
    grammar: str = ""
    """The field that its grammar comes from; empty without a grammar."""
    lines: Sequence[str] = ()
    """The field that each line of its grammar comes from, if that was made of several."""

    def told(self, error: ModelError | ApiError) -> ApiError:
        """The error as the caller gets it; an ApiError is that already."""
        if isinstance(error, ApiError) or error.outcome is not Outcome.INVALID:
            return of_model(error)
        message = str(error)
        if message.startswith(_FAILED) and self.grammar:
            return invalid(f"{self.grammar}: {message}", self.grammar)
        if grammar := _GRAMMAR.fullmatch(message):
            name, line = grammar["name"], int(grammar["line"] or 0)
            told = self.lines[line - 1] if 0 < line <= len(self.lines) else self.names.get(name, name)
            return invalid(message if told == name else f"{told}: {grammar['why']}", told)
        first = _FIRST.match(message)
        return invalid(self._renamed(message), first and self._renamed(first[0]))

    def _renamed(self, text: str) -> str:
        return re.sub(r"\w+", lambda word: self.names.get(word[0], word[0]), text) if self.names else text
