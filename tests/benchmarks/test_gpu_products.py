"""benchmarks/gpu_products.py: its dry run, by the kernels' interpreter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers.interpreted import interpreted

with interpreted():
    from tidewright.devices.cuda import quantized_weight  # noqa: F401 - the benchmark imports it when it runs

from benchmarks import gpu_products


def test_a_dry_run_measures_each_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    gpu_products.main([str(tmp_path / "figures.json"), "--dry-run"])
    figures = {one["label"]: one["value"] for one in json.loads((tmp_path / "figures.json").read_text())}
    assert figures.pop("fp8") == "this GPU has no such product"
    for name in ("16 bits", "int8", "w8a8", "int4-g64", "int4-g128"):
        for rows in (1, 40):
            assert figures[f"{name}, {rows} rows: share of that bandwidth"] > 0
            assert figures[f"{name}, {rows} rows: largest error, of the largest value"] < (2 if name == "w8a8" else 0.3)
