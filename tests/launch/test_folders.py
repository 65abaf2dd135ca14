"""A folder is replaced whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from tidewright.launch.folders import new_folder, put_in_place


def test_what_can_not_be_replaced_stays(tmp_path: Path) -> None:
    target = tmp_path / "model"
    for text in ("old", "new"):
        with new_folder(target) as folder:
            (folder / "file").write_text(text)
    assert [path.read_text() for path in tmp_path.rglob("*") if path.is_file()] == ["new"]
    with pytest.raises(FileNotFoundError):
        put_in_place(tmp_path / "not there", target)
    assert [path.read_text() for path in tmp_path.rglob("*") if path.is_file()] == ["new"]
