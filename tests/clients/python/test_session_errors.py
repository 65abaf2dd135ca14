"""What users get wrong, by a session: each error says what to change, as the client's does. No real server."""

from __future__ import annotations

import json
import socket

import pytest

from helpers.listener import listener
from helpers.python_client import session_failures
from tidewright_client import (
    ConnectionFailed,
    Forbidden,
    NotFound,
    TidewrightError,
    TimedOut,
    Unauthenticated,
    Unavailable,
    UnexpectedAnswer,
)

HTTP2 = bytes.fromhex("00002404000000000000020000000000030000000000040040000000")


def answer(status: int, body: str, kind: str = "application/json") -> bytes:
    return f"HTTP/1.1 {status} X\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()


def error(**fields: str) -> str:
    return json.dumps({"error": {"type": "invalid_request_error", **fields}})


@pytest.mark.parametrize(
    ("said", "path", "kind", "words"),
    [
        (answer(404, "no page", "text/html"), "", NotFound, "the gateway's port (8080 by default)"),
        (answer(403, ""), "/v2", Forbidden, "without a path"),
        (answer(404, error(message="no", code="no_such_path")), "", NotFound, "without a path"),
        (answer(401, error(message="no key", code="k")), "", Unauthenticated, "give a key as key="),
        (answer(503, error(message="busy")), "", Unavailable, "busy"),
        (HTTP2, "", ConnectionFailed, "the gateway's port (8080 by default)"),
        (b"", "", ConnectionFailed, "broke before an answer"),
    ],
)
def test_what_answers_is_no_gateway_or_refuses(said: bytes, path: str, kind: type[TidewrightError], words: str) -> None:
    with listener(said) as address:
        for caught in session_failures(f"http://{address}{path}"):
            assert type(caught) is kind
            assert words in caught.message
            assert caught.partial is None


def test_nobody_listens() -> None:
    for caught in session_failures("http://127.0.0.1:1"):
        assert isinstance(caught, ConnectionFailed)
        assert "no server at http://127.0.0.1:1" in caught.message
        assert "check host and port" in caught.message
        assert "https://" not in caught.message


def test_a_host_that_there_is_not() -> None:
    for caught in session_failures("http://no-such-host.invalid"):
        assert isinstance(caught, ConnectionFailed)
        assert "check its name" in caught.message


def test_a_server_that_says_nothing() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        for caught in session_failures(f"http://127.0.0.1:{silent.getsockname()[1]}", timeout=0.5):
            assert isinstance(caught, TimedOut)
            assert "0.5 s" in caught.message
            assert caught.partial is None


def test_redirects_are_not_followed() -> None:
    with listener(answer(404, "elsewhere")) as elsewhere:
        head = f"HTTP/1.1 307 X\r\nLocation: ws://{elsewhere}/\r\nContent-Length: 0\r\n\r\n"
        with listener(head.encode()) as address:
            for caught in session_failures(f"http://{address}"):
                assert isinstance(caught, UnexpectedAnswer), caught
                assert f"redirects to {elsewhere}" in caught.message
