"""Folders that appear completely or not at all, and are made by one process at a time."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
from rich.console import Console


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to be filled, which takes the place of `target` in one rename when the block ends without an error.

    The caller holds the lock: leftovers are of dead runs.
    """
    partial, replaced = (target.with_name(f".{target.name}.{suffix}") for suffix in ("partial", "replaced"))
    for leftover in (partial, replaced):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        if target.exists():
            target.rename(replaced)
        partial.rename(target)
    finally:
        for leftover in (partial, replaced):
            shutil.rmtree(leftover, ignore_errors=True)


@contextmanager
def locked(target: Path, console: Console) -> Iterator[None]:
    """Hold the lock of `target`. The kernel frees it with its holder; the file stays: removing it races."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_name(f".{target.name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            console.print("Another tidewright is preparing this model; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def write_json(file: Path, value: msgspec.Struct) -> None:
    file.write_bytes(msgspec.json.format(msgspec.json.encode(value)) + b"\n")
