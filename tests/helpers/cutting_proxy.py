"""A TCP proxy that breaks each connection once it has carried so many bytes of the server's."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Iterable
from urllib.parse import urlsplit


class CuttingProxy:
    def __init__(self, url: str, cuts: Iterable[int]) -> None:
        """`cuts`: the bytes that each connection carries, one after the other; further connections stay."""
        target = urlsplit(url)
        assert target.hostname
        assert target.port
        self._target = target.hostname, target.port
        self._cuts = iter(cuts)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.connections = 0
        self.broken = 0
        self._open: set[socket.socket] = set()

    def __enter__(self) -> CuttingProxy:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.refuse()
        self.cut()

    def refuse(self) -> None:
        """No further connections."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # or a waiting accept takes one more
        self._listener.close()

    def cut(self) -> None:
        """All connections there are."""
        for one in list(self._open):
            _reset(one)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self.connections += 1
                server = socket.create_connection(self._target)
                self._open |= {client, server}
                left = next(self._cuts, None)
                threading.Thread(target=self._carry, args=(client, server, None), daemon=True).start()
                threading.Thread(target=self._carry, args=(server, client, left), daemon=True).start()

    def _carry(self, source: socket.socket, target: socket.socket, left: int | None) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536 if left is None else max(1, min(left, 65536))):
                target.sendall(data)
                if left is not None:
                    left -= len(data)
                    if left <= 0:
                        self.broken += 1
                        break
        for one in (source, target):
            _reset(one)
            self._open.discard(one)


def _reset(one: socket.socket) -> None:
    with contextlib.suppress(OSError):
        one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        one.shutdown(socket.SHUT_RDWR)
        one.close()
