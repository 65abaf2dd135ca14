"""Shell commands with a file system of their own, of any size: a mount that no other process sees."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

TIDEWRIGHT = f"{shlex.quote(sys.executable)} -c 'from tidewright.launch.cli import main; main()'"


def run_on_small_disk(folder: Path, size: str, script: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """`script` with a tmpfs of `size` at `folder`, which `resize SIZE` and `read_only` change. `tidewright` works."""
    folder.mkdir(exist_ok=True)
    quoted = shlex.quote(str(folder))
    prelude = (
        f"mount -t tmpfs -o size={size} none {quoted} || exit 99\n"
        f'tidewright() {{ {TIDEWRIGHT} "$@"; }}\n'
        f"resize() {{ mount -o remount,size=$1 {quoted}; }}\n"
        f"read_only() {{ mount -o remount,ro {quoted}; }}\n"
    )
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", prelude + script],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "TIDEWRIGHT_CACHE": str(folder), **variables},
    )
    if done.returncode == 99 or "unshare failed" in done.stderr:
        pytest.skip(f"this machine allows no mounts of one's own: {done.stderr.strip()}")
    return done
