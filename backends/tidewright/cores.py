"""How many CPU threads this process may keep busy: its CPU affinity, and the CPU quota of its cgroups. No torch.

The host's number of cores is never asked for: in a container with a quota of two of 64 cores, 64 threads would use the
quota up in the first milliseconds of each period and stand still for the rest.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/")


@dataclass(frozen=True)
class Quota:
    """The tightest CPU limit of this process's cgroups."""

    cores: float
    stat: Path
    """The file that tells for how long it held threads up."""

    def throttled(self) -> float:
        """Seconds in which threads of the cgroup stood still by the quota, the sum over processors."""
        try:
            lines = self.stat.read_text().splitlines()
        except OSError:
            return 0.0
        figures = dict(line.split(maxsplit=1) for line in lines if " " in line)
        if "throttled_usec" in figures:  # version 2
            return int(figures["throttled_usec"]) / 1e6
        return int(figures.get("throttled_time", 0)) / 1e9


def usable_cores(root: Path = ROOT) -> float:
    """Processors that this process may use; with a quota it may be a fraction."""
    cores = float(len(os.sched_getaffinity(0)))
    quota = cpu_quota(root)
    return min(cores, quota.cores) if quota else cores


def usable_threads(sharers: int = 1, root: Path = ROOT) -> int:
    """Compute threads for each of `sharers` processes that divide what this one may use, at least 1."""
    return max(1, int(usable_cores(root) / sharers))


def cpu_quota(root: Path = ROOT) -> Quota | None:
    """Of this process's cgroup and all above it, version 1 or 2; None: there is no limit."""
    found = []
    for folder in cgroup_folders(root, "cpu"):
        limit = _limit(folder)
        if limit is not None:
            found.append(Quota(limit, folder / "cpu.stat"))
    return min(found, key=lambda quota: quota.cores, default=None)


def _limit(folder: Path) -> float | None:
    try:
        if (folder / "cpu.max").exists():  # version 2: "150000 100000" or "max 100000"
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota = (folder / "cpu.cfs_quota_us").read_text().strip()
            period = (folder / "cpu.cfs_period_us").read_text().strip()
        cores = int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):  # no such controller here, or "max"
        return None
    return cores if cores > 0 else None  # version 1 says -1 for none


def cgroup_folders(root: Path, controller: str) -> Iterator[Path]:
    """Folders of a controller, cpu or memory, from this process's own up to the top of what is mounted here."""
    for mount_root, mount_point, controllers in _mounts(root, controller):
        for path in _paths(root, controllers):
            # In a container the mount shows the container's own cgroup as its top, and the path may be the host's.
            inside = os.path.relpath(path, mount_root)
            top = root / mount_point.lstrip("/")
            folder = top if inside.startswith("..") else top / inside
            yield from (above for above in (folder, *folder.parents) if above == top or top in above.parents)


def _mounts(root: Path, controller: str) -> Iterator[tuple[str, str, str]]:
    """Of each mounted hierarchy with this controller: its top, where it is mounted, its name, or "" for version 2."""
    for line in _lines(root / "proc/self/mountinfo"):
        mount, _, filesystem = line.partition(" - ")
        fields, (kind, _, options) = mount.split(), (*filesystem.split(), "", "", "")[:3]
        if len(fields) > 4 and (kind == "cgroup2" or (kind == "cgroup" and controller in options.split(","))):
            yield fields[3], fields[4], "" if kind == "cgroup2" else controller


def _paths(root: Path, controllers: str) -> Iterator[str]:
    """Where this process is in the hierarchies of these controllers."""
    for line in _lines(root / "proc/self/cgroup"):
        _, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        if controllers in names.split(",") and path.startswith("/"):
            yield path


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except OSError:  # not Linux, or /proc is hidden
        return []
