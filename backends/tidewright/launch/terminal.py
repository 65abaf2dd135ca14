"""What the long-running commands say to people: on the terminal, in the log, or in both.

Standard error belongs to people unless the log goes there as JSON; then every line of it is a log record.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
from typing import IO, Any, cast

from rich.console import Console
from rich.markup import escape

from tidewright import logs
from tidewright.launch.errors import LaunchError

log = logging.getLogger(__name__)

_WIDTH = 10_000  # characters; a record is not wrapped


class Terminal:
    def __init__(self, process: str, form: logs.LogFormat, level: logs.LogLevel, file: str = "") -> None:
        """Sets up logging of this process. Raises LaunchError: the file can't be written."""
        try:
            self.handler = logs.set_up(process, form, level, file)
        except logs.LogFileError as error:
            raise LaunchError(str(error)) from None
        self._is_for_people = form == "text" or bool(file)
        self._logs_too = bool(file) or form == "json"
        self.console = (
            Console(stderr=True) if self._is_for_people else Console(file=cast("IO[str]", _LogLines()), width=_WIDTH)
        )

    def say(self, text: str, event: str, *, markup: str = "", **fields: Any) -> None:
        """`markup`: the same for the terminal, in rich's format."""
        self._log(logging.INFO, text, event, fields)
        if self._is_for_people:
            self.console.print(markup or escape(text), highlight=False, soft_wrap=True)

    def warn(self, text: str, event: str) -> None:
        """Text logs go to the terminal anyway."""
        log.warning("%s", text, extra=logs.event(event))

    def fail(self, text: str, event: str, markup: str = "") -> None:
        self._log(logging.ERROR, text, event, {})
        if self._is_for_people:
            self.console.print(markup or f"[red]Error:[/] {escape(text)}", highlight=False, soft_wrap=True)

    def _log(self, level: int, text: str, event: str, fields: dict[str, Any]) -> None:
        if self._logs_too:
            log.log(level, "%s", text.strip(), extra=logs.event(event, **fields))


def output_console(width: int) -> Console:
    """Standard output, for tables. `width`: where it is no terminal, and COLUMNS says nothing."""
    console = Console()
    return console if console.is_terminal or "COLUMNS" in os.environ else Console(width=width)


class _LogLines(io.TextIOBase):
    """A file whose lines become log records."""

    _begun = ""

    def write(self, text: str) -> int:
        *lines, self._begun = (self._begun + text).split("\n")
        for line in lines:
            if line.strip():
                with contextlib.suppress(Exception):
                    log.info("%s", line.strip())
        return len(text)
