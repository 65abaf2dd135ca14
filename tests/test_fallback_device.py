"""The fallback is there for when the GPU is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from tidewright.config import Settings
from tidewright.onnx_export import session


@pytest.mark.parametrize(("device", "runs_on"), [("auto", "cpu"), ("cpu", "cpu"), ("cuda", "cuda")])
def test_auto_is_the_cpu(device: str, runs_on: str) -> None:
    assert Settings(fallback_device=device).fallback_engine_config(Path("x")).device == runs_on  # type: ignore[arg-type]


@pytest.mark.parametrize(("device", "providers"), [("auto", ["CPU"]), ("cpu", ["CPU"]), ("cuda", ["CUDA", "CPU"])])
def test_onnxruntime_takes_no_gpu_unless_told(
    monkeypatch: pytest.MonkeyPatch, device: str, providers: list[str]
) -> None:
    """Also where it could, and the main model computes on one."""
    asked: list[list[str]] = []

    def refuse(*_: object, providers: list[str]) -> None:
        asked.append([name.removesuffix("ExecutionProvider") for name in providers])
        raise RuntimeError("no model")

    names = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(session.onnxruntime, "get_available_providers", lambda: names)
    monkeypatch.setattr(session.onnxruntime, "InferenceSession", refuse)
    settings = Settings(device="cuda:1", fallback_device=device)  # type: ignore[arg-type]
    with pytest.raises(session.OnnxModelError):
        session.OnnxDecoder(Path("x"), 1, settings.fallback_engine_config(Path("x")).device)
    assert asked == [providers]
