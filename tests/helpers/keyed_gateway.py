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
from tidewright_gateway.auth.callers import Role
from tidewright_gateway.auth.stores import FileStore


@dataclass(frozen=True)
class Keyed:
    gateway: RunningGateway
    key: str
    """Of an admin, who may read the metrics."""
    expired: str


@contextmanager
def keyed_gateway(model_dir: Path, server: RunningServer, folder: Path) -> Iterator[Keyed]:
    store = FileStore(folder / "keys.yaml")
    key = add(store, "alice", role=Role.ADMIN)
    expired = add(store, "bob", expires=datetime.now(timezone.utc) - timedelta(days=1))
    with RunningGateway(model_dir, server, keys=folder / "keys.yaml") as running:
        running.http.headers["Authorization"] = f"Bearer {key}"
        yield Keyed(running, key, expired)
