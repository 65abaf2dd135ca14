"""Clients that are slow, send what they should not, or take nothing: each is refused or cut off, others unharmed."""

from __future__ import annotations

import itertools
import json
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from gateway.conftest import TIMEOUT
from helpers.echo_replica import EchoReplica
from helpers.gateway import MODEL, RunningGateway
from tidewright.tokenization import Tokenizer

PATIENCE = 30.0  # seconds; for what takes TIMEOUT on a machine with time
MIB = 2**20
HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"


def connect(gateway: RunningGateway, receive_buffer: int = 0) -> socket.socket:
    client = socket.socket()
    if receive_buffer:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    client.settimeout(PATIENCE)
    client.connect(("127.0.0.1", gateway.port))
    return client


def post(body: dict[str, Any] | bytes) -> bytes:
    data = body if isinstance(body, bytes) else json.dumps({"model": MODEL, **body}).encode()
    return HEAD + b"content-length: %d\r\n\r\n" % len(data) + data


def read_all(client: socket.socket) -> bytes:
    """To the end of the connection, however it ends."""
    got = b""
    with suppress(ConnectionError):
        while data := client.recv(65536):
            got += data
    return got


def read_answer(client: socket.socket) -> tuple[int, bytes]:
    """Status and body of one answer with a length."""
    with client.makefile("rb") as file:
        status = int(file.readline().split()[1])
        length = 0
        while (line := file.readline()) != b"\r\n":
            if line.startswith(b"content-length"):
                length = int(line.split()[1])
        return status, file.read(length)


@pytest.mark.parametrize("hosts", [b"", b"host: a\r\nHost: b\r\n"])
@pytest.mark.parametrize("more", [b"", b"connection: upgrade\r\nupgrade: websocket\r\n"])
def test_a_request_of_http_11_has_one_host(echo_gateway: RunningGateway, hosts: bytes, more: bytes) -> None:
    for path in (b"/health/live", b"/v1/stream"):
        with closing(connect(echo_gateway)) as client:
            client.sendall(b"GET %s HTTP/1.1\r\n%s%s\r\n" % (path, hosts, more))
            status, body = read_answer(client)
            assert (status, json.loads(body)["error"]["code"]) == (400, "invalid_http")
            assert b"one Host header" in body
            assert read_all(client) == b""
    with closing(connect(echo_gateway)) as client:
        client.sendall(b"GET /health/live HTTP/1.0\r\n\r\n")
        assert read_all(client).startswith(b"HTTP/1.1 200")


def test_a_length_may_have_thousands_of_digits(echo_gateway: RunningGateway) -> None:
    with closing(connect(echo_gateway)) as client:
        client.sendall(HEAD + b"content-length: %s2\r\n\r\n{}" % (b"0" * 5000))
        status, body = read_answer(client)
        assert (status, json.loads(body)["error"]["code"]) == (400, "invalid_value")


def send_all(client: socket.socket, pieces: Iterator[bytes]) -> int:
    """Bytes that it took."""
    sent = 0
    with suppress(ConnectionError):
        for piece in pieces:
            client.sendall(piece)
            sent += len(piece)
    return sent


def trickle(client: socket.socket, piece: bytes) -> bytes:
    """Sends the piece again and again, slowly, until the other side has enough; what it said."""
    client.settimeout(0.1)
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        try:
            client.sendall(piece)
            if not (data := client.recv(65536)):
                return b""
            client.settimeout(PATIENCE)
            return data + read_all(client)
        except TimeoutError:
            pass
        except ConnectionError:
            return b""
    raise AssertionError("it goes on for ever")


def serves(gateway: RunningGateway) -> bool:
    return (
        gateway.post("/v1/completions", {"prompt": "Once", "max_tokens": 3}).json()["usage"]["completion_tokens"] == 3
    )


def memory(gateway: RunningGateway) -> int:
    return int(psutil.Process(gateway.process.pid).memory_info().rss)


def test_a_request_that_does_not_come_to_its_end_is_given_up(echo_gateway: RunningGateway) -> None:
    def says_nothing(client: socket.socket) -> bytes:
        return read_all(client)

    def ends_no_header(client: socket.socket) -> bytes:
        client.sendall(HEAD)
        return trickle(client, b"a: b\r\n")

    def sends_nothing_but_an_empty_line_after_an_answer(client: socket.socket) -> bytes:
        client.sendall(b"GET /health/live HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert read_answer(client)[0] == 200
        client.sendall(b"\r\n")
        return read_all(client)

    def ends_no_body(client: socket.socket) -> bytes:
        client.sendall(HEAD + b"content-length: 100000\r\n\r\n")
        return trickle(client, b" ")

    def ends_no_body_that_nobody_wants(client: socket.socket) -> bytes:
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100000\r\n\r\n")
        return read_all(client)

    def run(attack: Callable[[socket.socket], bytes]) -> bytes:
        with closing(connect(echo_gateway)) as client:
            return attack(client)

    attacks = [says_nothing, ends_no_header, sends_nothing_but_an_empty_line_after_an_answer, ends_no_body]
    attacks.append(ends_no_body_that_nobody_wants)
    with ThreadPoolExecutor(len(attacks)) as pool:
        answers = [pool.submit(run, attack) for attack in attacks]
        assert serves(echo_gateway)
        nothing, headers, empty, body, unwanted = [answer.result() for answer in answers]
    assert (nothing, headers, empty) == (b"", b"", b"")
    assert body.startswith(b"HTTP/1.1 408")
    assert json.loads(body.split(b"\r\n\r\n")[1])["error"]["code"] == "timeout"
    assert unwanted.startswith(b"HTTP/1.1 415")


def test_a_slow_answer_is_not_taken_for_a_slow_client(echo: EchoReplica, echo_gateway: RunningGateway) -> None:
    echo.pause = TIMEOUT / 8
    try:
        with closing(connect(echo_gateway)) as client:
            client.sendall(post({"prompt": "Once", "max_tokens": 16, "stream": True}))
            client.sendall(b"\r\n")  # the beginning of a next request
            got = b""
            while b"[DONE]" not in got:
                data = client.recv(65536)
                assert data
                got += data
            assert got.count(b" word") == 16
    finally:
        echo.pause = 0.0


@pytest.mark.parametrize(
    "request_",
    [
        HEAD + b"a: " + b"b" * 70_000 + b"\r\n\r\n",
        HEAD + b"a: b\r\n" * 40_000 + b"\r\n",
        b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nhost: localhost\r\n\r\n",
    ],
    ids=["one", "many", "address"],
)
def test_headers_that_are_too_long_are_refused(echo_gateway: RunningGateway, request_: bytes) -> None:
    with closing(connect(echo_gateway)) as client:
        send_all(client, iter([request_]))
        answer = read_all(client)
    # Whoever still sends when it is closed may not get to read why.
    assert answer.startswith(b"HTTP/1.1 431") or len(request_) > 100_000
    assert serves(echo_gateway)


def test_a_header_without_end_takes_no_memory(echo_gateway: RunningGateway) -> None:
    before = memory(echo_gateway)
    with closing(connect(echo_gateway)) as client:
        client.sendall(HEAD + b"a: ")
        sent = send_all(client, (b"b" * 65536 for _ in range(1600)))
    assert sent < 50 * MIB  # the kernel's buffers take some
    assert memory(echo_gateway) - before < 16 * MIB


NESTED = b"[" * 100_000 + b"]" * 100_000
OBJECTS = b'{"a":' * 100_000 + b"1" + b"}" * 100_000


@pytest.mark.parametrize(
    "body",
    [
        NESTED,
        NESTED[:100_000],
        b'{"model":"m","prompt":' + NESTED + b"}",
        b'{"model":"m","prompt":"a","guided_json":' + OBJECTS + b"}",
        b'{"model":"m","prompt":"a","response_format":{"type":"json_schema","json_schema":{"schema":'
        + OBJECTS
        + b"}}}",
        b'{"model":"m","prompt":"\xff\xfe"}',
        b"\xff\xfe{\x00}\x00",
        b'{"model":"m","prompt":"a","max_tokens":' + b"9" * 5000 + b"}",
        b'{"model":"m","prompt":"a","max_tokens":1e999}',
        b'{"model":"m","prompt":"a","temperature":NaN}',
        b'{"model":"m","prompt":"a","logit_bias":{"1":NaN}}',
        b'{"model":"m","prompt":"\\ud800"}',
        b'{"model":"m","prompt":"a","stop":"\\ud800"}',
        b'{"model":"m","prompt":"a","user":"\\ud800"}',
        b'{"model":"\\ud800","prompt":"a"}',
        b'{"model":"m","prompt":[99999999999999999999]}',
        b'{"\\ud800":1}',
        b"",
        b"null",
    ],
    ids=itertools.count(),
)
def test_a_body_that_is_not_for_it_is_a_400(echo_gateway: RunningGateway, body: bytes) -> None:
    with closing(connect(echo_gateway)) as client:
        client.sendall(post(body.replace(b'"m"', b'"%s"' % MODEL.encode(), 1)))
        status, answer = read_answer(client)
    assert status in (400, 404), answer
    assert json.loads(answer)["error"]["message"]
    assert serves(echo_gateway)


@pytest.mark.parametrize("depth", [900, 940, 960, 975, 1100])
def test_no_depth_is_too_much_for_it(echo_gateway: RunningGateway, depth: int) -> None:
    schema = b'{"a":' * depth + b"1" + b"}" * depth
    with closing(connect(echo_gateway)) as client:
        client.sendall(post(b'{"model":"%s","prompt":"a","guided_json":%s}' % (MODEL.encode(), schema)))
        status, answer = read_answer(client)
    assert status in (200, 400), answer  # this replica knows nothing of grammars
    assert serves(echo_gateway)


def test_a_prompt_of_10_mb_is_refused_unread(echo_gateway: RunningGateway) -> None:
    answer = echo_gateway.post("/v1/completions", {"prompt": " internationalization" * (MIB // 2)})
    assert answer.status_code == 400
    assert (answer.json()["error"]["code"], answer.json()["error"]["param"]) == ("context_length_exceeded", "prompt")


def test_the_longest_prompt_that_is_tokenized_holds_up_nobody(model_dir: Path, echo_gateway: RunningGateway) -> None:
    limit = 8192 * Tokenizer(model_dir)._longest_token  # characters; a token can't have more
    prompt, answered = (" internationalization" * (limit // 20))[:limit], 0
    with ThreadPoolExecutor(1) as pool:
        long = pool.submit(echo_gateway.post, "/v1/completions", {"prompt": prompt})
        while not long.done():
            assert serves(echo_gateway)
            answered += 1
            time.sleep(0.02)
    assert long.result().json()["error"]["code"] == "context_length_exceeded"
    assert answered > 1  # while the tokenizer held the interpreter, it was one


def test_a_client_that_never_reads_its_stream_is_cut_off_and_its_generation_ends(
    echo: EchoReplica, echo_gateway: RunningGateway
) -> None:
    assert echo.wait_running(0, PATIENCE)
    before, sent = memory(echo_gateway), echo.sent
    echo.text, echo.limit = "x" * 1000, None
    try:
        with closing(connect(echo_gateway, receive_buffer=4096)) as client:
            client.sendall(post({"prompt": "Once", "max_tokens": 8000, "stream": True}))
            assert echo.wait_running(1, PATIENCE)
            assert echo.wait_running(0, PATIENCE)
            assert not read_all(client).endswith(b"0\r\n\r\n")
    finally:
        echo.text, echo.limit = " word", 50
    assert (echo.sent - sent) * 1000 < 64 * MIB
    assert memory(echo_gateway) - before < 64 * MIB
    assert serves(echo_gateway)


def test_nor_is_a_whole_answer_kept_for_one_that_does_not_take_it(
    echo: EchoReplica, echo_gateway: RunningGateway
) -> None:
    echo.text, echo.limit = "x" * 100_000, 100
    try:
        with closing(connect(echo_gateway, receive_buffer=4096)) as client:
            client.sendall(post({"prompt": "Once", "max_tokens": 100}))
            assert echo.wait_running(1, PATIENCE)
            assert echo.wait_running(0, PATIENCE)
            deadline, mine = time.monotonic() + PATIENCE, client.getsockname()
            while any(one.raddr == mine for one in psutil.Process(echo_gateway.process.pid).net_connections()):
                assert time.monotonic() < deadline
                time.sleep(0.05)
            assert len(read_all(client)) < 10_000_000
    finally:
        echo.text, echo.limit = " word", 50
    assert serves(echo_gateway)
