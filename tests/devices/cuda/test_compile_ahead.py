"""Every kernel compiles for sm_80, sm_90 and sm_100: no spills, shared memory within the card's, rounding as asked."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_kernels_compile_for_each_architecture() -> None:
    """In a process of its own, because this one may interpret kernels. The command fails if a kernel does not fit."""
    command = [sys.executable, "-m", "benchmarks.gpu_kernels", "--tested"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    lines = done.stdout.splitlines()[1:]
    for arch in ("sm_80", "sm_90", "sm_100"):
        found = {line[:20].strip() for line in lines if arch in line.split()}
        assert {"attention: decode", "attention: combine", "attention: prefill"} <= found
        assert {"rope and cache", "rms norm", "activation"} <= found
        assert {f"sampling: {name}" for name in ("penalise", "weigh", "truncate", "race", "pick", "count")} <= found
        assert {"lora: shrink", "lora: expand"} <= found
        assert {f"quantized: {name}" for name in ("product", "sum", "tokens", "read")} <= found
