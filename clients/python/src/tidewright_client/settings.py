"""What a client is made with: its address and key, checked, and its options with their defaults."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import httpx

from tidewright_client import checks
from tidewright_client.errors import InvalidRequest
from tidewright_client.hooks import Hooks
from tidewright_client.retries import Budget

DEFAULT_URL = "http://127.0.0.1:8080"
TIMEOUT = 600.0
IDLE_TIMEOUT = 60.0
CONNECT_TIMEOUT = 10.0
MAX_RETRIES = 2
MAX_ANSWER_BYTES = 64 * 2**20
_PATHS = ("/chat/completions", "/completions", "/v1/models", "/v1/stream", "/health/live", "/health/ready", "/version")


@dataclass(frozen=True)
class Settings:
    url: str
    """Without a path of the API and without a slash at its end."""
    key: str | None
    max_retries: int
    timeout: float | None
    idle_timeout: float
    max_answer_bytes: int
    hooks: Hooks
    budget: Budget = field(default_factory=Budget)

    def without_key(self, text: str) -> str:
        """A text that may come from elsewhere, for a message."""
        return text.replace(self.key, "***") if self.key else text


def make(
    url: str | None,
    key: str | None,
    max_retries: int,
    timeout: float | None,
    idle_timeout: float,
    max_answer_bytes: int,
    hooks: Hooks | None,
) -> Settings:
    """
    Raises:
        InvalidRequest: the URL is none, or the key can't be one.
        TypeError: an argument is of another type.
        ValueError: a number is out of range.
    """
    checks.kind("url", url, str, "a text")
    checks.kind("key", key, str, "a text")
    checks.kind("hooks", hooks, Hooks, "Hooks")
    checks.count("max_retries", max_retries, 0)
    checks.seconds("timeout", timeout)
    checks.seconds("idle_timeout", idle_timeout, none="")
    checks.count("max_answer_bytes", max_answer_bytes, 1)
    if key is None:
        key = os.environ.get("TIDEWRIGHT_KEY")
    key = (key or "").strip() or None
    if key and not (key.isascii() and key.isprintable() and " " not in key):
        raise InvalidRequest("the API key has characters that no key has; give the text that `tidewright keys` printed")
    return Settings(
        url=_base(url or os.environ.get("TIDEWRIGHT_URL") or DEFAULT_URL),
        key=key,
        max_retries=max_retries,
        timeout=timeout,
        idle_timeout=idle_timeout,
        max_answer_bytes=max_answer_bytes,
        hooks=hooks or Hooks(),
    )


def _base(url: str) -> str:
    base = url.strip().rstrip("/").removesuffix("/v1")
    try:
        parts = urlsplit(base)
        fault = ""
        if parts.scheme not in ("http", "https"):
            fault = "it must begin with http:// or https://"
        elif not parts.hostname:
            fault = "it names no host"
        elif parts.port == 0:
            fault = "its port must be a number from 1 to 65535"
        elif parts.username is not None or parts.password is not None:
            # Not shown: what stands before the @ is a secret.
            raise InvalidRequest(
                "the URL holds a user's name or password; give the API key as key= or in TIDEWRIGHT_KEY"
            )
        elif parts.query or parts.fragment:
            fault = "it must end with its path"
        elif any(parts.path.endswith(path) for path in _PATHS):
            fault = "give the gateway's URL, without a path of its API: the client adds it"
        else:
            httpx.URL(base).raw_host.decode().encode("idna")  # as it is to be resolved
    except (ValueError, httpx.InvalidURL) as error:
        fault = str(error)
    if fault:
        raise InvalidRequest(f"{_shown(url)!r} is no address of a gateway, such as {DEFAULT_URL}: {fault}")
    scheme, _, rest = base.partition(":")
    return f"{scheme.lower()}:{rest}"


def _shown(url: str) -> str:
    """Without what may be a password in it."""
    _, at, rest = url.rpartition("@")
    return f"...@{rest}" if at else url
