"""Which replicas there are: a list, the addresses of a DNS name, or a file, as `GatewaySettings.replicas` says."""

from __future__ import annotations

import asyncio
import logging
import math
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tidewright.address import host_and_port
from tidewright.logs import event

log = logging.getLogger(__name__)

FILE_INTERVAL = 0.5  # seconds between two looks at a file
MIN_WEIGHT, MAX_WEIGHT = 0.001, 1000
DNS, FILE = "dns:", "file:"


@dataclass(frozen=True)
class Endpoint:
    address: str
    weight: float = 1.0
    """Its share of the requests, relative to the others'."""


class Source(Protocol):
    interval: float
    """Seconds between two looks; 0 if one is enough."""

    async def look(self) -> list[Endpoint]:
        """Raises ValueError: what is there can't be read; the message says why."""
        ...


class ListSource:
    interval = 0.0

    def __init__(self, endpoints: list[Endpoint]) -> None:
        self._endpoints = endpoints

    async def look(self) -> list[Endpoint]:
        return self._endpoints


class FileSource:
    interval = FILE_INTERVAL

    def __init__(self, path: Path) -> None:
        self._path = path

    async def look(self) -> list[Endpoint]:
        return await asyncio.to_thread(self.read)

    def read(self) -> list[Endpoint]:
        """Blocks for as long as the file system does; else as `look`."""
        try:
            text = self._path.read_text(encoding="utf-8")
        except (OSError, UnicodeError) as error:
            raise ValueError(f"{self._path} can't be read: {error}") from None
        try:
            return parse_lines(text)
        except ValueError as error:
            raise ValueError(f"{self._path}: {error}") from None


class DnsSource:
    def __init__(self, host: str, port: int, interval: float) -> None:
        self._host, self._port, self.interval = host, port, interval

    async def look(self) -> list[Endpoint]:
        loop = asyncio.get_running_loop()
        try:
            found = await loop.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise ValueError(f"{self._host} can't be resolved: {error}") from None
        hosts = {str(address[0]) for *_, address in found}
        return [Endpoint(f"[{host}]:{self._port}" if ":" in host else f"{host}:{self._port}") for host in sorted(hosts)]


def make_source(text: str, interval: float) -> ListSource | FileSource | DnsSource:
    """`interval`: seconds between two look-ups of a DNS name.

    Raises:
        ValueError: it is none of the three.
    """
    if text.startswith(FILE):
        return FileSource(Path(text.removeprefix(FILE)))
    if text.startswith(DNS):
        host, port = host_and_port(text.removeprefix(DNS))
        return DnsSource(host, port, interval)
    found: dict[str, Endpoint] = {}
    for part in text.split(","):
        _add(found, part.strip())
    if not found:
        raise ValueError("names no replica; give HOST:PORT, such as 127.0.0.1:8001")
    return ListSource(list(found.values()))


def parse_lines(text: str) -> list[Endpoint]:
    """A replica a line; `#` begins a comment.

    Raises:
        ValueError: names the line that can't be understood.
    """
    found: dict[str, Endpoint] = {}
    for number, line in enumerate(text.splitlines(), 1):
        try:
            _add(found, line.partition("#")[0].strip())
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from None
    if not found:
        raise ValueError("no line names a replica; write HOST:PORT, such as 127.0.0.1:8001")
    return list(found.values())


def _add(found: dict[str, Endpoint], text: str) -> None:
    if not text:
        return
    endpoint = _endpoint(text)
    if endpoint.address in found:
        raise ValueError(f"names a replica twice: {endpoint.address}")
    found[endpoint.address] = endpoint


def _endpoint(text: str) -> Endpoint:
    address, star, weight = text.partition("*")
    host_and_port(address)
    if not star:
        return Endpoint(address)
    try:
        value = float(weight)
    except ValueError:
        value = math.nan
    if not MIN_WEIGHT <= value <= MAX_WEIGHT:
        raise ValueError(
            f"the weight in {text!r} must be a number from {MIN_WEIGHT} to {MAX_WEIGHT}, such as in {address}*2"
        )
    return Endpoint(address, value)


class Discovery:
    """Looks at a source again and again; what can't be read changes nothing, and is logged once."""

    def __init__(self, source: Source, found: Callable[[Sequence[Endpoint]], None], failed: Callable[[], None]) -> None:
        """`found` gets what there is now; `failed` is called for each look that found nothing."""
        self._source, self._found, self._failed = source, found, failed
        self.looked = asyncio.Event()
        """It has looked once."""
        self.problem = ""
        """Why the last look failed; empty if it did not."""

    async def run(self) -> None:
        """For as long as there can be something new."""
        while True:
            try:
                await self._look()
            except Exception:
                log.exception("the replicas could not be looked up")
            self.looked.set()
            if not self._source.interval:
                return
            await asyncio.sleep(self._source.interval)

    async def _look(self) -> None:
        try:
            endpoints = await self._source.look()
        except ValueError as error:
            self._failed()
            if str(error) != self.problem:
                log.warning("keeping the known replicas: %s", error, extra=event("discovery_failed"))
            self.problem = str(error)
        else:
            if self.problem:
                log.info("the replicas are looked up again", extra=event("discovery_recovered"))
            self.problem = ""
            self._found(endpoints)
