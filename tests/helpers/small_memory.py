"""A cgroup with a limit of memory of its own, for a process that a test starts."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tidewright.cores import ROOT, cgroup_folders


@dataclass(frozen=True)
class SmallMemory:
    folder: Path

    def take(self, pid: int) -> None:
        (self.folder / "cgroup.procs").write_text(str(pid))

    def leave(self, size: int) -> None:
        """Limit it to so many bytes more than it has now; caches of files give way."""
        used = int(self._file("current", "usage_in_bytes").read_text())
        lines = (line.split() for line in (self.folder / "memory.stat").read_text().splitlines())
        figures, prefix = dict(lines), "total_" if self._is_v1 else ""
        caches = sum(int(figures[f"{prefix}{kind}_file"]) for kind in ("inactive", "active"))
        self._file("max", "limit_in_bytes").write_text(str(used - caches + size))

    @property
    def counts(self) -> bool:
        return self._file("current", "usage_in_bytes").exists()

    @property
    def _is_v1(self) -> bool:
        return (self.folder / "memory.usage_in_bytes").exists()

    def _file(self, new: str, old: str) -> Path:
        return self.folder / f"memory.{old if self._is_v1 else new}"


@contextlib.contextmanager
def small_memory() -> Iterator[SmallMemory]:
    """Skips the test where none can be made: that takes root, and a hierarchy that may be written to."""
    parent = next(cgroup_folders(ROOT, "memory"), None)
    if parent is None:
        pytest.skip("no hierarchy of cgroups counts memory here")
    folder = parent / f"tidewright-test-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"cgroups can't be made here: {error}")
    try:
        made = SmallMemory(folder)
        if not made.counts:
            pytest.skip("a cgroup of its own does not count memory here")
        yield made
    finally:
        for _ in range(50):  # until its last process is gone
            with contextlib.suppress(OSError):
                folder.rmdir()
                break
            time.sleep(0.1)
