"""The variables of OpenTelemetry that have effect. A value that is none is refused at the start, as an option's is."""

from __future__ import annotations

import os
import re
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import unquote

HEADERS, TIMEOUT = "OTEL_EXPORTER_OTLP_HEADERS", "OTEL_EXPORTER_OTLP_TIMEOUT"
CERTIFICATE, RESOURCE = "OTEL_EXPORTER_OTLP_CERTIFICATE", "OTEL_RESOURCE_ATTRIBUTES"
EXPORT_TIMEOUT = 10.0  # seconds for one batch, tries included, unless TIMEOUT says otherwise
MAX_TIMEOUT = 600_000  # milliseconds
MAX_LENGTH = 16_384  # characters of a list
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # as RFC 9110 has it
_FIELD_VALUE = re.compile(r"[\x20-\x7e]*")


@dataclass(frozen=True)
class Environment:
    headers: Mapping[str, str]
    timeout: float
    """Seconds."""
    certificate: str
    """PEM file of the authorities; empty for those of the system."""
    resource: Mapping[str, str]
    """Attributes of this process that an operator has set."""


def read_environment() -> Environment:
    """Raises ValueError: names the variable, and shows no value of a header."""
    headers = _pairs(HEADERS, "Authorization=Bearer%20...")
    for name, value in headers.items():
        if not _TOKEN.fullmatch(name) or not _FIELD_VALUE.fullmatch(value):
            raise ValueError(f"{HEADERS}: the name or value of {name[:64]!r} can't be sent as an HTTP header")
    certificate = os.environ.get(CERTIFICATE, "").strip()
    if certificate:
        try:
            ssl.create_default_context(cafile=certificate)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{CERTIFICATE} is {certificate!r}, which is no PEM file of certificates: {error}"
            ) from None
    return Environment(headers, _seconds(), certificate, _pairs(RESOURCE, "deployment.environment.name=prod"))


def _seconds() -> float:
    text = os.environ.get(TIMEOUT, "").strip()
    if not text:
        return EXPORT_TIMEOUT
    if not re.fullmatch("[0-9]{1,9}", text, re.ASCII) or not 0 < int(text) <= MAX_TIMEOUT:
        raise ValueError(f"{TIMEOUT} is {text[:64]!r}, but must be milliseconds, from 1 to {MAX_TIMEOUT}")
    return int(text) / 1000


def _pairs(variable: str, example: str) -> dict[str, str]:
    """Of name=value,name=value, percent-encoded."""
    text = os.environ.get(variable, "")
    if len(text) > MAX_LENGTH:
        raise ValueError(f"{variable} has {len(text)} characters, more than {MAX_LENGTH}")
    found = {}
    for number, item in enumerate(text.split(","), 1):
        name, equals, value = (part.strip() for part in item.partition("="))
        if not item.strip():
            continue
        if not (name and equals):
            raise ValueError(
                f"{variable}: entry {number} is not name=value; a list is such as {example}, with commas between"
            )
        try:
            found[unquote(name, errors="strict")] = unquote(value, errors="strict")
        except UnicodeDecodeError:
            raise ValueError(f"{variable}: the value of {name[:64]!r} is not percent-encoded UTF-8") from None
    return found
