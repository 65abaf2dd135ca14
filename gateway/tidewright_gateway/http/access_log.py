"""The access log: a line of JSON for each request when it has ended. No key, prompt or answer stands in it."""

from __future__ import annotations

import logging
import sys
from datetime import datetime, timezone
from logging.handlers import WatchedFileHandler

import msgspec

from tidewright_gateway.context import RequestContext

_log = logging.getLogger("tidewright_gateway.access")
_log.propagate = False
_log.setLevel(logging.CRITICAL + 1)  # until `write_to`


def write_to(target: str) -> None:
    """`target`: a file, which may be moved away while we run; - for standard output; empty for nowhere.

    Raises:
        OSError: it can't be written.
    """
    if target:
        handler = logging.StreamHandler(sys.stdout) if target == "-" else WatchedFileHandler(target, encoding="utf-8")
        _log.addHandler(handler)
        _log.setLevel(logging.INFO)


def is_on() -> bool:
    return _log.isEnabledFor(logging.INFO)


def write(context: RequestContext, method: str, path: str, status: int, seconds: float) -> None:
    """When it has ended. `seconds`: since it arrived."""
    facts = {
        "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
        "request_id": context.request_id,
        "trace_id": context.trace.trace_id,
        "method": method,
        "path": path,
        "status": status,
        "seconds": round(seconds, 4),
        **context.facts,
    }
    _log.info(msgspec.json.encode(facts).decode())
