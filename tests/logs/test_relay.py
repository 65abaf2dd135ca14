"""logs/relay.py: tritonserver's lines, our own and others, as records."""

from __future__ import annotations

import json
from datetime import datetime, timezone
from typing import Any

import pytest

from tidewright.logs.records import MAX_MESSAGE
from tidewright.logs.relay import structured

NOW = datetime(2027, 1, 1, 0, 0, 5, tzinfo=timezone.utc).timestamp()


def read(line: str) -> dict[str, Any]:
    made = structured(line, 7, lambda: NOW)
    assert "\n" not in made
    found: dict[str, Any] = json.loads(made)
    return found


@pytest.mark.parametrize(("letter", "level"), [("I", "info"), ("W", "warning"), ("E", "error"), ("F", "critical")])
@pytest.mark.parametrize("text", ["it failed", '"it failed"'])
def test_a_line_of_tritonserver_has_level_time_and_source(letter: str, level: str, text: str) -> None:
    assert read(f"{letter}0101 00:00:03.123456 4711 server.cc:273] {text}\n") == {
        "time": "2027-01-01T00:00:03.123Z",
        "level": level,
        "process": "triton",
        "pid": 4711,
        "event": "note",
        "message": "it failed",
        "source": "server.cc:273",
    }


@pytest.mark.parametrize(
    ("when", "time"),
    [
        ("1231 23:59:59.999999", "2026-12-31T23:59:59.999Z"),  # of the year before
        ("0229 00:00:00.000000", "2027-01-01T00:00:05.000Z"),  # neither year has one: now
        ("1399 00:00:00.000000", "2027-01-01T00:00:05.000Z"),
    ],
)
def test_its_year_is_the_one_that_fits(when: str, time: str) -> None:
    assert read(f"I{when} 1 a.cc:1] x")["time"] == time


def test_quotes_are_undone_where_they_are_json() -> None:
    assert read('E0101 00:00:00.1 1 a.cc:1] "said \\"no\\"\\nand left"')["message"] == 'said "no"\nand left'
    assert read('E0101 00:00:00.1 1 a.cc:1] "a" and "b"')["message"] == '"a" and "b"'


def test_our_own_lines_are_passed_on_as_they_are() -> None:
    line = '{"time":"2026-01-01T00:00:00.000Z","level":"info","message":"x"}'
    assert structured(line + "\n", 7) == line
    assert read('{"time": cut')["event"] == "output"


def test_lines_without_a_format_are_warnings_and_tables_are_not() -> None:
    found = read("terminate called after throwing an instance of 'x'\n")
    assert (found["level"], found["event"], found["pid"]) == ("warning", "output", 7)
    for line in ("| Model | Version |", "+----+", ""):
        assert read(line)["level"] == "info"


def test_they_are_bounded() -> None:
    assert len(read("x" * 60_000)["message"]) <= MAX_MESSAGE
