"""HTTP/1.0 over raw sockets: no chunked encoding, no 100 Continue, and the end of the connection ends the body."""

from __future__ import annotations

import json
import time
from contextlib import closing

import pytest

from gateway.test_bad_clients import connect, read_all
from helpers.echo_replica import EchoReplica
from helpers.gateway import MODEL, RunningGateway

PIECES = 400
PIECE = "x" * 20_000
KEEP_ALIVE = b"connection: keep-alive\r\n"


def completion(version: bytes = b"1.0", more: bytes = b"", **options: object) -> bytes:
    body = json.dumps({"model": MODEL, "prompt": "Hi", "max_tokens": 3, **options}).encode()
    head = b"POST /v1/completions HTTP/%s\r\nhost: localhost\r\ncontent-type: application/json\r\n" % version
    return head + more + b"content-length: %d\r\n\r\n" % len(body) + body


def ask(gateway: RunningGateway, request: bytes) -> tuple[bytes, dict[bytes, bytes], bytes]:
    """Status line, headers and body of the only answer; returns when the gateway closes the connection."""
    with closing(connect(gateway)) as client:
        client.sendall(request)
        return parts(read_all(client))


def parts(answer: bytes) -> tuple[bytes, dict[bytes, bytes], bytes]:
    head, _, body = answer.partition(b"\r\n\r\n")
    status, *lines = head.split(b"\r\n")
    pairs = [line.split(b": ", 1) for line in lines]
    assert len({name for name, _ in pairs}) == len(pairs)
    return status, dict(map(tuple, pairs)), body  # type: ignore[arg-type]


@pytest.mark.parametrize("more", [b"", KEEP_ALIVE, b"expect: 100-continue\r\n"])
def test_a_stream_ends_with_its_connection(echo_gateway: RunningGateway, more: bytes) -> None:
    status, headers, body = ask(echo_gateway, completion(more=more, stream=True))
    assert status == b"HTTP/1.1 200 OK"
    assert headers[b"connection"] == b"close"
    assert not {b"transfer-encoding", b"content-length"} & headers.keys()
    events = body.removesuffix(b"\n\n").split(b"\n\n")
    assert events.pop() == b"data: [DONE]"
    texts = [json.loads(event.removeprefix(b"data: "))["choices"][0]["text"] for event in events]
    assert "".join(texts) == " word" * 3


@pytest.mark.parametrize("more", [b"", KEEP_ALIVE])
def test_a_whole_answer_has_its_length(echo_gateway: RunningGateway, more: bytes) -> None:
    _, headers, body = ask(echo_gateway, completion(more=more))
    assert headers[b"connection"] == b"close"
    assert b"transfer-encoding" not in headers
    assert int(headers[b"content-length"]) == len(body)
    assert json.loads(body)["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize(("path", "status"), [(b"/health", b"200 OK"), (b"/nowhere", b"404 Not Found")])
def test_head_has_the_length_and_no_body(echo_gateway: RunningGateway, path: bytes, status: bytes) -> None:
    line, headers, body = ask(echo_gateway, b"HEAD %s HTTP/1.0\r\nhost: localhost\r\n\r\n" % path)
    assert line == b"HTTP/1.1 " + status
    assert (headers[b"connection"], body) == (b"close", b"")
    assert int(headers[b"content-length"]) > 0


def test_a_request_without_a_host_header_is_served(echo_gateway: RunningGateway) -> None:
    status, headers, body = ask(echo_gateway, b"GET /v1/models HTTP/1.0\r\n\r\n")
    assert status == b"HTTP/1.1 200 OK"
    assert len(body) == int(headers[b"content-length"])


def test_nothing_is_lost_to_a_client_that_reads_slowly(echo: EchoReplica, echo_gateway: RunningGateway) -> None:
    echo.text, echo.limit = PIECE, PIECES
    try:
        with closing(connect(echo_gateway, receive_buffer=4096)) as client:
            client.sendall(completion(stream=True, max_tokens=PIECES))
            first = client.recv(1)
            time.sleep(0.2)  # the gateway fills all buffers and waits
            _, headers, body = parts(first + read_all(client))
    finally:
        echo.text, echo.limit = " word", 50
    assert b"transfer-encoding" not in headers
    assert body.count(b"x") >= PIECES * len(PIECE)
    assert body.endswith(b"data: [DONE]\n\n")


def test_http_1_1_streams_stay_chunked(echo_gateway: RunningGateway) -> None:
    close = b"connection: close\r\n"
    _, headers, body = ask(echo_gateway, completion(b"1.1", close, stream=True))
    assert headers[b"transfer-encoding"] == b"chunked"
    assert body.endswith(b"0\r\n\r\n")
