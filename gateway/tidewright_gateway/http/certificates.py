"""Reloads the gateway's certificate when its files change; new connections get the new one.

Global state of the process: uvicorn creates the SSL context in each worker through a function.
"""

from __future__ import annotations

import logging
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cryptography import x509

from tidewright.logs import event
from tidewright_gateway.stamps import Stamp, changes, stamp

log = logging.getLogger(__name__)

INTERVAL = 5.0  # seconds between two checks of the files

_contexts: list[ssl.SSLContext] = []
_expiries: dict[str, tuple[Stamp, float]] = {}


def expiry(certificate: str) -> float:
    """When the certificate in this PEM file expires, in Unix time; 0 if it can't be read."""
    now = stamp(certificate)
    if _expiries.get(certificate, ((), 0.0))[0] != now:
        try:
            found = x509.load_pem_x509_certificate(Path(certificate).read_bytes()).not_valid_after_utc.timestamp()
        except (OSError, ValueError):
            found = 0.0
        _expiries[certificate] = now, found
    return _expiries[certificate][1]


def make_context(config: Any, default: Callable[[], ssl.SSLContext]) -> ssl.SSLContext:
    """For uvicorn's ssl_context_factory."""
    context = default()
    _contexts.append(context)
    return context


async def watch(certificate: str, key: str) -> None:
    """Runs for ever, if there is one. Unusable files are logged once, and the previous certificate stays."""
    if not certificate:
        return
    async for _ in changes(stamp(certificate, key), INTERVAL, certificate, key):
        try:
            # In a scratch context first: a half-finished renewal must not mix old and new files.
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password="")
            for context in _contexts:
                context.load_cert_chain(certificate, key, password="")
            log.info("reloaded the certificate from %s", certificate, extra=event("certificate_reloaded"))
        except (OSError, ValueError) as error:
            extra = event("certificate_stale")
            log.error("keeping the previous certificate: %s: %s", certificate, error, extra=extra)
