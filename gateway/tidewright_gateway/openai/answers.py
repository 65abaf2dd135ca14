"""What answers of all formats have in common: choices that grow with each reply, and usage. No I/O.

A piece of a stream costs microseconds, as there are many.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgspec

from tidewright_gateway.context import RequestContext
from tidewright_gateway.openai.errors import ApiError
from tidewright_gateway.openai.messages import is_json_object
from tidewright_gateway.openai.output import CallArguments, CallBegin, OutputParser, Reasoning, Text
from tidewright_gateway.replicas.triton import Reply

_PUBLIC_REASONS = ("stop", "length")


@dataclass
class Call:
    """A call of a tool."""

    index: int
    id: str
    name: str
    arguments: str = ""
    """JSON, as the model wrote it."""


class CallDelta(NamedTuple):
    """What a piece adds to a call."""

    call: Call
    is_new: bool
    arguments: str


Step = Text | Reasoning | CallDelta


class Part(NamedTuple):
    """What one reply adds to a choice."""

    text: str
    token_ids: Sequence[int]
    positions: Sequence[dict[str, Any]] = ()
    """Log-probabilities: `{id: {logprob, rank, decoded_token}}` for each token."""
    reasoning: str = ""
    calls: Sequence[CallDelta] = ()
    steps: Sequence[Step] = ()
    """Text, reasoning and calls in the order of the answer; empty if the choice has no parser."""

    @property
    def is_empty(self) -> bool:
        return not (self.text or self.reasoning or self.calls)


@dataclass
class Choice:
    """One generation's output so far."""

    index: int
    parser: OutputParser | None = None
    """None if all is text."""
    make_id: Callable[[], str] = str
    """Of calls."""
    max_calls: int | None = None
    keeps_tokens: bool = False
    """A whole answer may tell their ids and log-probabilities; a stream has told them already."""
    keeps_steps: bool = False
    only_calls: bool = False
    """It has no text: what would be some is a call that was cut before it began."""
    text: str = ""
    reasoning: str = ""
    calls: list[Call] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    num_reasoning_tokens: int = 0
    finish_reason: str | None = None
    """One of OpenAI's."""
    ended_by: str | None = None
    """What ended it early, where OpenAI has no word for it, such as a timeout."""
    stop_reason: str | int | None = None
    """The stop text or the token id that ended it."""
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    prompt_logprobs: list[dict[str, Any] | None] | None = None
    """The same for the prompt's tokens, of which the first has none; None if they were not asked for."""
    steps: list[Step] = field(default_factory=list)
    """Of all parts, where they are kept."""
    served_by: str = "decoder"

    def take(self, reply: Reply) -> Part:
        """Adds a reply; returns what it adds."""
        positions: list[dict[str, Any]] = msgspec.json.decode(reply.logprobs) if reply.logprobs else []
        if self.keeps_tokens:
            self.token_ids += reply.token_ids
            self.logprobs += positions
        self.served_by = reply.served_by
        if self.parser is None:
            self.text += reply.text
            part = Part(reply.text, reply.token_ids, positions)
        else:
            part = self._parse(self.parser, reply, positions)
        if reply.prompt_logprobs:
            self.prompt_logprobs = msgspec.json.decode(reply.prompt_logprobs)
        if reply.finish_reason:
            self.stop_reason = reply.stop_reason
            self._end(reply.finish_reason)
        return part

    def _parse(self, parser: OutputParser, reply: Reply, positions: Sequence[dict[str, Any]]) -> Part:
        events = parser.push(reply.text)
        if reply.finish_reason:
            events += parser.finish()
        text = reasoning = ""
        steps: list[Step] = []
        for event in events:
            if isinstance(event, Text):
                if self.only_calls:
                    continue
                text += event.text
                steps.append(event)
            elif isinstance(event, Reasoning):
                reasoning += event.text
                steps.append(event)
            elif self.max_calls is None or event.index < self.max_calls:
                steps.append(self._call(event))
        if self.keeps_steps:
            self.steps += steps
        self.text += text
        self.reasoning += reasoning
        if reasoning and not text:
            self.num_reasoning_tokens += len(reply.token_ids)
        calls = [step for step in steps if isinstance(step, CallDelta)]
        return Part(text, reply.token_ids, positions, reasoning, calls, steps)

    def _call(self, event: CallBegin | CallArguments) -> CallDelta:
        if isinstance(event, CallBegin):
            self.calls.append(Call(event.index, self.make_id(), event.name))
            return CallDelta(self.calls[-1], True, "")
        call = self.calls[event.index]
        call.arguments += event.text
        return CallDelta(call, False, event.text)

    def _end(self, reason: str) -> None:
        reason, self.ended_by = public_reason(reason)
        if reason == "stop" and self.calls and not (isinstance(self.stop_reason, str) and self._is_cut):
            reason = "tool_calls"
        self.finish_reason = reason

    @property
    def _is_cut(self) -> bool:
        """Its last call is not whole."""
        return not is_json_object(self.calls[-1].arguments)


def public_reason(reason: str) -> tuple[str, str | None]:
    """A model's finish_reason in OpenAI's words, and `ended_by`: the reason itself where OpenAI has no word for it."""
    return (reason, None) if reason in _PUBLIC_REASONS else ("length", reason)


class Answer(ABC):
    """The answer to one request, whole or as the events of a stream."""

    def __init__(self, context: RequestContext) -> None:
        self._context = context

    @abstractmethod
    def choice(self, index: int, *, is_streamed: bool) -> Choice:
        """An empty choice."""

    @abstractmethod
    def whole(self, choices: Sequence[Choice]) -> bytes:
        """Once all have ended."""

    def opening(self, choices: Sequence[Choice]) -> bytes:
        """What a stream begins with, if anything."""
        return b""

    @abstractmethod
    def piece(self, choice: Choice, part: Part) -> bytes:
        """For what was added to a choice."""

    @abstractmethod
    def closing(self, choices: Sequence[Choice]) -> bytes:
        """What a stream ends with."""

    async def settle(self) -> None:
        """What is to be done before its end is sent. Raises nothing."""
        return

    def failure(self, error: ApiError) -> bytes:
        """What a stream ends with that fails."""
        return event(error.body)


def event(data: bytes, name: bytes = b"") -> bytes:
    """One server-sent event."""
    return b"event: " + name + b"\ndata: " + data + b"\n\n" if name else b"data: " + data + b"\n\n"


DONE = event(b"[DONE]")
