"""A gateway that asks for API keys, with one that is good and one that has expired."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path

from helpers.api_keys import add
from helpers.gateway import RunningGateway
from helpers.triton import RunningServer
from tidewright_gateway.auth.stores import FileStore


@dataclass(frozen=True)
class Keyed:
    url: str
    key: str
    expired: str


@contextmanager
def keyed_gateway(model_dir: Path, server: RunningServer, folder: Path) -> Iterator[Keyed]:
    store = FileStore(folder / "keys.yaml")
    key = add(store, "alice")
    expired = add(store, "bob", expires=datetime.now(timezone.utc) - timedelta(days=1))
    with RunningGateway(model_dir, server, keys=folder / "keys.yaml") as running:
        yield Keyed(running.url, key, expired)
