"""Where spans go: an OTLP/HTTP collector, or a file."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Annotated, Protocol
from urllib.parse import unquote, urlsplit

from pydantic import AfterValidator

from tidewright.address import check_url
from tidewright.tracing.environment import read_environment

TRACES_PATH = "/v1/traces"
TRIES, FIRST_PAUSE = 3, 0.5  # of a batch, and seconds between the first two; then twice as many each
_TRY_AGAIN = (429, 502, 503, 504)


class ExportError(Exception):
    """A batch could not be handed over; the message has no password."""


class Endpoint(Protocol):
    is_file: bool
    """It takes JSON lines, else a protobuf request."""

    def send(self, batch: bytes) -> None:
        """Blocks. Raises ExportError."""

    def close(self) -> None: ...


def check_endpoint(text: str) -> str:
    """Raises ValueError: it is no address, or a variable for it has a value that is none. Returns it as it is."""
    if text:
        read_environment()
    if not text or re.fullmatch("file:(///|/(?!/)).+", text):
        return text
    try:
        check_url(text, "http", "https")
    except ValueError as error:
        raise ValueError(
            f"otlp_endpoint must be http://HOST:PORT, https://HOST:PORT or file:///PATH: {error}"
        ) from None
    return text


OtlpEndpoint = Annotated[str, AfterValidator(check_endpoint)]
"""Of an option."""


def traces_url(endpoint: str) -> str:
    """Of an OTLP/HTTP endpoint: OTLP's own path, where it has none."""
    return endpoint if urlsplit(endpoint).path.strip("/") else endpoint.rstrip("/") + TRACES_PATH


def open_endpoint(text: str) -> Endpoint:
    """Raises ValueError: it can't be used."""
    check_endpoint(text)
    return FileEndpoint(Path(unquote(urlsplit(text).path))) if text.startswith("file:") else HttpEndpoint(text)


class FileEndpoint:
    """Opened for each batch, so it may be moved away at any time. Several processes may share it."""

    is_file = True

    def __init__(self, path: Path) -> None:
        """Raises ValueError: it can't be written."""
        self._path = path
        try:
            open(path, "ab").close()  # nothing written: a disk that is full now may have room later
        except OSError as error:
            raise ValueError(f"otlp_endpoint: {error}") from None

    def send(self, batch: bytes) -> None:
        try:
            self._append(batch)
        except OSError as error:
            raise ExportError(str(error)) from None

    def _append(self, batch: bytes) -> None:
        with open(self._path, "ab", buffering=0) as file:
            written = file.write(batch) or 0
            if written < len(batch):
                raise OSError(f"only {written} of {len(batch)} bytes could be written to {self._path}")

    def close(self) -> None:
        pass


class HttpEndpoint:
    is_file = False

    def __init__(self, text: str) -> None:
        import httpx  # not for those who export nothing

        url = httpx.URL(traces_url(text))
        self._url, self._shown = url, str(url.copy_with(userinfo=b""))
        set_by = read_environment()
        headers, self._timeout = {**set_by.headers, "Content-Type": "application/x-protobuf"}, set_by.timeout
        try:
            verify = httpx.create_ssl_context(verify=set_by.certificate or True)
            self._client = httpx.Client(headers=headers, verify=verify, timeout=self._timeout)
        except (OSError, ValueError) as error:
            raise ValueError(f"otlp_endpoint: {error}") from None
        self._errors: tuple[type[Exception], ...] = (httpx.HTTPError, httpx.InvalidURL)

    def send(self, batch: bytes) -> None:
        until, pause = time.monotonic() + self._timeout, FIRST_PAUSE
        for tries_left in reversed(range(TRIES)):
            trouble, may_try = self._post(batch, max(until - time.monotonic(), 0.1))
            if not trouble:
                return
            if not may_try or not tries_left or time.monotonic() + pause >= until:
                raise ExportError(f"{self._shown}: {trouble}")
            time.sleep(pause)
            pause *= 2

    def _post(self, batch: bytes, timeout: float) -> tuple[str, bool]:
        """What went wrong, if anything did, and whether the same may go better."""
        try:
            answer = self._client.post(self._url, content=batch, timeout=timeout)
        except self._errors as error:
            return f"{type(error).__name__}: {error}", True
        if answer.is_success:
            return "", False
        return f"status {answer.status_code}", answer.status_code in _TRY_AGAIN

    def close(self) -> None:
        self._client.close()
