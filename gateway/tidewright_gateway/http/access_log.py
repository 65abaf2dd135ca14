"""The access log: a line of JSON for each request when it has ended. No key, prompt or answer stands in it."""

from __future__ import annotations

import logging
import sys
from datetime import datetime, timezone
from logging.handlers import WatchedFileHandler
from typing import Any

import msgspec

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


def write(facts: dict[str, Any]) -> None:
    now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
    _log.info(msgspec.json.encode({"time": now, **facts}).decode())
