"""Incremental detokenization against the tokenizer's own decoding of the whole."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tidewright.bridge.text_stream import TextStream
from tidewright.schema import SamplingParams
from tidewright.tokenization import Tokenizer

TEXTS = [
    "The quick brown fox.",
    "日本語のテキスト、中文字符，한국어",
    "👩‍👩‍👧‍👦 family 🏳️‍🌈 flags 👍🏽",
    "שלום עולם مرحبا بالعالم",
    "def f(x):\n\treturn x ** 2\n",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 and é and a\u0301",
]


def run(tokenizer: Tokenizer, token_ids: list[int], stop: tuple[str, ...] = (), **sampling: Any) -> list[str]:
    stream = TextStream(tokenizer, [], SamplingParams(stop=list(stop), **sampling))
    pieces = []
    for token_id in token_ids:
        pieces.append(stream.push(token_id))
        if stream.stopped_by is not None:
            return pieces
    pieces.append(stream.finish())
    return pieces


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_text_and_hold_whole_characters(tokenizer: Tokenizer, text: str) -> None:
    pieces = run(tokenizer, tokenizer.encode(text))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


@settings(max_examples=300, deadline=None)
@given(token_ids=st.lists(st.integers(0, 49151), max_size=60))
def test_any_tokens_join_to_what_the_tokenizer_decodes(tokenizer: Tokenizer, token_ids: list[int]) -> None:
    assert "".join(run(tokenizer, token_ids)) == tokenizer.decode(token_ids, skip_special_tokens=True)


def test_a_character_cut_off_at_the_end_appears_once_it_is_over(tokenizer: Tokenizer) -> None:
    token_ids = tokenizer.encode("ok 👍🏽")[:-1]
    pieces = run(tokenizer, token_ids)
    assert "".join(pieces) == tokenizer.decode(token_ids, skip_special_tokens=True)
    assert not any("\ufffd" in piece for piece in pieces[:-1])


@settings(max_examples=300, deadline=None)
@given(data=st.data(), text=st.text(st.sampled_from("ab👍\n "), min_size=1, max_size=40))
def test_stop_strings_end_the_text_at_their_first_appearance(
    tokenizer: Tokenizer, data: st.DataObject, text: str
) -> None:
    stop = tuple(
        data.draw(st.lists(st.text(st.sampled_from("ab👍\n "), min_size=1, max_size=4), min_size=1, max_size=3))
    )
    streamed = "".join(run(tokenizer, tokenizer.encode(text), stop))
    assert not any(string in streamed for string in stop)
    assert text.startswith(streamed)
    if not any(string in text for string in stop):
        assert streamed == text


def test_nothing_of_a_stop_string_leaks_across_tokens(tokenizer: Tokenizer) -> None:
    token_ids = [token for character in "Hello END. more" for token in tokenizer.encode(character)]
    pieces = run(tokenizer, token_ids, stop=("END.",))
    assert "".join(pieces) == "Hello "


def test_a_stop_string_is_part_of_the_text_where_asked_for_and_what_follows_it_is_not(tokenizer: Tokenizer) -> None:
    for text in ("Hello END. more", "Hello END."):
        for token_ids in (tokenizer.encode(text), [id_ for character in text for id_ in tokenizer.encode(character)]):
            pieces = run(tokenizer, token_ids, ("nowhere", "D.", "END"), include_stop_str_in_output=True)
            assert "".join(pieces) == "Hello END"


def test_of_stop_strings_that_begin_together_the_shortest_ends_the_text(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, [], SamplingParams(stop=["ello", "ell"], include_stop_str_in_output=True))
    (token_id,) = tokenizer.encode("Hello")
    assert (stream.push(token_id), stream.stopped_by) == ("Hell", "ell")


def test_a_stop_string_may_be_that_of_a_special_token(tokenizer: Tokenizer) -> None:
    token_ids = tokenizer.encode("a<|im_end|>b")
    assert "".join(run(tokenizer, token_ids)) == "ab"
    assert "".join(run(tokenizer, token_ids, skip_special_tokens=False)) == "a<|im_end|>b"
    assert "".join(run(tokenizer, token_ids, ("|im_end",), skip_special_tokens=False)) == "a<"


def test_what_only_looked_like_a_stop_string_comes_out(tokenizer: Tokenizer) -> None:
    token_ids = [token for character in "an EN route" for token in tokenizer.encode(character)]
    assert "".join(run(tokenizer, token_ids, stop=("END",))) == "an EN route"
    assert "".join(run(tokenizer, tokenizer.encode("the EN"), stop=("END",))) == "the EN"


def test_stop_strings_count_only_after_min_tokens(tokenizer: Tokenizer) -> None:
    token_ids = [token for character in "x.y.z" for token in tokenizer.encode(character)]
    assert "".join(run(tokenizer, token_ids, stop=(".",), min_tokens=3)) == "x.y"
