"""Which replicas there are: what can be written, and what a name server or a file says meanwhile."""

from __future__ import annotations

import asyncio
import socket
import threading
from pathlib import Path

import pytest
from pydantic import ValidationError

from tidewright_gateway.config import GatewaySettings
from tidewright_gateway.replicas.discovery import DnsSource, Endpoint, make_source, parse_lines


def look(text: str) -> list[Endpoint]:
    return asyncio.run(make_source(text, 5.0).look())


def test_a_list_can_have_weights() -> None:
    assert look("a:1, b:2*2.5,[::1]:3*1,") == [Endpoint("a:1", 1), Endpoint("b:2", 2.5), Endpoint("[::1]:3", 1)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no replica"),
        (" , ", "names no replica"),
        ("a", "'a' is not HOST:PORT"),
        (":1", "is not HOST:PORT"),
        ("a:0", "is not HOST:PORT"),
        ("a:65536", "a port is 1 to 65535"),
        ("::1:8001", "is not HOST:PORT"),
        ("a:-1", "is not HOST:PORT"),
        ("a b:1", "is not HOST:PORT"),
        ("http://a:1", "is not HOST:PORT"),
        ("a:1,b:1,a:1*2", "names a replica twice: a:1"),
        *(
            (f"a:1*{weight}", "must be a number from 0.001 to 1000")
            for weight in ("", "0", "-1", "x", "nan", "inf", "1e9")
        ),
        ("a:1*2*3", "must be a number"),
        ("dns:a", "'a' is not HOST:PORT"),
        ("dns::1", "is not HOST:PORT"),
        ("file:/nowhere/replicas", "/nowhere/replicas can't be read: .*No such file"),
    ],
)
def test_what_is_none_of_the_three_is_refused_at_start(text: str, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        GatewaySettings(replicas=text)


@pytest.mark.parametrize("name", ["discovery_interval", "slow_start", "generation_probe_interval"])
def test_negative_times_are_refused(name: str) -> None:
    with pytest.raises(ValidationError, match=name):
        GatewaySettings(**{name: -1})


def test_a_file_has_a_replica_a_line(tmp_path: Path) -> None:
    file = tmp_path / "replicas"
    file.write_text("# all of them\n\na:1 # the old one\n  b:1*2\n")
    assert look(f"file:{file}") == [Endpoint("a:1"), Endpoint("b:1", 2)]
    GatewaySettings(replicas=f"file:{file}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a:1\n#\nb\n", "replicas: line 3: 'b' is not HOST:PORT"),
        ("a:1\na:1*2", "line 2: names a replica twice"),
        ("a:1*0", "line 1: the weight in 'a:1\\*0'"),
        ("# none\n", "no line names a replica"),
        (b"\xff", "replicas can't be read"),
    ],
)
def test_a_broken_file_is_refused_with_the_line(tmp_path: Path, content: str | bytes, message: str) -> None:
    file = tmp_path / "replicas"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ValidationError, match=message):
        GatewaySettings(replicas=f"file:{file}")


def test_a_long_file_is_read_at_once() -> None:
    """In a time that grows with its length, not faster: this would take hours."""
    assert len(parse_lines("\n".join(f"h{number}:1" for number in range(20_000)))) == 20_000


def test_all_addresses_of_a_name_are_found_while_others_work(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = threading.Event()

    def getaddrinfo(host: str, port: int, *_: object, **__: object) -> list[tuple[object, ...]]:
        assert (host, port) == ("replicas.test", 8001)
        assert answer.wait(20)
        kinds = [(socket.AF_INET, ("10.0.0.2", port)), (socket.AF_INET6, ("::1", port, 0, 0))]
        kinds += [(socket.AF_INET, ("10.0.0.1", port)), (socket.AF_INET, ("10.0.0.2", port))]
        return [(family, socket.SOCK_STREAM, 6, "", address) for family, address in kinds]

    async def main() -> list[Endpoint]:
        looking = asyncio.create_task(make_source("dns:replicas.test:8001", 5.0).look())
        await asyncio.sleep(0.01)
        answer.set()  # only a loop that is not blocked gets here
        return await looking

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    addresses = ["10.0.0.1:8001", "10.0.0.2:8001", "[::1]:8001"]
    assert asyncio.run(main()) == [Endpoint(address) for address in addresses]


@pytest.mark.parametrize("host", ["127.0.0.1.nowhere.invalid", "a" * 64 + ".invalid"])
def test_a_name_that_is_not_known_says_so(monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    def getaddrinfo(host: str, *_: object, **__: object) -> list[tuple[object, ...]]:
        host.encode("idna")  # as the real one does
        raise socket.gaierror("Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    with pytest.raises(ValueError, match="can't be resolved"):
        asyncio.run(DnsSource(host, 1, 5.0).look())
