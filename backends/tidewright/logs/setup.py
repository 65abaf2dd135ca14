"""Sets up logging of a process. Levels are those of our own loggers: libraries log warnings and errors only.

A library's debug lines hold prompts, tokens and headers (websockets shows whole frames), so they never appear.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import types
from typing import Literal, get_args

from tidewright.logs.events import event
from tidewright.logs.handlers import LogHandler, open_handler
from tidewright.logs.records import JsonFormatter, TextFormatter

LogFormat = Literal["text", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]

# From `tidewright serve` or `worker` to their child processes.
FORMAT_VARIABLE, LEVEL_VARIABLE = "TIDEWRIGHT_LOG_FORMAT", "TIDEWRIGHT_LOG_LEVEL"
_OURS = ("tidewright", "tidewright_gateway", "__main__")
log = logging.getLogger(__name__)


class _NotPerRequest(logging.Filter):
    """Without what uvicorn says of each bad request and refused WebSocket; the access log has a line for it."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith(("Invalid HTTP request", "ASGI callable returned without completing"))


def set_up(process: str, form: LogFormat = "text", level: LogLevel = "info", file: str = "") -> LogHandler:
    """Call it once; a second call replaces the first. `file`: empty for standard error.

    Raises:
        LogFileError: `file` can't be written.
    """
    handler = open_handler(file)
    handler.setFormatter(JsonFormatter(process) if form == "json" else TextFormatter(process, handler.is_terminal))
    root = logging.getLogger()
    for old in [old for old in root.handlers if isinstance(old, LogHandler)]:
        root.removeHandler(old)
        old.close()
    root.addHandler(handler)
    root.setLevel(logging.ERROR if level == "error" else logging.WARNING)
    for name in _OURS:
        logging.getLogger(name).setLevel(level.upper())
    uvicorn = logging.getLogger("uvicorn.error")
    if not any(isinstance(one, _NotPerRequest) for one in uvicorn.filters):
        uvicorn.addFilter(_NotPerRequest())
    if form == "json":  # what Python prints by itself has several lines
        logging.captureWarnings(True)
        sys.excepthook = _uncaught
        threading.excepthook = _uncaught_in_thread
    return handler


def set_up_child(process: str) -> None:
    """As the environment says: for processes that `serve` or `worker` starts, whose standard error they read."""
    form, level = os.environ.get(FORMAT_VARIABLE), os.environ.get(LEVEL_VARIABLE)
    set_up(
        process,
        form if form in get_args(LogFormat) else "text",  # type: ignore[arg-type]
        level if level in get_args(LogLevel) else "info",  # type: ignore[arg-type]
    )


def rename(process: str) -> None:
    """This process has another task by now."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler.formatter, (JsonFormatter, TextFormatter)):
            handler.formatter.process = process


def _uncaught(kind: type[BaseException], error: BaseException, trace: types.TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        return
    log.critical("this process ends: %s", error, exc_info=(kind, error, trace), extra=event("internal_error"))


def _uncaught_in_thread(args: threading.ExceptHookArgs) -> None:
    if args.exc_value is None or isinstance(args.exc_value, SystemExit):
        return
    name = args.thread.name if args.thread else "unknown"
    log.critical(
        "the thread %s ends: %s",
        name,
        args.exc_value,
        exc_info=(args.exc_type, args.exc_value, args.exc_traceback),
        extra=event("internal_error"),
    )
