"""A name server for the pods, in place of CoreDNS: A records of a zone that a function knows."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable

from dnslib import QTYPE, RCODE, RR, A, DNSError, DNSRecord

from helpers.hosts import Host

PORT, TTL = 53, 5  # seconds; resolvers of the C library do not cache


class NameServer:
    """`addresses` gets a name in lower case without the final dot. It returns None for one that does not exist."""

    def __init__(self, host: Host, addresses: Callable[[str], list[str] | None]) -> None:
        self._addresses = addresses
        self.is_silent = False
        """Queries are ignored, as by a name server that is overloaded or gone."""
        with host.inside():
            self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind((host.address, PORT))
        self._thread = threading.Thread(target=self._serve, name="dns", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        with contextlib.suppress(OSError):  # not connected; it wakes the thread all the same
            self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._socket.close()

    def _serve(self) -> None:
        while True:
            try:
                data, sender = self._socket.recvfrom(4096)
            except OSError:
                return
            if not data:
                return  # shut down
            if not self.is_silent:
                try:
                    self._socket.sendto(self._answer(data), sender)
                except (DNSError, OSError):
                    continue  # not a query; or the pod is gone

    def _answer(self, data: bytes) -> bytes:
        query = DNSRecord.parse(data)
        answer = query.reply()
        name = str(query.q.qname).lower().rstrip(".")
        found = self._addresses(name)
        if found is None:
            answer.header.rcode = RCODE.NXDOMAIN
        elif query.q.qtype == QTYPE.A:
            for address in found:
                answer.add_answer(RR(query.q.qname, QTYPE.A, rdata=A(address), ttl=TTL))
        return answer.pack()
