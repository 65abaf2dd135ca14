"""Parses server-sent events from bytes, however they are cut. No I/O; the events' meaning is answers.py's business."""

from __future__ import annotations

import re

MAX_LINE = 16 * 2**20
"""Bytes of an event's data that are accepted."""

_BOM = b"\xef\xbb\xbf"
_LINE_END = re.compile(rb"\r\n|\n|\r")


class TooLongError(ValueError):
    """A line, or the lines of one event, are longer than MAX_LINE."""


class Parser:
    """Takes the bytes of one stream, gives the data of its events. What a stream leaves unfinished is dropped."""

    def __init__(self) -> None:
        self._start: bytes | None = b""
        """What may become a byte order mark; None after the start."""
        self._line = bytearray()  # not ended yet
        self._after_cr = False  # a line feed that comes next belongs to the line end before it
        self._data: list[bytes] = []  # of the event that is not ended yet
        self._size = 0

    def feed(self, data: bytes) -> list[str]:
        """The data of the events that end in these bytes. Events without data, comments and other fields are dropped.

        Raises:
            TooLongError: the stream can't be used any more.
        """
        if self._start is not None:
            data = self._start + data
            if len(data) < len(_BOM) and _BOM.startswith(data):
                self._start = data
                return []
            self._start = None
            data = data.removeprefix(_BOM)
        if self._after_cr and data:
            self._after_cr = False
            data = data.removeprefix(b"\n")
        if not data:
            return []
        self._after_cr = data.endswith(b"\r")
        first, *others = _LINE_END.split(data)
        self._line += first
        self._check(len(self._line))
        if not others:
            return []
        events: list[str] = []
        self._take(bytes(self._line), events)
        for line in others[:-1]:
            self._take(line, events)
        self._line = bytearray(others[-1])
        return events

    def _take(self, line: bytes, events: list[str]) -> None:
        if not line:
            if self._size:
                events.append(b"\n".join(self._data).decode(errors="replace"))
            self._data, self._size = [], 0
            return
        name, _, value = line.partition(b":")
        if name == b"data":
            value = value.removeprefix(b" ")
            self._data.append(value)
            # Each line counts, or empty ones would be kept without a bound.
            self._size += len(value) + 1
            self._check(self._size)

    def _check(self, size: int) -> None:
        if size > MAX_LINE:
            raise TooLongError(f"a line of the stream is longer than {MAX_LINE} bytes")
