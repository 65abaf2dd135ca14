"""The generation of a response: its replies become items, in the order in which the model wrote them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec

from tidewright.tokenization import Tokenizer
from tidewright_gateway.openai.answers import Choice, Part
from tidewright_gateway.openai.output import CallArguments, CallBegin, Event, OutputParser, Reasoning, Text
from tidewright_gateway.openai.responses.events import EventLog
from tidewright_gateway.openai.responses.output import Output
from tidewright_gateway.replicas.triton import Reply


class _Listener(OutputParser):
    """Another parser, whose events are remembered: a Part does not say in what order they came."""

    def __init__(self, inner: OutputParser) -> None:
        self._inner = inner
        self.events: list[Event] = []

    def push(self, text: str) -> list[Event]:
        return self._hear(self._inner.push(text))

    def finish(self) -> list[Event]:
        return self._hear(self._inner.finish())

    def _hear(self, events: list[Event]) -> list[Event]:
        self.events += events
        return events


@dataclass
class ResponseChoice(Choice):
    output: Output = field(kw_only=True)
    tokenizer: Tokenizer = field(kw_only=True)
    num_logprobs: int | None = field(kw_only=True)
    _pending: list[dict[str, Any]] = field(default_factory=list, init=False)
    """Log-probabilities of tokens that have added no text yet."""

    @classmethod
    def of(cls, made: Choice, log: EventLog, tokenizer: Tokenizer, num_logprobs: int | None) -> ResponseChoice:
        """`made`: by the dialect."""
        parser = _Listener(made.parser) if made.parser else None
        return cls(
            made.index,
            parser,
            made.make_id,
            made.max_calls,
            output=Output(log),
            tokenizer=tokenizer,
            num_logprobs=num_logprobs,
        )

    def take(self, reply: Reply) -> Part:
        part = Part("", ())
        for one in self._in_tokens(reply):
            part = super().take(one)
            self._grow(part)
        if self.finish_reason:
            self.output.end("incomplete" if self.finish_reason == "length" else "completed", self._pending)
        return part

    def _grow(self, part: Part) -> None:
        if isinstance(self.parser, _Listener):
            events, self.parser.events = self.parser.events, []
        else:
            events = [Text(part.text)] if part.text else []
        entries = self._entries(part.positions)
        self._pending += entries
        for event in events:
            if isinstance(event, Text):
                if self.output.begins_message:
                    self._pending = entries  # those before are of markers
                self.output.text(event.text, self._pending)
            elif isinstance(event, Reasoning):
                self.output.reasoning(event.text)
            elif self.max_calls is None or event.index < self.max_calls:
                self._grow_call(event)
            self._pending = []

    def _grow_call(self, event: CallBegin | CallArguments) -> None:
        if isinstance(event, CallBegin):
            self.output.call(self.calls[event.index])
        else:
            self.output.arguments(event.text)

    def _in_tokens(self, reply: Reply) -> Iterator[Reply]:
        """With one token each, where it matters which of them are text: that must not depend on how they came."""
        if self.num_logprobs is None or self.parser is None or not reply.logprobs or len(reply.token_ids) < 2:
            yield reply
            return
        positions = msgspec.json.decode(reply.logprobs, type=list[dict[str, Any]])
        texts = [next(iter(position.values()))["decoded_token"] for position in positions]
        if "".join(texts) != reply.text or len(texts) != len(reply.token_ids):
            yield reply  # such as tokens that are parts of a character
            return
        last = len(texts) - 1
        for number, (text, token_id, position) in enumerate(zip(texts, reply.token_ids, positions, strict=True)):
            finish_reason = reply.finish_reason if number == last else None
            yield replace(
                reply,
                text=text,
                token_ids=[token_id],
                finish_reason=finish_reason,
                logprobs=msgspec.json.encode([position]),
            )

    def _entries(self, positions: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        if self.num_logprobs is None:
            return []
        found = []
        for position in positions:
            chosen = self._entry(*next(iter(position.items())))
            ranked = sorted(position.items(), key=lambda item: item[1]["rank"])[: self.num_logprobs]
            found.append({**chosen, "top_logprobs": [self._entry(*item) for item in ranked]})
        return found

    def _entry(self, token_id: str, entry: dict[str, Any]) -> dict[str, Any]:
        raw = self.tokenizer.token_bytes(int(token_id))
        return {"token": entry["decoded_token"], "logprob": entry["logprob"], "bytes": list(raw)}
