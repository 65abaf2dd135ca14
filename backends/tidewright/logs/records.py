"""What a log record says, field by field, and how it is written: as JSON or as text.

Every value is bounded, and a record is one line: newlines inside values are escaped (in text, tracebacks are not).
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime, timezone
from typing import Any, Protocol

from pythonjsonlogger.msgspec import MsgspecFormatter

from tidewright.logs.events import INTERNAL_ERROR, NOTE

MAX_MESSAGE, MAX_EXCEPTION, MAX_VALUE = 4096, 16 * 1024, 512  # characters

FIELDS = {
    "time": "When, in UTC with milliseconds: `2026-01-31T12:00:00.123Z`.",
    "level": "`debug`, `info`, `warning`, `error` or `critical`.",
    "process": "`serve`, `gateway`, `tokenizer`, `failsafe`, `decoder`, `fallback`, `engine`, `spare_engine`, "
    "`fallback_engine`, `rank1` and so on, `worker`, or `triton` for tritonserver's own lines.",
    "pid": "Process id; of a tritonserver's line, the thread's.",
    "event": "A stable name, from the table below.",
    "message": "What happened, in words.",
    "source": "File and line of tritonserver's source (`triton` only).",
    "request_id": "The request: `X-Request-Id`. On a replica, with the number of the generation: `…-0`.",
    "trace_id": "Its trace, sampled or not.",
    "key_id": "The API key's id, once it is known to be valid; never the key.",
    "replica": "Address of a replica.",
    "exception": "The traceback.",
}
"""In the order of a record. Events may have fields of their own."""

_KEY = re.compile(r"\b(tw-[\w.-]{1,64}?-)[\w-]{43}(?![\w-])")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


class HasLogFields(Protocol):
    @property
    def log_fields(self) -> Mapping[str, Any]:
        """Of the request: request_id, trace_id, key_id."""


_request: ContextVar[HasLogFields | None] = ContextVar("tidewright_log_request", default=None)


@contextmanager
def about_request(request: HasLogFields) -> Iterator[None]:
    """Records of this task, and of tasks that it starts, are about this request."""
    token = _request.set(request)
    try:
        yield
    finally:
        _request.reset(token)


def timestamp(seconds: float) -> str:
    """`seconds`: since 1970."""
    return f"{datetime.fromtimestamp(seconds, timezone.utc):%Y-%m-%dT%H:%M:%S}.{int(seconds % 1 * 1000):03d}Z"


def shortened(text: str, longest: int = MAX_VALUE) -> str:
    """Head and tail, if it is longer."""
    if len(text) <= longest:
        return text
    half = (longest - 24) // 2
    return f"{text[:half]} …({len(text)} characters)… {text[-half:]}"


def bounded(text: str, longest: int = MAX_VALUE) -> str:
    """Shortened, and without the secrets of API keys."""
    if "tw-" in text:  # first somewhat longer than needed: a key that the cut goes through is not in the result
        text = _KEY.sub(r"\1***", shortened(text, 2 * longest + 512))
    return shortened(text, longest)


def fields_of(record: logging.LogRecord, process: str) -> dict[str, Any]:
    """All fields but `exception`."""
    name = getattr(record, "event", None) or (INTERNAL_ERROR if record.exc_info else NOTE)
    found: dict[str, Any] = {
        "time": timestamp(record.created),
        "level": record.levelname.lower(),
        "process": process,
        "pid": os.getpid(),
        "event": name,
        "message": bounded(record.getMessage(), MAX_MESSAGE),
    }
    if (request := _request.get()) is not None:
        found |= request.log_fields
    found |= getattr(record, "fields", {})
    return {name: value if name == "message" else _value(value) for name, value in found.items() if value is not None}


def _readable(record: logging.LogRecord) -> logging.LogRecord:
    """The record, or one like it if its arguments don't fit, a mistake in the call: the line is still worth having."""
    try:
        record.getMessage()
    except Exception as error:
        record = logging.makeLogRecord({**record.__dict__, "msg": f"{record.msg} ({error})", "args": None})
    return record


def _value(value: Any) -> Any:
    return value if isinstance(value, (bool, int, float)) else bounded(str(value))


class JsonFormatter(MsgspecFormatter):
    def __init__(self, process: str) -> None:
        super().__init__(rename_fields={"exc_info": "exception"})
        self.process = process

    def format(self, record: logging.LogRecord) -> str:
        return super().format(_readable(record))

    def add_fields(self, log_data: dict[str, Any], record: logging.LogRecord, message_dict: dict[str, Any]) -> None:
        log_data |= fields_of(record, self.process)
        if exception := message_dict.get("exc_info"):
            log_data["exception"] = bounded(exception, MAX_EXCEPTION)


_HEAD = ("time", "level", "process", "pid", "event", "message")
_COLOURS = {"warning": "\033[33m", "error": "\033[31m", "critical": "\033[31m"}


class TextFormatter(logging.Formatter):
    """Such as: 2026-01-31T12:00:00.123Z WARNING gateway[12] connection refused (replica=…)."""

    def __init__(self, process: str, coloured: bool = False) -> None:
        super().__init__()
        self.process, self._coloured = process, coloured

    def format(self, record: logging.LogRecord) -> str:
        record = _readable(record)
        fields = fields_of(record, self.process)
        more = " ".join(f"{name}={value}" for name, value in fields.items() if name not in _HEAD)
        line = f"{fields['time']} {record.levelname} {self.process}[{fields['pid']}] {fields['message']}"
        line = _CONTROL.sub(lambda match: repr(match[0])[1:-1], f"{line} ({more})" if more else line)
        if self._coloured and (colour := _COLOURS.get(fields["level"])):
            line = f"{colour}{line}\033[0m"
        if record.exc_info:
            line += f"\n{bounded(self.formatException(record.exc_info), MAX_EXCEPTION)}"
        return line
