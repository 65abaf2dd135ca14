"""What is written of a stream, and when."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.answers import chat_answer, context_of
from tidewright.tokenization import Tokenizer
from tidewright_gateway.openai.answers import DONE
from tidewright_gateway.openai.rendering import Events
from tidewright_gateway.replicas.triton import Reply


@pytest.fixture(scope="module")
def tokenizer(model_dir: Path) -> Tokenizer:
    return Tokenizer(model_dir)


def written(tokenizer: Tokenizer, n: int, *replies: tuple[int, bool]) -> list[bytes]:
    """`replies`: index of the choice, and whether it ends."""
    context = context_of(n=n)
    answer = chat_answer(tokenizer, context, stream=True, stream_options={"include_usage": True})
    events, parts = Events(answer, n), []
    for index, ends in replies:
        reply = Reply("word", [1, 2], "length" if ends else None, None)
        context.take(index, reply)
        parts.append(events.take(index, reply))
    return parts


def test_what_is_there_together_is_written_together(tokenizer: Tokenizer) -> None:
    parts = written(tokenizer, 1, (0, False), (0, False), (0, True))
    assert [part.count(b"data: ") for part in parts] == [2, 1, 3]  # opening and piece; piece; piece, usage and end
    assert b'"role":"assistant"' in parts[0]
    assert b'"finish_reason":"length"' in parts[-1]
    assert parts[-1].endswith(DONE)


def test_a_choice_that_ends_early_is_not_held_back_for_the_others(tokenizer: Tokenizer) -> None:
    parts = written(tokenizer, 2, (0, False), (0, True), (1, False), (1, True))
    assert b'"index":0' in parts[0]
    assert b'"index":1' in parts[0]
    assert [part.count(b"data: ") for part in parts] == [3, 1, 1, 3]
