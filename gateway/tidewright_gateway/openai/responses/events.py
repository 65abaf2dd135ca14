"""The typed events of a response's stream, numbered in the order in which they are told."""

from __future__ import annotations

from typing import Any

import msgspec

from tidewright_gateway.openai.answers import event


class EventLog:
    """Those that are not written yet."""

    def __init__(self, response_id: str, *, is_streamed: bool) -> None:
        """`is_streamed`: false drops them, as a whole answer has none."""
        self.response_id = response_id
        self._is_streamed = is_streamed
        self._written: list[bytes] = []
        self._number = 0

    def tell(self, kind: str, **fields: Any) -> None:
        if self._is_streamed:
            data = {"type": kind, "sequence_number": self._number, **fields}
            self._written.append(event(msgspec.json.encode(data), kind.encode()))
            self._number += 1

    def taken(self) -> bytes:
        """All since the last call."""
        written, self._written = b"".join(self._written), []
        return written
