"""Folders that appear completely or not at all, and are made by one process at a time."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import msgspec
from rich.console import Console


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to be filled, which takes the place of `target` in one rename when the block ends without an error.

    The caller holds the lock: leftovers are of dead runs.
    """
    partial = target.with_name(f".{target.name}.partial")
    for leftover in (partial, _replaced(target)):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        put_in_place(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _replaced(target: Path) -> Path:
    return target.with_name(f".{target.name}.replaced")


def put_in_place(partial: Path, target: Path) -> None:
    """Of what is at `target`, which goes; at no time half of either is there. The caller holds the lock."""
    replaced = _replaced(target)
    shutil.rmtree(replaced, ignore_errors=True)
    try:
        if target.exists():
            target.rename(replaced)
        try:
            partial.rename(target)
        except OSError:
            if replaced.exists():
                replaced.rename(target)
            raise
    finally:
        shutil.rmtree(replaced, ignore_errors=True)


@contextmanager
def locked(target: Path, console: Console) -> Iterator[None]:
    """Hold the lock of `target`, a file beside it. The kernel frees it with its holder, which removes the file."""
    target.parent.mkdir(parents=True, exist_ok=True)
    path = target.with_name(f".{target.name}.lock")
    while True:
        with path.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                console.print("Another tidewright is preparing this model; waiting for it")
                fcntl.flock(file, fcntl.LOCK_EX)
            if not _is_at(path, file):  # removed by the one before, and perhaps made again by another
                continue
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def _is_at(path: Path, file: IO[str]) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def write_json(file: Path, value: msgspec.Struct) -> None:
    file.write_bytes(msgspec.json.format(msgspec.json.encode(value)) + b"\n")
