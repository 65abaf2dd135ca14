"""Load tests, run as a user runs them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from helpers.needs import needs

PAUSE = 0.01  # seconds before each token of the echoing replica
TIMEOUT = 270  # seconds


class Done(NamedTuple):
    status: int
    words: str
    report: dict[str, Any]
    page: str


def load_test(folder: Path, *options: str, kind: str = "run") -> Done:
    """`python -m loadtests KIND`, to its end."""
    command = [sys.executable, "-m", "loadtests", kind, "--output", str(folder), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    data, page = folder / "report.json", folder / "report.html"
    report = json.loads(data.read_text()) if data.exists() else {}
    return Done(done.returncode, done.stdout + done.stderr, report, page.read_text() if page.exists() else "")


@needs("server")
def soak(folder: Path, *options: str) -> Done:
    """`python -m loadtests soak`, which starts two replicas and kills parts of them."""
    return _kill(folder, *options)


@needs("chaos")
def _kill(folder: Path, *options: str) -> Done:
    return load_test(folder, *options, kind="soak")
