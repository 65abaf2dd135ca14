"""What one generation has written, and how much of it its client was sent. No I/O and no clock.

All of it stays until the generation is forgotten, so that a client that comes back gets the rest from wherever it was:
no more than the generation's own max_tokens. What waits is sent joined, however long it waited.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from tidewright_gateway.openai.errors import invalid
from tidewright_gateway.replicas.triton import Reply

MAX_JOINED = 256  # tokens in one message
_BYTES_OF_ENTRY = 150  # of Python's objects for one token, without its text

_positions = msgspec.json.Decoder(list[msgspec.Raw])


@dataclass(frozen=True)
class Piece:
    """The next part of a choice."""

    index: int
    seq: int
    """Entries of the choice to the end of this part. An entry is a token, or text that came without one."""
    text: str
    token_ids: list[int]
    logprobs: list[msgspec.Raw] | None


@dataclass
class _Choice:
    """Lists have an item for each entry, which never changes: numbers of entries mean the same to old connections."""

    texts: list[str] = field(default_factory=list)
    token_ids: list[int | None] = field(default_factory=list)
    logprobs: list[msgspec.Raw | None] = field(default_factory=list)
    sent: int = 0
    size: int = 0  # bytes
    unsent: int = 0
    num_tokens: int = 0
    finish_reason: str | None = None
    num_dropped: int = 0  # entries that are not kept any more

    @property
    def num_entries(self) -> int:
        return self.num_dropped + len(self.texts)


class Outbox:
    def __init__(self, credits: int | None, num_choices: int = 1) -> None:
        """`credits`: tokens that may be sent before more are granted; None for any number."""
        self.credits = credits
        self.size = self.unsent = 0
        """Bytes that it takes, about, and those of them that were not sent."""
        self._choices = [_Choice() for _ in range(num_choices)]
        self._turn = 0

    @property
    def num_tokens(self) -> int:
        return sum(choice.num_tokens for choice in self._choices)

    @property
    def is_sent(self) -> bool:
        return all(choice.sent == len(choice.texts) for choice in self._choices)

    @property
    def ends(self) -> list[tuple[int, str | None]]:
        """Of each choice the last seq and the finish_reason."""
        return [(choice.num_entries, choice.finish_reason) for choice in self._choices]

    def expect(self, num_choices: int) -> None:
        """So many there will be."""
        self._choices = [_Choice() for _ in range(num_choices)]

    def put(self, index: int, reply: Reply) -> None:
        choice = self._choices[index]
        choice.finish_reason = reply.finish_reason
        choice.num_tokens += len(reply.token_ids)
        tokens: list[int | None] = list(reply.token_ids)
        if not tokens and reply.text:
            tokens.append(None)
        if not tokens:
            return
        # Which token wrote what of the text is not known: it goes with the last.
        choice.texts += [""] * (len(tokens) - 1) + [reply.text]
        choice.token_ids += tokens
        positions = _positions.decode(reply.logprobs) if reply.logprobs else []
        choice.logprobs += positions + [None] * (len(tokens) - len(positions))
        size = len(tokens) * _BYTES_OF_ENTRY + len(reply.text) + len(reply.logprobs or b"")
        choice.size += size
        choice.unsent += size
        self.size += size
        self.unsent += size

    def drop(self) -> None:
        """Its output is not kept: nothing more of it can be sent."""
        for choice in self._choices:
            choice.num_dropped = choice.num_entries
            choice.texts, choice.token_ids, choice.logprobs = [], [], []
            choice.sent = choice.size = choice.unsent = 0
        self.size = self.unsent = 0

    def grant(self, tokens: int) -> None:
        if self.credits is not None:
            self.credits += tokens

    def take(self) -> Piece | None:
        """What is to be sent next; None if there is nothing, or no credit for it."""
        limit = MAX_JOINED if self.credits is None else min(self.credits, MAX_JOINED)
        for step in range(len(self._choices)):
            index = (self._turn + step) % len(self._choices)
            if piece := self._take(index, limit):
                self._turn = index + 1
                return piece
        return None

    def _take(self, index: int, limit: int) -> Piece | None:
        choice = self._choices[index]
        begin, end = choice.sent, choice.sent
        token_ids: list[int] = []
        while end < len(choice.texts):
            token_id = choice.token_ids[end]
            if token_id is not None:
                if len(token_ids) == limit:
                    break
                token_ids.append(token_id)
            end += 1
        if end == begin:
            return None
        choice.sent = end
        # By its share of the entries that were not sent: each one's own size is not kept.
        size = choice.unsent * (end - begin) // (len(choice.texts) - begin)
        choice.unsent -= size
        self.unsent -= size
        if self.credits is not None:
            self.credits -= len(token_ids)
        logprobs = [position for position in choice.logprobs[begin:end] if position is not None]
        return Piece(index, end, "".join(choice.texts[begin:end]), token_ids, logprobs or None)

    def rewind(self, received: Sequence[int], credits: int | None) -> None:
        """Sends from there again. `received`: the last seq of each choice; those that are not named got nothing.

        Raises:
            ApiError: that much has not been written.
        """
        ends = self.ends
        for index, seq in enumerate(received):
            written = ends[index][0] if index < len(ends) else 0
            if seq > written:
                raise invalid(f"choice {index} has no seq {seq}; its last is {written}", "received")
        for index, choice in enumerate(self._choices):
            choice.sent = received[index] if index < len(received) else 0
            choice.unsent = choice.size * (len(choice.texts) - choice.sent) // max(len(choice.texts), 1)
        self.unsent = sum(choice.unsent for choice in self._choices)
        self.credits = credits
