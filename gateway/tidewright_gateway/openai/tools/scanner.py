"""Reads text character by character: the ground of the parsers of tool calls.

A scan is a generator that is sent one character at a time, and "" when the text ends. So no parser can see how the text
was split into pieces.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress

from tidewright_gateway.openai.output import CallArguments, CallBegin, Event, OutputParser, Text, joined

T = Generator[None, str, str]
Found = Generator[None, str, bool]

_ARGUMENTS = ("arguments", "parameters")


class MalformedError(Exception):
    """The text is no call of a tool."""


class ToolScanner(OutputParser):
    """Of one answer. What turns out to be no call is text."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._num_calls = 0
        self._blanks = ""  # at the end of the text so far: dropped before a call
        self._again: list[str] = []  # characters to be read once more
        self._read: list[str] | None = None  # what may turn out to be text
        self._run = self._whole()
        next(self._run)

    def push(self, text: str) -> list[Event]:
        for character in text:
            self._run.send(character)
        return self._take()

    def finish(self) -> list[Event]:
        with suppress(StopIteration):
            self._run.send("")
        return self._take()

    def _take(self) -> list[Event]:
        events, self._events = joined(self._events), []
        return events

    def _whole(self) -> Generator[None, str, None]:
        yield from self._scan()
        while character := (yield from self._next()):
            self._text(character)
        if not self._num_calls:
            self._emit_text(self._blanks)

    @abstractmethod
    def _scan(self) -> Generator[None, str, None]:
        """Reads the text up to where no call can follow."""

    # What is found.

    def _text(self, text: str) -> None:
        """Text of the answer; blanks wait for what follows them."""
        for character in text:
            if character.isspace():
                self._blanks += character
            else:
                self._emit_text(self._blanks + character)
                self._blanks = ""

    def _emit_text(self, text: str) -> None:
        if text:
            self._events.append(Text(text))

    def _begin(self, name: str) -> None:
        self._read, self._blanks = None, ""  # no way back
        self._events.append(CallBegin(self._num_calls, name))
        self._num_calls += 1

    def _arguments(self, text: str) -> None:
        if text:
            self._events.append(CallArguments(self._num_calls - 1, text))

    @contextmanager
    def _attempt(self, before: str = "") -> Iterator[None]:
        """What is read within it, and `before`, is text, should it be malformed before a call has begun."""
        self._read = list(before)
        try:
            yield
        except MalformedError:
            if self._read is not None and not self._is_cut:
                self._text("".join(self._read))
        finally:
            self._read = None

    # Reading.

    def _next(self) -> T:
        character = self._again.pop() if self._again else (yield)
        if not character:
            self._again.append(character)  # the end stays the end
        elif self._read is not None:
            self._read.append(character)
        return character

    def _unread(self, character: str) -> None:
        if character:
            self._again.append(character)
            if self._read is not None:
                self._read.pop()

    def _until(self, marker: str) -> Found:
        """Reads text up to a marker. False: the text ends without it."""
        held = ""
        while character := (yield from self._next()):
            held += character
            while not marker.startswith(held):
                self._text(held[0])
                held = held[1:]
            if held == marker:
                return True
        if not self._is_cut:
            self._text(held)
        return False

    @property
    def _is_cut(self) -> bool:
        """The text has ended, perhaps in the middle of one more call."""
        return self._num_calls > 0 and self._again[-1:] == [""]

    def _skip_until(self, marker: str) -> Found:
        """The same, but drops what is before the marker."""
        last = ""
        while character := (yield from self._next()):
            last = (last + character)[-len(marker) :]
            if last == marker:
                return True
        return False

    def _skip(self, text: str) -> Generator[None, str, None]:
        """Drops blanks and this text, if they come next, also where the answer is cut within them."""
        read = []
        while (character := (yield from self._next())).isspace():
            read.append(character)
        self._unread(character)
        for expected in text:
            character = yield from self._next()
            if not character:
                return
            if character != expected:
                self._again += [character, *reversed(read)]
                return
            read.append(character)

    def _expect(self, text: str) -> Generator[None, str, None]:
        for expected in text:
            if (yield from self._next()) != expected:
                raise MalformedError

    def _after_blanks(self) -> T:
        while (character := (yield from self._next())).isspace():
            pass
        return character

    # JSON.

    def _call_object(self, known: frozenset[str] | None = None) -> Generator[None, str, None]:
        """A call as a JSON object with `name` and `arguments` or `parameters`; its `{` has been read.

        `known`: names that a call may have, where any other object is text.

        Raises:
            MalformedError: it is none.
        """
        name, early, has_begun = "", None, False
        character = yield from self._after_blanks()
        while character != "}":
            if character != '"':
                raise MalformedError
            key = _decoded((yield from self._string()))
            if (yield from self._after_blanks()) != ":":
                raise MalformedError
            character = yield from self._after_blanks()
            if key == "name" and not name:
                if character != '"':
                    raise MalformedError
                name = _decoded((yield from self._string()))
                if not name or (known is not None and name not in known):
                    raise MalformedError
            elif key in _ARGUMENTS and not has_begun:
                if name:
                    self._begin(name)
                    has_begun = True
                    yield from self._argument_object(character)
                else:
                    early = yield from self._value(character)
            else:
                yield from self._value(character)
            character = yield from self._after_blanks()
            if character == ",":
                character = yield from self._after_blanks()
        if not name or (known is not None and not has_begun and early is None):
            raise MalformedError
        if not has_begun:
            self._begin(name)
            self._arguments(_argument_text(early or "{}"))

    def _argument_object(self, first: str) -> Generator[None, str, None]:
        """Arguments, told as they come where they are an object."""
        if first == "{":
            yield from self._value(first, tell=True)
        else:
            self._arguments(_argument_text((yield from self._value(first))))

    def _string(self) -> T:
        """The rest of a JSON string; returns it whole."""
        text = ['"']
        while True:
            character = yield from self._next()
            if not character:
                raise MalformedError
            text.append(character)
            if character == "\\":
                text.append((yield from self._next()))
            elif character == '"':
                return "".join(text)

    def _value(self, first: str, *, tell: bool = False) -> T:
        """A JSON value, of which the first character has been read; returns it whole, or tells it as it comes."""
        text, depth, is_string, is_escaped = [], 0, False, False
        character = first
        while character:
            if tell:
                self._arguments(character)
            text.append(character)
            if is_string:
                if is_escaped:
                    is_escaped = False
                elif character == "\\":
                    is_escaped = True
                elif character == '"':
                    is_string = False
            elif character == '"':
                is_string = True
            elif character in "{[":
                depth += 1
            elif character in "}]":
                depth -= 1
            if depth <= 0 and not is_string and character in '}]"':
                return "".join(text)
            character = yield from self._next()
            if depth == 0 and not is_string and (character in ",}]" or character.isspace()):
                self._unread(character)  # behind a number or a word
                return "".join(text)
        raise MalformedError


def _argument_text(value: str) -> str:
    """Some models write arguments as a string that holds the JSON, or null where there are none."""
    if value.startswith('"'):
        return _decoded(value)
    return value if value.startswith("{") else "{}"


def _decoded(text: str) -> str:
    try:
        found = json.loads(text)
        if not isinstance(found, str):
            return ""
        found.encode()  # half of a surrogate pair is no text
    except ValueError:
        raise MalformedError from None
    return found
