"""The fallback is there for when the GPU is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from tidewright.config import Settings


@pytest.mark.parametrize(("device", "runs_on"), [("auto", "cpu"), ("cpu", "cpu"), ("cuda", "cuda")])
def test_auto_is_the_cpu(device: str, runs_on: str) -> None:
    assert Settings(fallback_device=device).fallback_engine_config(Path("x")).device == runs_on  # type: ignore[arg-type]
