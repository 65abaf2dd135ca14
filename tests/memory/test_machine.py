"""memory/machine.py on trees of files as Linux shows them: the tightest limit of all cgroups counts."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from tidewright.memory.machine import MachineMemory, machine_memory

V2 = "30 20 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup rw,nsdelegate"
V1 = "35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory"
MEMINFO = "MemTotal:       1000 kB\nMemFree:         100 kB\nMemAvailable:    600 kB\nHugePages_Total:    0\n"
KIB = 1024


def tree(root: Path, mount: str, cgroup: str, files: dict[str, str]) -> Path:
    everything = {"proc/self/mountinfo": mount, "proc/self/cgroup": cgroup, "proc/meminfo": MEMINFO}
    everything |= {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    for name, text in everything.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


@pytest.mark.parametrize(
    ("files", "total", "free"),
    [
        ({}, 1000, 600),
        ({"memory.max": "max", "memory.current": "5"}, 1000, 600),
        # Caches of files are as good as free, also of those that were used lately.
        ({"memory.max": "409600", "memory.current": "204800", "memory.stat": "anon 5\ninactive_file 51200"}, 400, 250),
        (
            {
                "memory.max": "409600",
                "memory.current": "409600",
                "memory.stat": "inactive_anon 7\ninactive_file 51200\nactive_file 102400",
            },
            400,
            150,
        ),
        # Its own cgroup has room, the one above has less.
        (
            {
                **{"memory.max": "512000", "memory.current": "409600"},
                **{"a/memory.max": "307200", "a/memory.current": "102400"},
            },
            300,
            100,
        ),
        ({"memory.max": "102400", "memory.current": "204800"}, 100, 0),
        ({"memory.max": "nonsense", "memory.current": "5"}, 1000, 600),
    ],
)
def test_version_2(tmp_path: Path, files: dict[str, str], total: int, free: int) -> None:
    assert machine_memory(tree(tmp_path, V2, "0::/a", files)) == MachineMemory(total * KIB, free * KIB)


def test_version_1(tmp_path: Path) -> None:
    files = {
        "memory/pod/memory.limit_in_bytes": "409600",
        "memory/pod/memory.usage_in_bytes": "307200",
        "memory/pod/memory.stat": "inactive_file 1\ntotal_inactive_file 5120\ntotal_active_file 5120",
        "memory/memory.limit_in_bytes": "9223372036854771712",  # none
        "memory/memory.usage_in_bytes": "512000",
    }
    found = machine_memory(tree(tmp_path, V1, "4:memory:/pod\n0::/", files))
    assert found == MachineMemory(400 * KIB, 110 * KIB)


def test_of_this_machine() -> None:
    found = machine_memory()
    assert 0 < found.free <= found.total <= psutil.virtual_memory().total
