"""Text token by token behind a prompt, against the tokenizer's own decoding of prompt and output."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from helpers.byte_fallback import BOS, EOS, INVALID, VOCAB, byte_tokens, make_tokenizer, text_behind, token
from tidewright.bridge.text_stream import TextStream
from tidewright.detokenizer import MAX_HELD, Detokenizer
from tidewright.schema import SamplingParams
from tidewright.tokenization import Tokenizer

KINDS = ["llama", "gemma", "metaspace"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    found = {}
    for kind in KINDS:
        folder = tmp_path_factory.mktemp(kind)
        make_tokenizer(kind).save(str(folder / "tokenizer.json"))
        found[kind] = Tokenizer(folder)
    return found


def pieces(
    tokenizer: Tokenizer, prompt: Sequence[int], output: Sequence[int], skip_special_tokens: bool = True
) -> list[str]:
    stream = Detokenizer.behind(prompt, tokenizer, skip_special_tokens)
    return [*map(stream.push, output), stream.finish()]


@functools.cache
def sequences(first: int, last: int) -> st.SearchStrategy[list[int]]:
    """Words, letters, whole and broken characters in bytes, special tokens, and ids that no token has."""
    texts = st.text(st.sampled_from("a\n é中😀🇪"), min_size=1, max_size=3).map(byte_tokens)
    broken = st.binary(min_size=1, max_size=3).map(byte_tokens)
    one = st.one_of(
        st.integers(0, len(VOCAB) + 20), st.integers(260, len(VOCAB) - 1), st.sampled_from([token("▁"), BOS, EOS])
    )
    return st.lists(st.one_of(one.map(lambda token_id: [token_id]), texts, broken), min_size=first, max_size=last).map(
        lambda parts: [*itertools.chain(*parts)][: MAX_HELD - 4]
    )


BYTE_LEVEL = st.one_of(st.integers(0, 49151), st.integers(0, 16))  # the latter are special tokens
PROMPTS = ["a is", "the \n", "中 😀", "x\n\n", " ", "a 😀 P", "�", "é�"]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=400, deadline=None)
@given(prompt=st.sampled_from([None, *PROMPTS]), output=sequences(0, 12), skip=st.booleans())
@example(prompt=None, output=[*byte_tokens(" "), token("▁the")], skip=True)
@example(prompt=None, output=byte_tokens(b" \xff a"), skip=True)
@example(prompt="a is", output=[EOS, token("▁Paris"), 999, token("▁Paris")], skip=True)
@example(prompt="a is", output=[*byte_tokens("é")[:1], EOS, *byte_tokens("é"), BOS, token("▁is")], skip=False)
@example(prompt=None, output=[*byte_tokens("中"), token("▁is")], skip=True)
@example(prompt=None, output=[token("▁"), token("▁"), token("▁is")], skip=True)
def test_pieces_join_to_what_the_tokenizer_decodes_behind_the_prompt(
    made: dict[str, Tokenizer], kind: str, prompt: str | None, output: list[int], skip: bool
) -> None:
    tokenizer = made[kind]
    ids = [BOS] if prompt is None else tokenizer.encode(prompt)
    if ids[-1] in tokenizer.bytes:  # an invalid byte would change the prompt's text as well
        output = [token("▁is"), *output]
    assert "".join(pieces(tokenizer, ids, output, skip)) == text_behind(tokenizer, ids, output, skip)


@settings(max_examples=400, deadline=None)
@given(prompt=st.lists(BYTE_LEVEL, max_size=12), output=st.lists(BYTE_LEVEL, max_size=40), skip=st.booleans())
@example(prompt=[], output=[179, 179, 179], skip=True)
@example(prompt=[], output=[179, 2, 179, 0], skip=False)
def test_the_same_of_a_byte_level_tokenizer(
    tokenizer: Tokenizer, prompt: list[int], output: list[int], skip: bool
) -> None:
    joined = "".join(pieces(tokenizer, prompt, output, skip))
    before, text = tokenizer.decode(prompt, skip), tokenizer.decode(prompt + output, skip)
    if not text.startswith(before):  # the output goes on with a character of the prompt
        before = before.removesuffix(INVALID)
    assert joined == text.removeprefix(before)


@pytest.mark.parametrize("text", ["中文 é 😀 中", "a\nb\n\n c", "👩‍👩‍👧‍👦!", " \n ", "ok\n"])
@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_whole_characters_come_out_whole_however_they_are_spelt(
    made: dict[str, Tokenizer], kind: str, text: str
) -> None:
    for prompt in ("a", "a 😀"):
        for output in (byte_tokens(text), made[kind].backend.encode(f"a{text}", add_special_tokens=False).ids):
            got = pieces(made[kind], made[kind].encode(prompt), output)
            assert "".join(got).endswith(text)
            assert INVALID not in "".join(got)


@pytest.mark.parametrize("whole", [0, 1, 20])
@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_half_a_character_at_the_end_is_one_replacement(made: dict[str, Tokenizer], kind: str, whole: int) -> None:
    for cut in (1, 2):
        output = byte_tokens("中" * whole + "文")[:-cut]
        assert "".join(pieces(made[kind], made[kind].encode("a"), output)) == "中" * whole + INVALID


def test_a_long_run_of_bytes_is_streamed_and_its_text_stays(made: dict[str, Tokenizer]) -> None:
    """Of a script that the vocabulary lacks, whole sentences are one run."""
    stream = Detokenizer.behind(made["llama"].encode("a"), made["llama"])
    sent = 0
    for number, token_id in enumerate(byte_tokens("字" * 100), 1):
        sent += len(stream.push(token_id))
        assert 0 <= number // 3 - sent <= MAX_HELD // 3 + 1
    text = stream.push(byte_tokens(b"\xff")[0])
    assert set(text) == {INVALID}
    assert len(text) <= MAX_HELD + 1
    assert [stream.push(byte_tokens("x")[0]), stream.push(token("▁is"))] == [INVALID, " is"]


def test_the_output_goes_on_with_a_character_of_the_prompt(made: dict[str, Tokenizer], tokenizer: Tokenizer) -> None:
    first, *rest = byte_tokens("中")
    assert "".join(pieces(made["llama"], [BOS, token("a"), first], rest)) == "中"
    first, *rest = tokenizer.encode("👍")
    assert rest
    assert "".join(pieces(tokenizer, [first], rest)) == "👍"


@settings(max_examples=300, deadline=None)
@given(data=st.data(), output=sequences(1, 12), keeps=st.booleans())
@pytest.mark.parametrize("kind", KINDS)
def test_stop_strings_cut_the_text_at_their_first_appearance(
    made: dict[str, Tokenizer], kind: str, data: st.DataObject, output: list[int], keeps: bool
) -> None:
    """Against the text of each beginning of the output, decoded as a whole."""
    tokenizer, prompt = made[kind], made[kind].encode("a")
    output = [token("a"), *output] if kind == "metaspace" else output
    stops = st.text(st.sampled_from("a\n é中😀Pi"), min_size=1, max_size=3)
    stop = tuple(data.draw(st.lists(stops, min_size=1, max_size=3), "stop"))
    stream, text = TextStream(tokenizer, prompt, SamplingParams(stop=list(stop), include_stop_str_in_output=keeps)), ""
    for count, token_id in enumerate(output, 1):
        text += stream.push(token_id)
        so_far = text_behind(tokenizer, prompt, output[:count])
        found = [(so_far.index(string), len(string), string) for string in stop if string in so_far]
        assert stream.stopped_by == (min(found)[2] if found else None)
        if found:
            at, length, _ = min(found)
            assert text == so_far[: at + length * keeps]
            assert stream.push(token("a")) == stream.finish() == ""
            return
        assert so_far.startswith(text) or INVALID in so_far
    assert text + stream.finish() == text_behind(tokenizer, prompt, output)


def test_a_stop_string_of_bytes_ends_the_text_with_its_last_byte(made: dict[str, Tokenizer]) -> None:
    """A line feed is a byte token in Llama 2, and a common stop."""
    stream = TextStream(made["llama"], made["llama"].encode("a"), SamplingParams(stop="\n"))
    assert stream.push(token("▁is")) == " is"
    assert stream.push(byte_tokens("\n")[0]) == ""
    assert stream.stopped_by == "\n"


def test_bytes_before_min_tokens_are_not_searched_for_stop_strings(made: dict[str, Tokenizer]) -> None:
    output = byte_tokens("\né\nx")
    stream = TextStream(made["llama"], made["llama"].encode("a"), SamplingParams(stop="\n", min_tokens=3))
    text = "".join(stream.push(token_id) for token_id in output[:4])
    assert stream.stopped_by == "\n"
    assert text == "\né"


@pytest.mark.parametrize("kind", KINDS)
def test_the_text_of_a_token_has_its_leading_space(made: dict[str, Tokenizer], kind: str) -> None:
    texts = [made[kind].token_text(made[kind].backend.token_to_id(text)) for text in ("▁Paris", "Paris", "▁", "</s>")]
    assert texts == [" Paris", "Paris", " ", "</s>"]


def test_the_text_of_a_byte_level_token_is_what_it_decodes_to(tokenizer: Tokenizer) -> None:
    for token_id in range(0, 49152, 7):
        assert tokenizer.token_text(token_id) == tokenizer.decode([token_id], skip_special_tokens=False)


def test_tokens_that_only_look_like_bytes_are_text(tmp_path: Path) -> None:
    made = make_tokenizer("gemma")
    made.decoder = None  # type: ignore[assignment]
    made.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer(tmp_path).bytes == {}


def test_each_token_costs_the_same_however_many_there_are(
    made: dict[str, Tokenizer], tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted in tokens decoded, as invalid bytes without end could make it quadratic."""
    decode = Tokenizer.decode
    decoded: list[int] = []
    monkeypatch.setattr(
        Tokenizer, "decode", lambda self, ids, *rest: decoded.append(len(ids)) or decode(self, ids, *rest)
    )
    byte_level = tokenizer.encode("👍")[1]
    for of, token_id in ((made["llama"], byte_tokens(b"\x80")[0]), (tokenizer, byte_level)):
        costs = []
        for count in (200, 2000):
            decoded.clear()
            pieces(of, of.encode("a"), [token_id] * count)
            costs.append(sum(decoded) / count)
        assert max(costs) < 12
