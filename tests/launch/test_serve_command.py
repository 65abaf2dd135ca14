"""What `tidewright serve` tells people to type."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tidewright.launch.serve_command import _own_name


def test_the_command_is_named_as_another_terminal_finds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, other = tmp_path / ".venv/bin/tidewright", tmp_path / "bin/tidewright"
    for path in (own, other):
        path.parent.mkdir(parents=True)
        path.touch(mode=0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [".venv/bin/tidewright", "serve"])
    for folders, name in (
        (own.parent, "tidewright"),
        (other.parent, ".venv/bin/tidewright"),
        ("/none", ".venv/bin/tidewright"),
    ):
        monkeypatch.setenv("PATH", str(folders))
        assert _own_name() == name
    monkeypatch.setattr(sys, "argv", ["tidewright", "serve"])  # not a path: the shell found it
    assert _own_name() == "tidewright"
