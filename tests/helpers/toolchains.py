"""Runs the programs of other languages' toolchains, and fails a test with what they said."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

_SHOWN = 8000  # characters of each stream, at its end


def run(
    command: Sequence[str], folder: Path, environment: Mapping[str, str], timeout: float
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def passed(done: subprocess.CompletedProcess[str]) -> subprocess.CompletedProcess[str]:
    """The same; if it failed, so does the test."""
    if done.returncode:
        said = f"{done.stdout[-_SHOWN:]}\n{done.stderr[-_SHOWN:]}"
        pytest.fail(f"{' '.join(done.args)}\n{said}", pytrace=False)
    return done
