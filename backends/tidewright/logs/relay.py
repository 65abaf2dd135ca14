"""Lines of tritonserver and of all processes below it, which come to `serve` through one pipe.

Our own are passed on as they are; in JSON, tritonserver's get the same fields, and so do those without a format.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from typing import Any

import msgspec

from tidewright.logs.events import NOTE, OUTPUT
from tidewright.logs.records import MAX_MESSAGE, bounded, timestamp

MAX_LINE = 64 * 1024  # bytes; a longer line is cut into several

_TRITON = re.compile(r"([IWEF])(\d\d)(\d\d) (\d\d):(\d\d):(\d\d)\.(\d{1,6}) (\d+) ([^\]\s]{1,200})\] (.*)", re.DOTALL)
_OF_TABLES = ("+", "|", "")  # that tritonserver prints when it starts
_LEVELS = {"I": "info", "W": "warning", "E": "error", "F": "critical"}


def structured(line: str, pid: int, clock: Callable[[], float] = time.time) -> str:
    """The line as JSON. `pid`: of tritonserver."""
    line = line.rstrip("\r\n")
    if line.startswith('{"time":') and line.endswith("}"):  # of our own processes
        return line
    now, level, event = clock(), "warning", OUTPUT
    found: dict[str, Any] = {}
    if line[:1] in _OF_TABLES:
        level, event = "info", NOTE
    elif match := _TRITON.fullmatch(line):
        letter, *when, thread, source, text = match.groups()
        level, event, line = _LEVELS[letter], NOTE, _unquoted(text)
        now, pid, found = _time(when, now), int(thread), {"source": source}
    head = {"time": timestamp(now), "level": level, "process": "triton", "pid": pid, "event": event}
    message = bounded(line, MAX_MESSAGE)
    return msgspec.json.encode({**head, "message": message, **found}).decode()


def _time(when: list[str], now: float) -> float:
    """Of month to microseconds, in UTC. tritonserver leaves the year out."""
    month, day, hour, minute, second, fraction = map(int, [*when[:5], when[5].ljust(6, "0")])
    latest = datetime.fromtimestamp(now, timezone.utc) + timedelta(days=1)
    for year in (latest.year, latest.year - 1):
        try:
            found = datetime(year, month, day, hour, minute, second, fraction, timezone.utc)
        except ValueError:  # such as February 29th
            continue
        if found <= latest:
            return found.timestamp()
    return now


def _unquoted(text: str) -> str:
    """Newer versions quote what they say."""
    if text[:1] == text[-1:] == '"' and len(text) > 1:
        try:
            return str(json.loads(text))
        except ValueError:
            pass
    return text
