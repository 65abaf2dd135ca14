"""devices/cuda/kernel_cache.py: kernels are kept where that is possible, and a start never fails over it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tidewright.devices.cuda.kernel_cache import keep_kernels


def test_kernels_are_kept_in_the_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIDEWRIGHT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TRITON_CACHE_DIR", "/elsewhere")
    keep_kernels()
    assert os.environ["TRITON_CACHE_DIR"] == "/elsewhere"
    monkeypatch.setenv("TRITON_CACHE_DIR", "")
    keep_kernels()
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / "cache" / "triton")
    assert not [*(tmp_path / "cache" / "triton").iterdir()]


def test_a_cache_that_cannot_be_written_costs_only_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TIDEWRIGHT_CACHE", str(tmp_path / "file"))
    monkeypatch.setenv("TRITON_CACHE_DIR", "")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    keep_kernels()
    folder = Path(os.environ["TRITON_CACHE_DIR"])
    assert (folder.parent, folder.is_dir()) == (tmp_path, True)
    assert "compiled at every start" in caplog.text
