"""Where lines go: a file that may be rotated, or standard error. A line that can't be written is counted, not raised.

Each line is one write, so that lines of several processes with one file or pipe don't mix.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable
from logging.handlers import WatchedFileHandler
from typing import Any

from tidewright.logs.events import event

_lock = threading.Lock()
_dropped = 0
_listener: Callable[[int], None] | None = None


class LogFileError(Exception):
    """A log file can't be written; the message says which and why."""


def on_dropped(listener: Callable[[int], None]) -> None:
    """Call `listener` with the number of lines, now for those lost before and later for each."""
    global _listener
    with _lock:
        _listener = listener
        if _dropped:
            listener(_dropped)


def _count() -> None:
    global _dropped
    with _lock:
        _dropped += 1
        if _listener:
            _listener(1)


class LogHandler(WatchedFileHandler):
    """Writes lines to a file, which another program may move away, or to standard error or output.

    Made by `open_handler`.
    """

    def __init__(self, path: str, fd: int | None = None) -> None:
        """`fd`: instead of a file."""
        self._fd = fd
        self._missing = 0  # lines since it could be written
        self._is_cut = False  # the last line was written in part
        if fd is None:
            super().__init__(path, encoding="utf-8")
        else:
            logging.Handler.__init__(self)

    @property
    def is_terminal(self) -> bool:
        return self._fd is not None and os.isatty(self._fd)

    def _open(self) -> Any:
        """Without a buffer: after a write that failed, Python's would be written a second time."""
        return open(self.baseFilename, "ab", buffering=0)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
        except Exception:  # of ours; logging must not raise
            _count()
            return
        self.write_line(line)

    def write_line(self, line: str) -> None:
        """Also for lines that others have formatted."""
        data = f"{line}\n".encode(errors="backslashreplace")
        self.acquire()
        try:
            if self._fd is None:
                self.reopenIfNeeded()
            self._write(b"\n" + data if self._is_cut else data)
        except (OSError, ValueError) as error:
            self._lost(error)
        else:
            if self._missing:
                self._back()
        finally:
            self.release()

    def _write(self, data: bytes) -> None:
        fd = self._fd if self._fd is not None else self.stream.fileno()  # type: ignore[union-attr] # it is open
        while data:
            written = os.write(fd, data)
            self._is_cut = data[written - 1 : written] != b"\n"
            data = data[written:]

    def _lost(self, error: Exception) -> None:
        self._missing += 1
        _count()
        if self._missing == 1 and self._fd is None:
            reason = error.strerror if isinstance(error, OSError) else error
            where = self.baseFilename
            text = f"the log {where} can't be written ({reason}); its lines are dropped and counted until it can\n"
            with contextlib.suppress(OSError):  # nobody may be there to be told
                os.write(2, text.encode())

    def _back(self) -> None:
        missing, self._missing = self._missing, 0
        if not self.formatter:
            return
        message = "the log can be written again; %d lines are missing"
        record = logging.LogRecord("tidewright.logs", logging.WARNING, "", 0, message, (missing,), None)
        record.__dict__.update(event("log_lines_dropped", lines=missing))
        self.emit(record)

    def flush(self) -> None:
        """Nothing waits."""

    def close(self) -> None:
        if self._fd is None:
            super().close()
        else:
            logging.Handler.close(self)  # standard error stays


def open_handler(path: str, option: str = "log_file", fd: int = 2) -> LogHandler:
    """`path`: empty for the file descriptor `fd`. `option`: named in the error.

    Raises:
        LogFileError: the file can't be written.
    """
    if not path:
        return LogHandler("", fd)
    try:
        return LogHandler(path)
    except OSError as error:
        raise LogFileError(f"{option}: can't write {path}: {error.strerror}") from None
