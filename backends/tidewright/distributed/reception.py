"""Hears who comes to the rendezvous: each connection in a thread of its own, so that a silent one blocks no other.

Whether a rank belongs to the group is for `ranks.py` to say.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import socket
import threading
import time
from multiprocessing.connection import Connection
from typing import NamedTuple

import msgspec

from tidewright.distributed.handshake import ForeignPeerError, Frames, HandshakeError, admit
from tidewright.distributed.rank_messages import Hello, Refused, decode_from_rank
from tidewright.engine.messages import encode

log = logging.getLogger(__name__)

HELLO_TIMEOUT = 5.0  # seconds from connecting to the end of `Hello`
LONGEST_HELLO = 4096  # bytes; who connects is not known yet
MOST_HEARD = 64  # connections that have not said `Hello` yet; one more is hung up on
_FOREIGN = "it is of another version than rank 0; install the same on all hosts"


class Arrival(NamedTuple):
    """A rank that knows the secret, if there is one, and waits for an answer to `hello`."""

    hello: Hello
    connection: Connection
    address: str
    is_here: bool  # it runs on this host


class Reception:
    """Takes over `listener`; used as: `next()` until all have come, then `close()`."""

    def __init__(self, listener: socket.socket, secret: bytes | None) -> None:
        self._listener, self._secret = listener, secret
        self._arrivals: queue.SimpleQueue[Arrival] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._heard = 0  # threads
        self._closed = False
        self._thread = threading.Thread(target=self._accept, name="reception", daemon=True)
        self._thread.start()

    def next(self, timeout: float) -> Arrival | None:
        """The next one; None if nobody came within so many seconds."""
        with contextlib.suppress(queue.Empty):
            return self._arrivals.get(timeout=timeout)
        return None

    def close(self) -> None:
        """Frees the address, and hangs up on those who have not been taken in."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread
        self._thread.join()
        self._listener.close()
        while (left := self.next(0)) is not None:
            left.connection.close()

    def _accept(self) -> None:
        while True:
            try:
                connected, peer = self._listener.accept()
            except OSError as error:
                if self._closed:
                    return
                log.error("can't accept a connection from a rank: %s", error.strerror or error)
                time.sleep(0.1)  # out of descriptors, most likely
                continue
            with self._lock:
                is_full = self._heard >= MOST_HEARD
                self._heard += not is_full
            if is_full:
                log.error("a connection from %s was refused: %d others say nothing yet", peer[0], MOST_HEARD)
                connected.close()
                continue
            threading.Thread(target=self._hear, args=(connected, peer[0]), daemon=True).start()

    def _hear(self, connected: socket.socket, address: str) -> None:
        try:
            arrival = self._hello(connected, address)
        except EOFError:
            arrival = None  # a worker that only looked whether somebody is here
        except (HandshakeError, OSError, msgspec.MsgspecError) as error:
            arrival = None
            log.error("a connection from %s was refused: %s", address, error)
        finally:
            connected.close()  # an arrival has a descriptor of its own
            with self._lock:
                self._heard -= 1
        if arrival:
            with self._lock:
                if not self._closed:
                    self._arrivals.put(arrival)
                    return
            arrival.connection.close()

    def _hello(self, connected: socket.socket, address: str) -> Arrival:
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        frames = Frames(connected, time.monotonic() + HELLO_TIMEOUT)
        try:
            admit(frames, self._secret)
        except ForeignPeerError:
            # Versions before the handshake understand this.
            frames.send(encode(Refused(_FOREIGN)))
            raise
        hello = decode_from_rank(frames.receive(LONGEST_HELLO))
        if not isinstance(hello, Hello):
            raise HandshakeError(f"it began with {type(hello).__name__}, not with Hello")
        is_here = connected.getsockname()[0] == address
        connected.settimeout(None)
        return Arrival(hello, Connection(connected.detach()), address, is_here)
