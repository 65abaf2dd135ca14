"""What is an address, of those that users give in options, files and variables: HOST:PORT and http://HOST:PORT."""

from __future__ import annotations

import contextlib
import ipaddress
import re
from urllib.parse import SplitResult, urlsplit

MAX_PORT = 65535
_USER = re.compile(r"(?<=//)[^/?#]*@")


def host_and_port(text: str) -> tuple[str, int]:
    """Of HOST:PORT; an IPv6 address is in brackets, and the host that is returned has none.

    Raises:
        ValueError: it is none; the message says why.
    """
    found = re.fullmatch(r"(\[[^\s*/\[\]]+\]|[^\s*/:\[\]]+):([0-9]+)", text)
    if not found:
        raise ValueError(f"{text!r} is not HOST:PORT, such as 127.0.0.1:8001 or [::1]:8001")
    if not _is_port(found[2]):
        raise ValueError(f"{text!r} is not HOST:PORT: a port is 1 to {MAX_PORT}")
    return found[1].strip("[]"), int(found[2])


def is_loopback(host: str) -> bool:
    """Only this machine reaches it. A name other than localhost, which is not looked up, counts as reachable."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host.lower() == "localhost"


def check_url(text: str, *schemes: str) -> SplitResult:
    """Of an address such as http://HOST:PORT, whose port may be left out.

    Raises:
        ValueError: it is none; the message says why, without the address, which may have a password.
    """
    try:
        parts = urlsplit(text)
        host = parts.hostname
    except ValueError:
        raise ValueError("an address of IPv6 is in brackets: http://[::1]:8080") from None
    if parts.scheme not in schemes:
        raise ValueError(f"it must begin with {' or '.join(f'{scheme}://' for scheme in schemes)}")
    if not host or re.search(r"\s", text):
        raise ValueError("it names no host")
    port = parts.netloc.rpartition("@")[2].rpartition("]")[2].partition(":")
    if port[1] and not _is_port(port[2]):
        raise ValueError(f"its port must be a number from 1 to {MAX_PORT}")
    return parts


def check_redis_url(text: str) -> SplitResult:
    """As `check_url`; rediss:// is Redis over TLS."""
    return check_url(text, "redis", "rediss")


def without_user(url: str) -> str:
    """For messages: a URL may have a name and a password."""
    return _USER.sub("", url)


def _is_port(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 5 and 0 < int(text) <= MAX_PORT
