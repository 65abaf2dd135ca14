"""A cache of models that is a test's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tidewright.cache import cache_dir


def use_own_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the compiled kernels, for which a compiler computes for most of a minute, is its own."""
    kernels = cache_dir() / "kernels"
    kernels.mkdir(parents=True, exist_ok=True)
    folder.mkdir()
    (folder / "kernels").symlink_to(kernels)
    monkeypatch.setenv("TIDEWRIGHT_CACHE", str(folder))
