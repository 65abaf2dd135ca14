"""What a server leaves outside of its processes: a folder, and shared memory. Found again when its owner is gone.

Both bear the server's name, and a file beside the shared memory is locked as long as one of its processes lives. A
process id would not do: containers may share /dev/shm, and each has its own numbers.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path
from typing import IO

SHARED_MEMORY = Path("/dev/shm")
_PREFIX = "tidewright_"
_LOCK = ".lock"


class Leftovers:
    """Of one server; `lock` is to be inherited by its processes."""

    def __init__(self) -> None:
        self.region_prefix = f"{_PREFIX}{os.getpid()}_{os.urandom(3).hex()}_"
        self.folder = Path(tempfile.mkdtemp(prefix=f"{self.region_prefix.rstrip('_')}-"))
        lock_file = SHARED_MEMORY / f"{self.region_prefix}{_LOCK}"
        new = lock_file.with_suffix(".new")  # nobody may find it before it is locked
        self.lock: IO[str] = new.open("w")
        fcntl.flock(self.lock, fcntl.LOCK_EX)
        self.lock.write(str(self.folder))
        self.lock.flush()
        new.rename(lock_file)

    def remove_region(self, name: str) -> None:
        """Of a process that is gone."""
        if name.startswith(self.region_prefix):
            (SHARED_MEMORY / name).unlink(missing_ok=True)

    def remove(self) -> None:
        """All of it, once the processes have ended."""
        _remove(self.region_prefix, self.folder)
        self.lock.close()


def remove_those_of_the_dead() -> None:
    """What is left of this user's servers of which no process lives, as after a SIGKILL."""
    for lock_file in SHARED_MEMORY.glob(f"{_PREFIX}*{_LOCK}"):
        # Whatever is in the way: it is not worth failing for, and the next start tries again.
        with contextlib.suppress(OSError), lock_file.open("r+") as lock:
            if os.fstat(lock.fileno()).st_uid != os.getuid():
                continue
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            prefix, folder = lock_file.name.removesuffix(_LOCK), Path(lock.read())
            _remove(prefix, folder if folder.name.startswith(prefix.rstrip("_")) else None)


def _remove(prefix: str, folder: Path | None) -> None:
    """The lock's file last: it tells where the rest is."""
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)
    for region in sorted(SHARED_MEMORY.glob(f"{prefix}*"), key=lambda region: region.name.endswith(_LOCK)):
        region.unlink(missing_ok=True)
