"""Logging of every process: `set_up` once at its start, `event` on the lines that have a name.

Not for the access log of the gateway (`tidewright_gateway.http.access_log`), which shares the fields and the files.
"""

from tidewright.logs.events import EVENTS, event
from tidewright.logs.handlers import LogFileError, LogHandler, on_dropped, open_handler
from tidewright.logs.records import FIELDS, JsonFormatter, about_request, bounded, timestamp
from tidewright.logs.setup import FORMAT_VARIABLE, LEVEL_VARIABLE, LogFormat, LogLevel, rename, set_up, set_up_child

__all__ = [
    "EVENTS",
    "FIELDS",
    "FORMAT_VARIABLE",
    "LEVEL_VARIABLE",
    "JsonFormatter",
    "LogFileError",
    "LogFormat",
    "LogHandler",
    "LogLevel",
    "about_request",
    "bounded",
    "event",
    "on_dropped",
    "open_handler",
    "rename",
    "set_up",
    "set_up_child",
    "timestamp",
]
