"""What users get wrong, with real servers: each error says what to change, and never shows the key."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gateway.test_keys_command import write_certificate
from helpers.gateway import MODEL, RunningGateway
from helpers.keyed_gateway import Keyed
from helpers.python_client import session_failures
from helpers.triton import RunningServer
from tidewright_client import (
    AsyncClient,
    Client,
    ConnectionFailed,
    InvalidRequest,
    NotFound,
    TidewrightError,
    TimedOut,
    Unauthenticated,
    UnexpectedAnswer,
)

CHAT = [{"role": "user", "content": "Hi"}]
KEY = "tw-me-secret"


def failure(url: str, **options: Any) -> TidewrightError:
    """Of each kind of call, sync and async: all have the same."""
    options = {"model": MODEL, "max_retries": 0, "key": KEY, **options}

    async def in_a_loop() -> TidewrightError:
        async with AsyncClient(url, **options) as client:
            with pytest.raises(TidewrightError) as caught:
                [event async for event in client.stream_chat(CHAT)]
        return caught.value

    with Client(url, **options) as client:
        with pytest.raises(TidewrightError) as whole:
            client.chat(CHAT)
        with pytest.raises(TidewrightError) as streamed:
            list(client.stream_chat(CHAT))
    errors = [whole.value, streamed.value, asyncio.run(in_a_loop())]
    assert len({type(error) for error in errors}) == 1, errors
    assert not [error for error in errors if KEY in error.message]
    return errors[0]


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("127.0.0.1:8080", "must begin with http:// or https://"),
        ("ftp://x", "must begin with http:// or https://"),
        ("http://", "names no host"),
        ("http://h:99999", "Port out of range"),
        ("http://h:0", "1 to 65535"),
        ("http://h:a", "Port could not be cast"),
        ("http://h?x=1", "end with its path"),
    ],
)
def test_what_is_no_address(url: str, why: str) -> None:
    for kind in (Client, AsyncClient):
        with pytest.raises(InvalidRequest, match="no address of a gateway") as caught:
            kind(url)
        assert why in caught.value.message


def test_secrets_in_the_address_are_refused_and_not_shown() -> None:
    with pytest.raises(InvalidRequest, match="TIDEWRIGHT_KEY") as caught:
        Client("http://me:secret@h")
    assert "secret" not in caught.value.message
    with pytest.raises(InvalidRequest) as refused:
        Client("http://h", key="tw-\u00e9\nx")
    assert "tw-" not in refused.value.message


def test_the_address_and_the_key_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIDEWRIGHT_URL", "http://there:9/v1/")
    monkeypatch.setenv("TIDEWRIGHT_KEY", " tw-a-b\n")
    settings = Client()._settings
    assert (settings.url, settings.key) == ("http://there:9", "tw-a-b")
    settings = Client("http://here", key="").__dict__["_settings"]
    assert (settings.url, settings.key) == ("http://here", None)


def test_what_is_wrong_is_seen_before_anything_is_sent() -> None:
    client = Client("http://127.0.0.1:1")
    with pytest.raises(InvalidRequest, match=r"models\(\) lists them"):
        client.chat(CHAT)
    with pytest.raises(InvalidRequest, match="a call for each"):
        client.chat(CHAT, model="m", extra={"n": 2})
    with pytest.raises(InvalidRequest, match="must not name stream"):
        client.chat(CHAT, model="m", extra={"stream": True})
    with pytest.raises(TypeError, match=r"no argument 'top_k'.*extra"):
        client.chat(CHAT, model="m", top_k=3)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="tools"):
        client.complete("x", model="m", tools=[])  # type: ignore[call-arg]
    for options in ({"timeout": 0}, {"idle_timeout": -1}, {"max_retries": -1}, {"max_answer_bytes": 0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            Client("http://h", **options)  # type: ignore[arg-type]


@contextlib.contextmanager
def listener(answer: bytes) -> Iterator[str]:
    """Sends this to whoever connects, reads on, and closes when the other side does."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve(connection: socket.socket) -> None:
            with connection, contextlib.suppress(OSError):  # a client may reset it
                connection.recv(65536)
                connection.sendall(answer)
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(65536):
                    pass

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    threading.Thread(target=serve, args=(server.accept()[0],), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)


def test_nobody_listens() -> None:
    error = failure("http://127.0.0.1:1")
    assert isinstance(error, ConnectionFailed)
    assert "check host and port" in error.message


def test_a_host_that_there_is_not() -> None:
    error = failure("http://no-such-host.invalid")
    assert isinstance(error, ConnectionFailed)
    assert "check its name" in error.message


def test_http2_where_the_first_bytes_are_no_http() -> None:
    with listener(bytes.fromhex("00002404000000000000020000000000030000000000040040000000")) as url:
        error = failure(url)
    assert isinstance(error, ConnectionFailed)
    assert "8080" in error.message
    assert "https://" in error.message


@pytest.mark.parametrize(
    "body", [b'{"error": {"message": "the key tw-me-secret is bad", "code": "x"}}', b"You sent Bearer tw-me-secret"]
)
def test_a_server_that_tells_the_key_back(body: bytes) -> None:
    head = b"HTTP/1.1 400 Bad\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body)
    with listener(head + body) as url:
        error = failure(url)  # which looks for the key
    assert "***" in error.message
    assert KEY not in (error.said or "")


def test_a_server_that_does_not_know_what_the_client_sends() -> None:
    body = b'{"error": {"message": "unknown field", "type": "invalid_request_error", "param": "timeout"}}'
    with listener(b"HTTP/1.1 400 Bad\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body) as url:
        error = failure(url)
        assert isinstance(error, InvalidRequest)
        assert "another version" in error.message
        with Client(url, model=MODEL) as client, pytest.raises(InvalidRequest) as caught:
            client.chat(CHAT, extra={"timeout": 1})
        assert caught.value.message == "unknown field"


def test_https_to_a_server_without_tls() -> None:
    with listener(b"HTTP/1.1 400 Bad Request\r\n\r\n") as url:
        error = failure(url.replace("http", "https"))
    assert isinstance(error, ConnectionFailed)
    assert "write http://" in error.message


def test_triton_s_ports_in_place_of_the_gateway_s(server: RunningServer) -> None:
    triton = server.settings
    http = failure(f"http://127.0.0.1:{triton.http_port}")
    assert isinstance(http, NotFound | InvalidRequest)
    grpc = failure(f"http://127.0.0.1:{triton.grpc_port}")
    assert isinstance(grpc, ConnectionFailed)
    metrics = failure(f"http://127.0.0.1:{triton.metrics_port}")
    assert isinstance(metrics, NotFound | InvalidRequest | UnexpectedAnswer)
    sessions = [
        error
        for port in (triton.http_port, triton.grpc_port, triton.metrics_port)
        for error in session_failures(f"http://127.0.0.1:{port}")
    ]
    for error in (http, grpc, metrics, *sessions):
        assert "the gateway's port (8080 by default)" in error.message, error


def test_keys_that_are_missing_wrong_or_expired(keyed: Keyed) -> None:
    url = keyed.gateway.url
    for key, why in (("", "give a key"), (keyed.expired, "expired"), ("tw-alice-wrong", "unknown")):
        for error in (failure(url, key=key), *session_failures(url, key=key)):
            assert isinstance(error, Unauthenticated)
            assert why in error.message
            assert "TIDEWRIGHT_KEY" in error.message
            assert not key or key not in error.message


def test_a_path_behind_the_address(keyed: Keyed) -> None:
    url = f"{keyed.gateway.url}/v2"
    error = failure(url, key=keyed.key)
    assert isinstance(error, NotFound)
    for one in (error, *session_failures(url, key=keyed.key)):
        assert "without a path" in one.message


def test_a_certificate_of_ones_own(model_dir: Path, server: RunningServer, tmp_path: Path) -> None:
    cert, key = write_certificate(tmp_path)
    trusted = ssl.create_default_context(cafile=cert)
    gateway = RunningGateway(model_dir, server, tls_cert=cert, tls_key=key)
    url = f"https://localhost:{gateway.port}"
    gateway.is_live = lambda: _is_healthy(url, trusted)  # type: ignore[method-assign]
    with gateway:
        error = failure(url, max_retries=2)
        assert isinstance(error, ConnectionFailed)
        assert "SSL_CERT_FILE" in error.message
        plain = failure(url.replace("https", "http"))
        assert isinstance(plain, ConnectionFailed | InvalidRequest)
        assert "https://" in plain.message
        with Client(url, model=MODEL, tls=trusted) as client, client.session() as session:
            text = client.chat(CHAT, max_tokens=8, temperature=0).text
            generation = session.stream_chat(CHAT, max_tokens=8, temperature=0)
            list(generation)
            assert generation.answer().text == text != ""


def _is_healthy(url: str, tls: ssl.SSLContext) -> bool:
    with Client(url, tls=tls) as client:
        try:
            return client.health()["status"] == "ready"
        except TidewrightError:
            return False


def test_a_server_that_says_nothing() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        error = failure(f"http://127.0.0.1:{silent.getsockname()[1]}", timeout=0.5)
    assert isinstance(error, TimedOut)
    assert "0.5 s" in error.message
