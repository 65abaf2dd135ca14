"""A Python process that is killed in the middle of its work."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path


def run_until_killed(code: str, file: Path) -> None:
    """Runs `code`, and ends it with SIGKILL as soon as it has made `file`."""
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 180  # it imports torch first, on a machine that does much else as well
    while not file.exists():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
