"""Host names that the gateway serves.

Without keys, this protects against DNS rebinding: a page may resolve its own name to this machine, but the browser
sends that name in the Host header.
"""

from __future__ import annotations

from collections.abc import Iterable

from tidewright_gateway.config import GatewaySettings
from tidewright_gateway.openai.errors import ApiError

LOOPBACK = frozenset(("localhost", "127.0.0.1", "[::1]"))


class Hosts:
    def __init__(self, settings: GatewaySettings) -> None:
        named = {name.strip().lower() for name in settings.allowed_hosts.split(",") if name.strip()}
        self._allowed: frozenset[str] | None = None
        if named or not settings.asks_for_keys:
            own = f"[{settings.host}]" if ":" in settings.host else settings.host
            self._allowed = frozenset({own.lower(), *named, *LOOPBACK})

    def check(self, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """`headers`: of a request, with names in lower case. One of HTTP/1.0 may have no Host: browsers always send it.

        Raises:
            ApiError: the Host header, with or without a port, names another host.
        """
        if self._allowed is None:
            return
        for header, value in headers:
            if header == b"host" and (name := _without_port(value)) not in self._allowed:
                message = f"unknown host {name[:200]!r}; add it to the option allowed_hosts"
                raise ApiError(421, message, code="unknown_host")


def _without_port(host: bytes) -> str:
    name = host.decode("latin-1").strip().lower()
    before, _, port = name.rpartition(":")
    return before if port.isdigit() else name
