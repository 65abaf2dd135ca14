"""How much memory this process may have, and how much is free: the machine's, or less by the limits of its cgroups."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from tidewright.cores import ROOT, cgroup_folders


@dataclass(frozen=True)
class MachineMemory:
    """Bytes."""

    total: int
    free: int
    """That can be had without swapping; caches of files count as free."""


def machine_memory(root: Path = ROOT) -> MachineMemory:
    """The tightest limit counts. Zero where there is no /proc."""
    total, free = _machine(root)
    for folder in cgroup_folders(root, "memory"):
        found = _cgroup(folder)
        if found and found.total < total:
            total = found.total
        if found:
            free = min(free, found.free)
    return MachineMemory(total, max(free, 0))


def _machine(root: Path) -> tuple[int, int]:
    figures = _figures(root / "proc/meminfo")
    return figures.get("MemTotal:", 0) * 1024, figures.get("MemAvailable:", 0) * 1024


def _cgroup(folder: Path) -> MachineMemory | None:
    """None: there is no limit."""
    is_new = (folder / "memory.max").exists()
    limit = _number(folder / ("memory.max" if is_new else "memory.limit_in_bytes"))
    used = _number(folder / ("memory.current" if is_new else "memory.usage_in_bytes"))
    if limit is None or used is None:
        return None
    # The active ones as well, as in MemAvailable: of a model's files, read twice, most are, and they give way likewise.
    figures, prefix = _figures(folder / "memory.stat"), "" if is_new else "total_"
    caches = sum(figures.get(f"{prefix}{kind}_file", 0) for kind in ("inactive", "active"))
    return MachineMemory(limit, limit - used + caches)


def _number(file: Path) -> int | None:
    with contextlib.suppress(OSError, ValueError):  # no such controller here, or "max"
        return int(file.read_text())
    return None


def _figures(file: Path) -> dict[str, int]:
    with contextlib.suppress(OSError, ValueError):
        lines = [line.split() for line in file.read_text().splitlines()]
        return {fields[0]: int(fields[1]) for fields in lines if len(fields) > 1}
    return {}
