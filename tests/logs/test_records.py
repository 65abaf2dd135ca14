"""logs/records.py: what a line says, that it is one line, and that no value makes it long or forges another."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from typing import Any

import pytest

from tidewright.logs import FIELDS, about_request, event
from tidewright.logs.records import MAX_EXCEPTION, MAX_MESSAGE, MAX_VALUE, JsonFormatter, TextFormatter, timestamp
from tidewright_gateway.auth.keys import make_key

NASTY = 'quote " back\\slash \r\n\t\x00\x1b[31m \u2028 ü …'


def record(message: str, *args: Any, level: int = logging.INFO, **more: Any) -> logging.LogRecord:
    made = logging.LogRecord("tidewright.x", level, "x.py", 1, message, args, more.pop("exc_info", None))
    made.__dict__.update(more.pop("extra", {}))
    return made


def as_json(made: logging.LogRecord) -> dict[str, Any]:
    line = JsonFormatter("gateway").format(made)
    assert not re.search(r"[\x00-\x1f]", line)
    found: dict[str, Any] = json.loads(line)
    return found


def as_text(made: logging.LogRecord) -> str:
    return TextFormatter("gateway").format(made)


class Request:
    log_fields: Mapping[str, Any] = {"request_id": "r1", "trace_id": "t1", "key_id": "k1"}


def raised() -> Any:
    try:
        raise ValueError(NASTY)
    except ValueError as error:
        return type(error), error, error.__traceback__


def test_a_record_has_the_documented_fields_in_order() -> None:
    made = record("%s is up", "it", extra=event("replica_up", replica="10.0.0.1:8001"))
    with about_request(Request()):
        found = as_json(made)
    assert found == {
        "time": timestamp(made.created),
        "level": "info",
        "process": "gateway",
        "pid": os.getpid(),
        "event": "replica_up",
        "message": "it is up",
        "request_id": "r1",
        "trace_id": "t1",
        "key_id": "k1",
        "replica": "10.0.0.1:8001",
    }
    assert [name for name in FIELDS if name in found] == list(found)
    assert "request_id" not in as_json(record("later"))


def test_time_is_utc_with_milliseconds() -> None:
    moment = datetime(2026, 3, 1, 23, 59, 59, 987_654, timezone.utc)
    assert timestamp(moment.timestamp()) == "2026-03-01T23:59:59.987Z"
    assert timestamp(1.0) == "1970-01-01T00:00:01.000Z"


def test_without_a_name_it_is_a_note_and_with_an_exception_an_internal_error() -> None:
    assert as_json(record("x"))["event"] == "note"
    found = as_json(record("x", exc_info=raised()))
    assert found["event"] == "internal_error"
    assert found["exception"].startswith("Traceback")
    assert "ValueError: quote" in found["exception"]


def test_values_can_neither_break_the_line_nor_forge_another() -> None:
    made = record("%s", NASTY, extra=event("note", replica=NASTY))
    found = as_json(made)
    assert (found["message"], found["replica"]) == (NASTY, NASTY)
    line = as_text(made)
    assert re.fullmatch(r"[^\x00-\x1f\u2028]+", line)
    assert "\\r\\n" in line


@pytest.mark.parametrize("form", [as_json, as_text])
def test_a_line_is_bounded(form: Callable[[logging.LogRecord], Any]) -> None:
    huge = "x" * 1_000_000
    try:
        raise ValueError(huge)
    except ValueError as error:
        trouble = type(error), error, error.__traceback__
    made = record("%s", huge, extra=event("note", replica=huge), exc_info=trouble)
    assert len(str(form(made))) < MAX_MESSAGE + MAX_EXCEPTION + MAX_VALUE + 1000
    assert "(1000000 characters)" in str(form(made))


@pytest.mark.parametrize("form", [as_json, as_text])
@pytest.mark.parametrize("padding", [0, 200, MAX_MESSAGE, 50_000])
def test_a_key_is_never_written(form: Callable[[logging.LogRecord], Any], padding: int) -> None:
    key, _ = make_key("my-key_1.x")
    secret = key[-43:]
    pad = "/" * padding
    try:
        raise ValueError(f"{pad}{key}")
    except ValueError as error:
        trouble = type(error), error, error.__traceback__
    made = record("%s%s%s", pad, key, pad, extra=event("note", path=f"{pad}{key}{pad}"), exc_info=trouble)
    written = str(form(made))
    assert not any(secret[start : start + 8] in written for start in range(len(secret) - 7))
    if not padding:
        assert "tw-my-key_1.x-***" in written


def test_a_mistake_in_the_call_loses_no_line() -> None:
    assert "%d tokens" in as_json(record("%d tokens", "many"))["message"]


def test_text_says_the_same_in_one_line() -> None:
    made = record("gone", level=logging.WARNING, extra=event("replica_down", replica="a:1"))
    want = f"{timestamp(made.created)} WARNING gateway[{os.getpid()}] gone (replica=a:1)"
    assert as_text(made) == want
    assert TextFormatter("gateway", coloured=True).format(made) == f"\033[33m{want}\033[0m"
