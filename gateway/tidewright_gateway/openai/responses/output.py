"""The output of a response: items that grow with what the model writes, and the events that say so. No I/O.

Items follow each other as the model wrote them, one open at a time. Whole answers grow the same way, so a stream and a
whole answer can't differ.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from tidewright_gateway.openai.answers import Call
from tidewright_gateway.openai.responses.events import EventLog
from tidewright_gateway.openai.responses.items import output_id

Logprobs = Sequence[dict[str, Any]]


class OutputItem(ABC):
    """One that is open."""

    prefix = ""

    def __init__(self, index: int, log: EventLog) -> None:
        self.id = output_id(self.prefix, log.response_id, index)
        self._index, self._log = index, log

    @abstractmethod
    def shown(self, status: str) -> dict[str, Any]:
        """As the API has it."""

    def begin(self) -> None:
        self._log.tell("response.output_item.added", output_index=self._index, item=self.empty())

    @abstractmethod
    def empty(self) -> dict[str, Any]:
        """As it is at its beginning."""

    def end(self, status: str) -> None:
        self._log.tell("response.output_item.done", output_index=self._index, item=self.shown(status))

    @property
    def _place(self) -> dict[str, Any]:
        return {"item_id": self.id, "output_index": self._index}


class TextItem(OutputItem):
    """An item with one part, which is a text."""

    event = ""
    """Its kind of event, without `.delta`."""

    def __init__(self, index: int, log: EventLog) -> None:
        super().__init__(index, log)
        self._texts: list[str] = []

    def begin(self) -> None:
        super().begin()
        self._log.tell("response.content_part.added", **self._place, part=self._part(""))

    def add(self, text: str) -> None:
        self._texts.append(text)
        self._log.tell(f"{self.event}.delta", **self._place, delta=text)

    def end(self, status: str) -> None:
        text = "".join(self._texts)
        self._log.tell(f"{self.event}.done", **self._place, text=text, **self._extras())
        self._log.tell("response.content_part.done", **self._place, part=self._part(text))
        super().end(status)

    @property
    def _place(self) -> dict[str, Any]:
        return {**super()._place, "content_index": 0}

    @abstractmethod
    def _part(self, text: str) -> dict[str, Any]: ...

    def _extras(self) -> dict[str, Any]:
        """Fields of its last event."""
        return {}


class Message(TextItem):
    prefix, event = "msg", "response.output_text"

    def __init__(self, index: int, log: EventLog) -> None:
        super().__init__(index, log)
        self._logprobs: list[dict[str, Any]] = []

    def add(self, text: str, logprobs: Logprobs = ()) -> None:
        self._texts.append(text)
        self._logprobs += logprobs
        self._log.tell(f"{self.event}.delta", **self._place, delta=text, logprobs=logprobs)

    def take_logprobs(self, logprobs: Logprobs) -> None:
        """Those of tokens at the end that added no text."""
        self._logprobs += logprobs

    def empty(self) -> dict[str, Any]:
        return self._shown("in_progress", [])

    def shown(self, status: str) -> dict[str, Any]:
        return self._shown(status, [self._part("".join(self._texts))])

    def _shown(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "type": "message", "status": status, "role": "assistant", "content": content}

    def _part(self, text: str) -> dict[str, Any]:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": self._logprobs}

    def _extras(self) -> dict[str, Any]:
        return {"logprobs": self._logprobs}


class Reasoning(TextItem):
    prefix, event = "rs", "response.reasoning_text"

    def empty(self) -> dict[str, Any]:
        return self._shown("in_progress", [])

    def shown(self, status: str) -> dict[str, Any]:
        return self._shown(status, [self._part("".join(self._texts))])

    def _shown(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "type": "reasoning", "status": status, "summary": [], "content": content}

    def _part(self, text: str) -> dict[str, Any]:
        return {"type": "reasoning_text", "text": text}


class FunctionCall(OutputItem):
    prefix = "fc"

    def __init__(self, index: int, log: EventLog, call: Call) -> None:
        super().__init__(index, log)
        self._call = call

    def add(self, arguments: str) -> None:
        """`call` has grown by these."""
        self._log.tell("response.function_call_arguments.delta", **self._place, delta=arguments)

    def end(self, status: str) -> None:
        self._log.tell("response.function_call_arguments.done", **self._place, arguments=self._call.arguments)
        super().end(status)

    def empty(self) -> dict[str, Any]:
        return {**self.shown("in_progress"), "arguments": ""}

    def shown(self, status: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "type": "function_call",
            "status": status,
            "call_id": self._call.id,
            "name": self._call.name,
            "arguments": self._call.arguments,
        }


class Output:
    def __init__(self, log: EventLog) -> None:
        self._log = log
        self._ended: list[dict[str, Any]] = []
        self._open: Message | Reasoning | FunctionCall | None = None

    def text(self, text: str, logprobs: Logprobs = ()) -> None:
        if not isinstance(self._open, Message):
            self._begin(Message(len(self), self._log))
        assert isinstance(self._open, Message)
        self._open.add(text, logprobs)

    def reasoning(self, text: str) -> None:
        if not isinstance(self._open, Reasoning):
            self._begin(Reasoning(len(self), self._log))
        assert isinstance(self._open, Reasoning)
        self._open.add(text)

    def call(self, call: Call) -> None:
        """A new call, without arguments so far."""
        self._begin(FunctionCall(len(self), self._log, call))

    def arguments(self, text: str) -> None:
        """More of the last call, which has them already."""
        assert isinstance(self._open, FunctionCall)
        self._open.add(text)

    @property
    def begins_message(self) -> bool:
        """More text would be a message behind another item."""
        return len(self) > 0 and not isinstance(self._open, Message)

    def cut(self) -> None:
        """Nothing follows."""
        self._close("incomplete")

    def end(self, status: str, logprobs: Logprobs = ()) -> None:
        """An answer of nothing is an empty message.

        Args:
            status: of the item that is open.
            logprobs: of tokens at the end that added no text.
        """
        if not self._ended and self._open is None:
            self._begin(Message(0, self._log))
        if isinstance(self._open, Message):
            self._open.take_logprobs(logprobs)
        self._close(status)

    def items(self) -> list[dict[str, Any]]:
        """So far."""
        return self._ended if self._open is None else [*self._ended, self._open.shown("in_progress")]

    def __len__(self) -> int:
        return len(self._ended) + (self._open is not None)

    def _begin(self, item: Message | Reasoning | FunctionCall) -> None:
        self._close("completed")
        self._open = item
        item.begin()

    def _close(self, status: str) -> None:
        if self._open is not None:
            self._open.end(status)
            self._ended.append(self._open.shown(status))
            self._open = None
