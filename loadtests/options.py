"""What a load test is to do: what cli.py gathers, and locust's processes get as JSON in an environment variable."""

from __future__ import annotations

import os
from collections.abc import Mapping

import msgspec

VARIABLE = "TIDEWRIGHT_LOADTEST"
STOP = ".stop"
"""Suffix of the file beside the samples that asks locust to end."""
PROTOCOLS = ("http", "websocket", "grpc")


class Options(msgspec.Struct, frozen=True, kw_only=True):
    url: str = "http://127.0.0.1:8080"
    """Of the gateway."""
    grpc: str = ""
    """HOST:PORT of a Triton, for the protocol grpc."""
    model: str = ""
    """Empty: the one that the gateway lists."""
    triton_model: str = "decoder"
    protocols: Mapping[str, int] = msgspec.field(default_factory=lambda: {"http": 1})
    """And how many users each has, for one of the others."""
    keys: tuple[str, ...] = ("",)
    """API keys; each is a tenant."""
    mix: str = "mixed"
    scale: float = 1.0
    max_prompt: int = 1 << 20
    max_answer: int = 1 << 20
    fixed: tuple[int, int] | None = None
    """Tokens in and out of every request, in place of the mix."""
    requests: int = 0
    """After so many the test ends; 0: only after its time. One process makes them."""
    shape: str = "steady"
    users: int = 8
    duration: float = 60.0
    think: float = 0.0
    """Seconds between two requests of a user, on average."""
    cancel_share: float = 0.0
    """Of the requests: the client leaves in the middle."""
    silence: float = 60.0
    """Seconds without a byte after which a stream is given up as one without an end."""
    give_up: float = 30.0
    """Seconds in which every request failed, after which the test ends."""
    seed: int = 0
    samples: str = ""
    """The file that they are written to."""

    def environment(self) -> dict[str, str]:
        return {**os.environ, VARIABLE: msgspec.json.encode(self).decode()}

    def shown(self) -> dict[str, object]:
        """For the report: without the keys, which are secret."""
        fields = msgspec.to_builtins(self)
        return {**fields, "keys": len(self.keys), "samples": ""}

    @property
    def tenants(self) -> list[str]:
        """Names that stand for the keys in reports."""
        return [f"tenant {number}" for number in range(1, len(self.keys) + 1)]


def given() -> Options:
    """Those in the environment, or the defaults."""
    return msgspec.json.decode(os.environ.get(VARIABLE, "{}"), type=Options)
