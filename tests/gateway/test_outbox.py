"""What waits for a client: whatever it grants, and wherever it comes back, it gets each token once and in order."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tidewright_gateway.openai.errors import ApiError
from tidewright_gateway.replicas.triton import Reply
from tidewright_gateway.websocket.outbox import MAX_JOINED, Outbox, Piece


def reply(text: str, *token_ids: int, end: str | None = None, logprobs: bool = False) -> Reply:
    positions = [{str(token_id): {"logprob": -token_id}} for token_id in token_ids]
    return Reply(text, list(token_ids), end, json.dumps(positions).encode() if logprobs else None)


class Reader:
    """A client of one choice, which loses what it was sent since `remember`."""

    def __init__(self) -> None:
        self.seq, self.text, self.token_ids, self.logprobs = 0, "", [], []
        self.remember()

    def take(self, piece: Piece) -> None:
        assert piece.seq > self.seq
        self.seq, self.text = piece.seq, self.text + piece.text
        self.token_ids = [*self.token_ids, *piece.token_ids]
        self.logprobs = [*self.logprobs, *map(bytes, piece.logprobs or [])]

    def remember(self) -> None:
        self._memory = dict(vars(self))

    def forget(self) -> None:
        vars(self).update(self._memory)


REPLIES = st.tuples(st.integers(0, 2), st.text(max_size=3), st.integers(0, 400))
STEPS = st.one_of(
    REPLIES, st.integers(1, 300), st.sampled_from(["take", "take", "remember", "drop", "drop without credit"])
)


@settings(max_examples=150, deadline=None)
@given(st.none() | st.integers(0, 20), st.lists(STEPS, max_size=40))
def test_each_token_comes_once_and_in_order_and_none_without_credit(credits: int | None, steps: list) -> None:
    outbox, readers = Outbox(credits, 3), [Reader(), Reader(), Reader()]
    written = [Reader(), Reader(), Reader()]
    left = credits

    def take() -> bool:
        nonlocal left
        if (piece := outbox.take()) is None:
            return False
        readers[piece.index].take(piece)
        assert len(piece.logprobs or []) == len(piece.token_ids) <= MAX_JOINED
        if left is not None:
            left -= len(piece.token_ids)
            assert left >= 0
        return True

    for step in steps:
        if isinstance(step, tuple):
            index, text, count = step
            token_ids = range(outbox.num_tokens, outbox.num_tokens + count)
            outbox.put(index, reply(text, *token_ids, logprobs=True))
            written[index].text += text
            written[index].token_ids += token_ids
        elif isinstance(step, int):
            outbox.grant(step)
            left = None if left is None else left + step
        elif step == "take":
            take()
        elif step == "remember":
            for reader in readers:
                reader.remember()
        else:
            for reader in readers:
                reader.forget()
            left = 0 if step == "drop without credit" else None
            outbox.rewind([reader.seq for reader in readers], left)
    while take():
        pass
    if left is not None:
        assert left == 0 or outbox.is_sent
        outbox.grant(100_000)
        left = 100_000
        while take():
            pass
    assert outbox.is_sent
    for reader, whole in zip(readers, written, strict=True):
        assert (reader.text, reader.token_ids) == (whole.text, whole.token_ids)
        assert [next(iter(json.loads(raw))) for raw in reader.logprobs] == list(map(str, whole.token_ids))
    assert outbox.num_tokens == sum(len(whole.token_ids) for whole in written)


def test_what_waits_is_joined_and_choices_take_turns() -> None:
    outbox = Outbox(0, 2)
    for number in range(300):
        outbox.put(0, reply(f"{number} ", number))
        outbox.put(1, reply("x", number))
    assert outbox.take() is None
    outbox.grant(10_000)
    pieces = [outbox.take() for _ in range(4)]
    assert [(piece.index, piece.seq) for piece in pieces if piece] == [(0, 256), (1, 256), (0, 300), (1, 300)]
    assert pieces[0]
    assert pieces[0].text == "".join(f"{number} " for number in range(256))
    assert outbox.take() is None


def test_text_of_several_tokens_comes_with_the_last() -> None:
    outbox = Outbox(1)
    outbox.put(0, reply("ab", 1, 2))
    assert outbox.take() == Piece(0, 1, "", [1], None)
    outbox.grant(1)
    assert outbox.take() == Piece(0, 2, "ab", [2], None)


def test_text_without_a_token_needs_no_credit_and_is_not_said_twice() -> None:
    outbox = Outbox(1)
    outbox.put(0, reply("a", 1))
    outbox.put(0, reply("held back", end="stop"))
    assert outbox.take() == Piece(0, 2, "aheld back", [1], None)
    outbox.rewind([1], 0)
    assert outbox.take() == Piece(0, 2, "held back", [], None)
    outbox.rewind([2], 0)
    assert outbox.take() is None
    assert outbox.ends == [(2, "stop")]


@pytest.mark.parametrize("received", [[2], [0, 1]])
def test_more_than_was_written_can_t_have_been_received(received: list[int]) -> None:
    outbox = Outbox(None)
    outbox.put(0, reply("a", 1))
    assert outbox.take()
    with pytest.raises(ApiError, match="has no seq"):
        outbox.rewind(received, None)
    assert outbox.take() is None
