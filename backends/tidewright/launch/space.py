"""Room on a disk: asked for before much is written, and how to say that there was too little of it."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

from tidewright.launch.errors import LaunchError

_FULL = (errno.ENOSPC, errno.EDQUOT)


def nearest_existing(folder: Path) -> Path:
    """`folder`, or what is to hold it."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def free_bytes(folder: Path) -> int:
    """Of the file system that has `folder`, which need not exist yet."""
    return shutil.disk_usage(nearest_existing(folder)).free


def check_space(folder: Path, needed: int, what: str, hint: str, error: type[LaunchError]) -> None:
    """Raises `error`: there is not as much room as `what` needs."""
    free = free_bytes(folder)
    if free < needed:
        raise error(
            f"{what} needs {_mb(needed)} in {folder.parent}, but {_mb(free)} are free; free some space, or {hint}"
        )


def is_full(error: BaseException) -> bool:
    """Whether it comes of a full disk or a quota, whatever libraries made of it on the way."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, OSError) and found.errno in _FULL:
            return True
        found = found.__cause__ or found.__context__
    return False


def full(what: str, folder: Path, hint: str) -> str:
    """For a write that failed although there seemed to be room."""
    return (
        f"{what}: the disk that has {folder} is full ({_mb(free_bytes(folder))} are free); free some space, or {hint}"
    )


def _mb(count: int) -> str:
    return f"{count / 1e6:,.0f} MB"
