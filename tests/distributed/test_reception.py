"""Who comes to the rendezvous, over real connections: silent ones block no others, and all have bounds."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection

import pytest

from tidewright.distributed import reception as reception_module
from tidewright.distributed.handshake import Frames, introduce
from tidewright.distributed.rank_messages import Hello, Pong
from tidewright.distributed.reception import Arrival, Reception
from tidewright.engine.messages import encode

SECRET = b"sixteen bytes or more"
HELLO = Hello(1, "0.1.0", "model")
PATIENCE = 30.0


@pytest.fixture
def listener() -> socket.socket:
    return socket.create_server(("127.0.0.1", 0), backlog=128)


@pytest.fixture
def reception(listener: socket.socket) -> Iterator[Reception]:
    made = Reception(listener, SECRET)
    yield made
    made.close()


def connect(address: tuple[str, int]) -> socket.socket:
    return socket.create_connection(address, PATIENCE)


def come(address: tuple[str, int], said: bytes) -> Connection:
    connected = connect(address)
    introduce(Frames(connected, time.monotonic() + PATIENCE), SECRET)
    connected.settimeout(None)
    connection = Connection(connected.detach())
    connection.send_bytes(said)
    return connection


def arrived(reception: Reception) -> Arrival:
    arrival = reception.next(PATIENCE)
    assert arrival
    return arrival


def test_a_rank_is_heard_beside_silent_ones(listener: socket.socket, reception: Reception) -> None:
    """Before, each of them held up the next for five seconds, and one that sent half a message for ever."""
    address = listener.getsockname()
    silent = [connect(address) for _ in range(20)]
    for one in silent:
        one.sendall(b"\0\0")
    with come(address, encode(HELLO)):
        arrival = arrived(reception)
    assert (arrival.hello, arrival.address, arrival.is_here) == (HELLO, "127.0.0.1", True)
    arrival.connection.close()
    for one in silent:
        one.close()


def test_so_many_silent_ones_are_heard_and_no_more_until_they_are_given_up(
    listener: socket.socket, reception: Reception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(reception_module, "MOST_HEARD", 3)
    monkeypatch.setattr(reception_module, "HELLO_TIMEOUT", 1.0)
    address = listener.getsockname()
    silent = [connect(address) for _ in range(3)]
    with connect(address) as refused:
        assert refused.recv(1) == b""
    assert "a connection from 127.0.0.1 was refused: 3 others say nothing yet" in caplog.text
    for one in silent:
        assert one.recv(1) == b""  # given up
        one.close()
    with come(address, encode(HELLO)):
        arrived(reception).connection.close()


@pytest.mark.parametrize("said", [encode(Pong(1)), b"\xc1", encode(HELLO) + bytes(5000)])
def test_what_is_no_hello_is_refused_with_a_line(
    listener: socket.socket, reception: Reception, caplog: pytest.LogCaptureFixture, said: bytes
) -> None:
    with come(listener.getsockname(), said) as connection, pytest.raises((EOFError, ConnectionResetError)):
        connection.recv_bytes()
    assert reception.next(0) is None
    assert "a connection from 127.0.0.1 was refused" in caplog.text


def test_the_end_frees_the_address_and_hangs_up_on_those_left(listener: socket.socket, reception: Reception) -> None:
    address = listener.getsockname()
    with come(address, encode(HELLO)) as left:
        time.sleep(0.1)
        reception.close()
        reception.close()
        with pytest.raises((EOFError, ConnectionResetError)):
            left.recv_bytes()
    with pytest.raises(ConnectionRefusedError):
        connect(address)
