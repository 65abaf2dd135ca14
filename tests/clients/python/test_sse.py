"""The parser of server-sent events: any cut of the bytes gives the same events, and they are the standard's."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidewright_client import sse

LINES = st.one_of(
    st.builds(
        lambda name, colon, value: f"{name}{colon}{value}",
        st.sampled_from(["data", "event", "id", "", "dat", "data2", "\ufeffdata"]),
        st.sampled_from(["", ":", ": ", ":  "]),
        st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]), max_size=6),
    ),
    st.just(""),
)
STREAMS = st.builds(
    lambda bom, lines: (bom + "".join(line + end for line, end in lines)).encode(),
    st.sampled_from(["", "\ufeff"]),
    st.lists(st.tuples(LINES, st.sampled_from(["\n", "\r\n", "\r"])), max_size=12),
)


def by_the_standard(stream: bytes) -> list[str]:
    """As the standard words it, of the whole stream at once."""
    text = stream.decode(errors="replace").removeprefix("\ufeff")
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")[:-1]  # what is not ended is no line
    events: list[str] = []
    buffer = ""
    for line in lines:
        if line == "":
            if buffer:
                events.append(buffer.removesuffix("\n"))
            buffer = ""
        elif not line.startswith(":"):
            name, _, value = line.partition(":")
            if name == "data":
                buffer += value.removeprefix(" ") + "\n"
    return events


def parsed(stream: bytes, cuts: list[int]) -> list[str]:
    parser, places = sse.Parser(), [0, *sorted(cut % (len(stream) + 1) for cut in cuts), len(stream)]
    return [event for begin, end in itertools.pairwise(places) for event in parser.feed(stream[begin:end])]


@given(STREAMS, st.lists(st.integers(0, 10_000), max_size=20))
def test_any_cut_gives_the_events_of_the_standard(stream: bytes, cuts: list[int]) -> None:
    assert parsed(stream, cuts) == by_the_standard(stream)


@given(STREAMS)
def test_byte_by_byte_too(stream: bytes) -> None:
    assert parsed(stream, list(range(len(stream)))) == by_the_standard(stream)


@given(st.binary(max_size=60), st.lists(st.integers(0, 60), max_size=5))
def test_bytes_that_are_no_text_do_not_depend_on_cuts_either(stream: bytes, cuts: list[int]) -> None:
    assert parsed(stream, cuts) == parsed(stream, [])


@pytest.mark.parametrize(
    "chunk", [b"data: " + b"x" * 2**16, b"data: " + b"x" * 2**16 + b"\n", b"data\n" * 2**16, b"x" * 2**16]
)
def test_an_event_has_a_bound(monkeypatch: pytest.MonkeyPatch, chunk: bytes) -> None:
    monkeypatch.setattr(sse, "MAX_LINE", 2**18)
    parser = sse.Parser()
    with pytest.raises(sse.TooLongError):
        [parser.feed(chunk) for _ in range(6)]


def test_events_within_the_bound_have_none_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "MAX_LINE", 2**10)
    parser = sse.Parser()
    for _ in range(20):
        assert parser.feed(b"data: " + b"x" * 900 + b"\n\n") == ["x" * 900]
        assert parser.feed(b": " + b"x" * 900 + b"\n") == []
