"""TLS to the replicas: CA and client certificate from PEM files, read again when these change."""

from __future__ import annotations

import logging
import ssl
from collections.abc import Callable
from pathlib import Path

import grpc

from tidewright.logs import event
from tidewright_gateway.stamps import changes, stamp

log = logging.getLogger(__name__)

INTERVAL = 5.0  # seconds between two looks at the files


def check_pem(authorities: str, certificate: str, key: str) -> None:
    """Raises ValueError: these files can't be used; gRPC itself would only say that it can't connect."""
    for name, file in (("replica_ca", authorities), ("replica_cert", certificate), ("replica_key", key)):
        if file and not Path(file).is_file():
            raise ValueError(f"{name}: no such file: {file}")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        if authorities:
            context.load_verify_locations(authorities)
    except (OSError, ValueError) as error:
        raise ValueError(f"replica_ca {authorities} has no certificate in PEM: {error}") from None
    try:
        if certificate:
            context.load_cert_chain(certificate, key, password="")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"replica_cert and replica_key are no certificate and its key in PEM, without a passphrase: {error}"
        ) from None


class ReplicaCredentials:
    def __init__(self, authorities: str, certificate: str, key: str) -> None:
        """An empty name means none. Raises OSError, ValueError."""
        self._files = authorities, certificate, key
        self._seen = stamp(*self._files)
        self.current = self._read()

    def _read(self) -> grpc.ChannelCredentials:
        check_pem(*self._files)
        root, chain, private = (Path(name).read_bytes() if name else None for name in self._files)
        return grpc.ssl_channel_credentials(root, private, chain)

    async def watch(self, renewed: Callable[[grpc.ChannelCredentials], None]) -> None:
        """Runs for ever, if there are files. Unusable ones are logged once, and the previous credentials stay."""
        if not any(self._files):
            return
        async for _ in changes(self._seen, INTERVAL, *self._files):
            try:
                self.current = self._read()
            except (OSError, ValueError) as error:
                extra = event("certificate_stale")
                log.error("keeping the previous credentials for the replicas: %s", error, extra=extra)
                continue
            renewed(self.current)
            log.info("reloaded the credentials for the replicas", extra=event("certificate_reloaded"))
