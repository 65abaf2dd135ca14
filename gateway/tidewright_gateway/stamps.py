"""Tells whether files have changed, also behind a link that was swapped, as Kubernetes does with its mounts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

Stamp = tuple[tuple[int, int], ...]


def stamp(*files: str) -> Stamp:
    """Another one after each change of one of them; files without a name are left out."""
    found = []
    for file in filter(None, files):
        try:
            status = Path(file).stat()
            found.append((status.st_mtime_ns, status.st_ino))
        except OSError:
            found.append((0, 0))
    return tuple(found)


async def changes(seen: Stamp, interval: float, *files: str) -> AsyncIterator[None]:
    """For ever: an item after each change since `seen`, looked for every `interval` seconds."""
    while True:
        await asyncio.sleep(interval)
        now = stamp(*files)
        if now != seen:
            seen = now
            yield
