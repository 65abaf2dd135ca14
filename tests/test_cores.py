"""cores.py on trees of files as Linux shows them, of cgroups of both versions, in containers and out of them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tidewright.cores import cpu_quota, usable_cores, usable_threads

V2_MOUNT = "30 20 0:26 {top} /sys/fs/cgroup rw,nosuid - cgroup2 cgroup rw,nsdelegate"
V1_MOUNT = "32 31 0:29 {top} /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct"
MEMORY_MOUNT = "35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory"


def tree(root: Path, mounts: list[str], cgroup: str, files: dict[str, str]) -> Path:
    everything = {"proc/self/mountinfo": "\n".join(mounts), "proc/self/cgroup": cgroup}
    everything |= {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    for name, text in everything.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


@pytest.mark.parametrize(
    ("top", "path", "files", "cores"),
    [
        # In a container with its own namespace, the top is its cgroup.
        ("/", "/", {"cpu.max": "150000 100000"}, 1.5),
        ("/", "/", {"cpu.max": "max 100000"}, None),
        # A service of the host: the tightest of all that it is in.
        ("/", "/a/b", {"cpu.max": "max 100000", "a/cpu.max": "200000 100000", "a/b/cpu.max": "300000 100000"}, 2.0),
        ("/", "/a/b", {"a/cpu.max": "400000 100000", "a/b/cpu.max": "50000 100000"}, 0.5),
        # Docker without a namespace: the path is the host's, and what is mounted is the container's own.
        ("/docker/c1", "/docker/c1", {"cpu.max": "300000 200000"}, 1.5),
        # A process outside of its namespace's top.
        ("/", "/../other", {"cpu.max": "250000 100000"}, 2.5),
        # The path leads out of what is mounted.
        ("/docker/c1", "/docker/c2", {"cpu.max": "250000 100000", "../c2/cpu.max": "100000 100000"}, 2.5),
        # Another's quota does not count.
        ("/", "/a", {"b/cpu.max": "100000 100000", "a/cpu.max": "max 100000"}, None),
        ("/", "/", {"cpu.max": "nonsense"}, None),
        ("/", "/", {}, None),
    ],
)
def test_quota_of_version_2(tmp_path: Path, top: str, path: str, files: dict[str, str], cores: float | None) -> None:
    quota = cpu_quota(tree(tmp_path, [V2_MOUNT.format(top=top)], f"0::{path}", files))
    assert (quota.cores if quota else None) == cores


@pytest.mark.parametrize(
    ("quota", "cores"), [("150000", 1.5), ("-1", None), ("0", None)], ids=["a quota", "none", "not valid"]
)
def test_quota_of_version_1(tmp_path: Path, quota: str, cores: float | None) -> None:
    files = {
        "cpu,cpuacct/pods/one/cpu.cfs_quota_us": quota,
        "cpu,cpuacct/pods/one/cpu.cfs_period_us": "100000",
        "cpu,cpuacct/cpu.cfs_quota_us": "-1",
        "cpu,cpuacct/cpu.cfs_period_us": "100000",
        "memory/cpu.cfs_quota_us": "1000",  # not where this process is
        "memory/cpu.cfs_period_us": "100000",
    }
    cgroup = "4:memory:/\n2:cpu,cpuacct:/pods/one\n0::/"
    mounts = [MEMORY_MOUNT, V1_MOUNT.format(top="/"), V2_MOUNT.format(top="/")]
    found = cpu_quota(tree(tmp_path, mounts, cgroup, files))
    assert (found.cores if found else None) == cores


def test_what_the_quota_took(tmp_path: Path) -> None:
    new = tree(
        tmp_path / "new",
        [V2_MOUNT.format(top="/")],
        "0::/",
        {"cpu.max": "100000 100000", "cpu.stat": "usage_usec 9\nnr_throttled 2\nthrottled_usec 2500000"},
    )
    old = tree(
        tmp_path / "old",
        [V1_MOUNT.format(top="/")],
        "2:cpu,cpuacct:/",
        {
            "cpu,cpuacct/cpu.cfs_quota_us": "100000",
            "cpu,cpuacct/cpu.cfs_period_us": "100000",
            "cpu,cpuacct/cpu.stat": "nr_periods 4\nnr_throttled 2\nthrottled_time 1500000000",
        },
    )
    assert [quota.throttled() for quota in map(cpu_quota, (new, old)) if quota] == [2.5, 1.5]


def test_threads_are_what_affinity_and_quota_allow(tmp_path: Path) -> None:
    affinity = len(os.sched_getaffinity(0))
    assert usable_cores(tmp_path) == affinity  # nothing there to read
    plenty = tree(tmp_path / "plenty", [V2_MOUNT.format(top="/")], "0::/", {"cpu.max": "900000000 100000"})
    assert usable_cores(plenty) == affinity
    little = tree(tmp_path / "little", [V2_MOUNT.format(top="/")], "0::/", {"cpu.max": "60000 100000"})
    assert usable_cores(little) == 0.6
    assert usable_threads(root=little) == usable_threads(sharers=10**6) == 1
