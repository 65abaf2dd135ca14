"""The generation of a response: its replies become items, in the order in which the model wrote them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec

from tidewright_gateway.openai.answers import Choice, Part
from tidewright_gateway.openai.logprobs import TokenEntries
from tidewright_gateway.openai.output import Reasoning, Text
from tidewright_gateway.openai.responses.events import EventLog
from tidewright_gateway.openai.responses.output import Output
from tidewright_gateway.replicas.triton import Reply


@dataclass
class ResponseChoice(Choice):
    output: Output = field(kw_only=True)
    entries: TokenEntries | None = field(kw_only=True)
    """None if no log-probabilities are asked for."""
    _pending: list[dict[str, Any]] = field(default_factory=list, init=False)
    """Log-probabilities of tokens that have added no text yet."""

    @classmethod
    def of(cls, made: Choice, log: EventLog, entries: TokenEntries | None) -> ResponseChoice:
        """`made`: by the dialect."""
        return cls(
            made.index,
            made.parser,
            made.make_id,
            made.max_calls,
            only_calls=made.only_calls,
            output=Output(log),
            entries=entries,
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
        entries = self.entries.of(part.positions) if self.entries else []
        self._pending += entries
        for step in part.steps if self.parser else (Text(part.text),):
            if isinstance(step, Text):
                if not step.text:
                    continue
                if self.output.begins_message:
                    self._pending = entries  # those before are of markers
                self.output.text(step.text, self._pending)
            elif isinstance(step, Reasoning):
                self.output.reasoning(step.text)
            elif step.is_new:
                self.output.call(step.call)
            else:
                self.output.arguments(step.arguments)
            self._pending = []

    def _in_tokens(self, reply: Reply) -> Iterator[Reply]:
        """With one token each, where it matters which of them are text: that must not depend on how they came."""
        if self.entries is None or self.parser is None or not reply.logprobs or len(reply.token_ids) < 2:
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
