"""What a model's text means: answer, reasoning, and calls of tools. Events come as soon as they are certain."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Text:
    """More of the answer."""

    text: str


@dataclass(frozen=True)
class Reasoning:
    """More of what the model thinks before its answer."""

    text: str


@dataclass(frozen=True)
class CallBegin:
    """The model calls a tool; its arguments follow."""

    index: int
    name: str


@dataclass(frozen=True)
class CallArguments:
    """More of the JSON of a call's arguments."""

    index: int
    text: str


Event = Text | Reasoning | CallBegin | CallArguments


class OutputParser(ABC):
    """Of one answer. How its text is split into pieces makes no difference to the events, once they are joined."""

    @abstractmethod
    def push(self, text: str) -> list[Event]:
        """The events that are certain with this text."""

    @abstractmethod
    def finish(self) -> list[Event]:
        """The rest, when no further text comes."""


def joined(events: Sequence[Event]) -> list[Event]:
    """The same in as few events as possible."""
    found: list[Event] = []
    for event in events:
        last = found[-1] if found else None
        if isinstance(event, Text) and isinstance(last, Text):
            found[-1] = Text(last.text + event.text)
        elif isinstance(event, Reasoning) and isinstance(last, Reasoning):
            found[-1] = Reasoning(last.text + event.text)
        elif isinstance(event, CallArguments) and isinstance(last, CallArguments) and event.index == last.index:
            found[-1] = CallArguments(event.index, last.text + event.text)
        else:
            found.append(event)
    return found


class ReasoningParser(OutputParser):
    """Splits what stands between two markers at the beginning of the text from the rest, which another parser reads.

    The line breaks around both parts belong to neither.
    """

    def __init__(self, begin: str, end: str, inner: OutputParser, *, has_begun: bool) -> None:
        """`has_begun`: the prompt ends with `begin`."""
        self._begin, self._end, self._inner = begin, end, inner
        self._state = "thinking" if has_begun else "start"
        self._held = ""

    def push(self, text: str) -> list[Event]:
        if self._state == "answer":
            return self._inner.push(text)
        self._held += text
        return joined(self._step())

    def finish(self) -> list[Event]:
        held, self._held = self._held, ""
        if self._state == "thinking":
            return [*_reasoning(held.rstrip()), *self._inner.finish()]
        if self._state == "answer begins":
            held = held.lstrip("\n")
        return joined([*self._inner.push(held), *self._inner.finish()])

    def _step(self) -> list[Event]:
        events: list[Event] = []
        if self._state == "start":
            begun = self._held.lstrip()
            if len(begun) < len(self._begin) and self._begin.startswith(begun):
                return events
            if not begun.startswith(self._begin):
                return self._answer()
            self._state, self._held = "thinking begins", begun[len(self._begin) :]
        if self._state == "thinking begins":
            self._held = self._held.lstrip("\n")
            if not self._held:
                return events
            self._state = "thinking"
        if self._state == "thinking":
            before, marker, after = self._held.partition(self._end)
            if not marker:
                certain = len(before) - max(_overlap(before, self._end), _blank(before))
                self._held = before[certain:]
                return _reasoning(before[:certain])
            events += _reasoning(before.rstrip())
            self._state, self._held = "answer begins", after
        self._held = self._held.lstrip("\n")
        return [*events, *self._answer()] if self._held else events

    def _answer(self) -> list[Event]:
        held, self._held, self._state = self._held, "", "answer"
        return self._inner.push(held)


class PlainParser(OutputParser):
    """All is text."""

    def push(self, text: str) -> list[Event]:
        return [Text(text)] if text else []

    def finish(self) -> list[Event]:
        return []


def _reasoning(text: str) -> list[Event]:
    return [Reasoning(text)] if text else []


def _overlap(text: str, marker: str) -> int:
    """Characters at the end of `text` that may be the beginning of `marker`, with the blanks before them."""
    length = next((n for n in range(min(len(marker) - 1, len(text)), 0, -1) if text.endswith(marker[:n])), 0)
    return length + _blank(text[: len(text) - length]) if length else 0


def _blank(text: str) -> int:
    return len(text) - len(text.rstrip())
