"""What callers give, checked where it enters: each error names the argument or the field."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from tidewright_client.errors import InvalidRequest

MAX_SECONDS = 1e9
"""Of a timeout; the server's limit, too."""


def kind(name: str, value: object, wanted: type, said: str) -> None:
    """None passes. Raises TypeError."""
    if value is not None and not isinstance(value, wanted):
        raise TypeError(f"{name} must be {said}, not {type(value).__name__}")


def count(name: str, value: object, least: int) -> None:
    """Raises TypeError, ValueError."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be a whole number, not {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}")


def seconds(name: str, value: object, none: str = "None for no end") -> None:
    """`none`: what None means; None passes if it means something. Raises TypeError, ValueError."""
    if value is None and none:
        return
    hint = f"; {none}" if none else ""
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number of seconds, not {type(value).__name__}{hint}")
    if not 0 < value <= MAX_SECONDS:
        raise ValueError(f"{name} must be above 0 and at most {MAX_SECONDS:g} seconds, not {value}{hint}")


def timeout_of_call(value: object, none: str = "None for no end") -> None:
    """As `seconds`, of one call. Raises TypeError, InvalidRequest."""
    try:
        seconds("timeout", value, none)
    except ValueError as error:
        raise InvalidRequest(str(error), param="timeout") from None


def json_values(fields: Mapping[str, Any]) -> None:
    """JSON has them all.

    Raises:
        InvalidRequest: a float is no number, or a text no Unicode.
        TypeError: a value of another kind.
    """
    try:
        for name, value in fields.items():
            unicode("extra", "the name of a field", str(name))
            _json_value(name, name, value)
    except RecursionError:
        raise InvalidRequest("the request is nested too deeply, or holds itself") from None


def _json_value(field: str, path: str, value: Any) -> None:
    if isinstance(value, str):
        unicode(field, path, value)
    elif isinstance(value, int | None):
        return
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise InvalidRequest(f"{path} is {value}, which is no number that JSON has", param=field)
    elif isinstance(value, dict):
        for name, inner in value.items():
            unicode(field, path, str(name))
            _json_value(field, f"{path}.{name}", inner)
    elif isinstance(value, list | tuple):
        for position, inner in enumerate(value):
            _json_value(field, f"{path}[{position}]", inner)
    else:
        raise TypeError(f"{path} must be a value that JSON has, not {type(value).__name__}")


def unicode(field: str, path: str, text: str) -> None:
    """Raises InvalidRequest: it has half of a surrogate pair, as a cut of UTF-16 leaves it, which can't be sent."""
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"{path} is not valid Unicode: {error}", param=field) from None
