"""A connection's reads are bound by the deadline of the call that reads, whichever call opened it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import httpx

from tidewright_client import exchange
from tidewright_client.deadline import Deadline


class Network:
    """Of httpx: keeps how long each read might take."""

    def __init__(self) -> None:
        self.timeouts: list[float | None] = []

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        self.timeouts.append(timeout)
        return b""


def test_reads_take_no_longer_than_what_is_left_of_the_deadline() -> None:
    network, now = Network(), [0.0]
    call: Any = SimpleNamespace(deadline=Deadline(10, lambda: now[0]))
    other: Any = SimpleNamespace(deadline=Deadline(100, lambda: now[0]))
    stream: Any = network
    for _ in range(2):  # once for each call over this connection
        exchange._bound_reads(httpx.Response(200, extensions={"network_stream": network}))
    with exchange._current.bound(call):
        stream.read(1, timeout=60)
        now[0] = 7.0
        stream.read(1, timeout=60)
        stream.read(1, timeout=1)
        with exchange._current.bound(other):
            stream.read(1, timeout=60)
        stream.read(1)
    stream.read(1, timeout=60)
    assert network.timeouts == [10, 3, 1, 60, 3, 60]


def test_a_transport_of_another_kind_is_left_alone() -> None:
    exchange._bound_reads(httpx.Response(200))
    exchange._bound_reads(httpx.Response(200, extensions={"network_stream": object()}))
