"""Python environments of their own for programs whose dependencies contradict ours, made once in the cache folder.

The folder is named by a hash of what is to be installed: a changed list of pins makes a new one.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

Install = Callable[[Path, Path], None]


def made(pins: Path, parent: Path, install: Install) -> Path:
    """The folder below `parent` into which `install(folder, pins)` put all; one process makes it, others wait."""
    version = ".".join(map(str, sys.version_info[:2]))
    key = hashlib.sha256(version.encode() + pins.read_bytes()).hexdigest()[:12]
    folder = parent / f"{pins.stem}-{key}"
    with _lock(folder):
        if not (folder / "complete").exists():
            shutil.rmtree(folder, ignore_errors=True)  # what an interrupted run left
            install(folder, pins)
            (folder / "complete").touch()
    return folder


def install_with_pip(folder: Path, pins: Path) -> None:
    run([sys.executable, "-m", "venv", str(folder)])
    pip = [str(python_of(folder)), "-m", "pip", "--disable-pip-version-check", "--quiet"]
    run([*pip, "install", "--requirement", str(pins)])


def python_of(folder: Path) -> Path:
    return folder / "bin" / "python"


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{folder}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
