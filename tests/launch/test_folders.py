"""A folder is replaced whole or not at all."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from rich.console import Console

from tidewright.launch.folders import locked, new_folder, put_in_place


def test_what_can_not_be_replaced_stays(tmp_path: Path) -> None:
    target = tmp_path / "model"
    for text in ("old", "new"):
        with new_folder(target) as folder:
            (folder / "file").write_text(text)
    assert [path.read_text() for path in tmp_path.rglob("*") if path.is_file()] == ["new"]
    with pytest.raises(FileNotFoundError):
        put_in_place(tmp_path / "not there", target)
    assert [path.read_text() for path in tmp_path.rglob("*") if path.is_file()] == ["new"]


def test_a_lock_leaves_no_file_and_one_holds_it_at_a_time(tmp_path: Path) -> None:
    target, inside, most = tmp_path / "model", 0, 0

    def work(_: int) -> None:
        nonlocal inside, most
        with locked(target, Console(quiet=True)):
            inside += 1
            most = max(most, inside)
            time.sleep(0.001)
            inside -= 1

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(work, range(100)))
    assert (most, list(tmp_path.iterdir())) == (1, [])
