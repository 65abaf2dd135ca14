"""launch/leftovers.py: what a dead server left goes, what a living one has stays."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tidewright.launch import leftovers
from tidewright.launch.leftovers import Leftovers, remove_those_of_the_dead


@pytest.fixture(autouse=True)
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "shm"
    folder.mkdir()
    monkeypatch.setattr(leftovers, "SHARED_MEMORY", folder)
    return folder


def region(of: str, memory: Path, name: str = "1") -> Path:
    made = memory / f"{of}{name}"
    made.write_bytes(b"x")
    return made


def test_a_living_servers_things_stay(memory: Path) -> None:
    own = Leftovers()
    its = region(own.region_prefix, memory)
    remove_those_of_the_dead()
    assert its.exists()
    assert own.folder.is_dir()
    own.remove()
    assert not any(memory.iterdir())
    assert not own.folder.exists()


def test_they_stay_as_long_as_one_of_its_processes_lives(memory: Path) -> None:
    own = Leftovers()
    its = region(own.region_prefix, memory)
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[own.lock.fileno()])
    own.lock.close()  # the server itself is gone
    remove_those_of_the_dead()
    assert its.exists()
    assert own.folder.exists()
    child.communicate(b"\n")
    remove_those_of_the_dead()
    assert not any(memory.iterdir())
    assert not own.folder.exists()


def test_a_killed_servers_things_go_and_nothing_else(memory: Path, tmp_path: Path) -> None:
    code = (
        "import os, signal; from pathlib import Path; from tidewright.launch import leftovers\n"
        f"leftovers.SHARED_MEMORY = Path({str(memory)!r})\n"
        "made = leftovers.Leftovers()\n"
        "(leftovers.SHARED_MEMORY / f'{made.region_prefix}a').touch()\n"
        "print(made.folder, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    folder = Path(subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True).stdout.strip())
    others = [region("tidewright_1_abc_", memory), region("triton_python_backend_shm_region_", memory)]
    assert folder.is_dir()
    remove_those_of_the_dead()
    assert sorted(memory.iterdir()) == sorted(others)
    assert not folder.exists()


def test_a_folder_that_is_not_the_servers_is_never_removed(memory: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    lock = memory / "tidewright_1_abc_.lock"
    for text in (str(precious), "", "/"):
        lock.write_text(text)
        remove_those_of_the_dead()
        assert precious.is_dir()
        assert not lock.exists()


def test_only_its_own_regions_can_be_removed(memory: Path) -> None:
    own = Leftovers()
    its, other = region(own.region_prefix, memory), region("tidewright_1_abc_", memory)
    own.remove_region(other.name)
    own.remove_region(its.name)
    own.remove_region(its.name)
    assert other.exists()
    assert not its.exists()
    own.remove()
