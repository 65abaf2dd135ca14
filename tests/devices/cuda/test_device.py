"""The engine's steps on devices/cuda/device.py, with interpreted kernels, against transformers in float32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from helpers.checkpoints import engine_config, expected, greedy, logits, prompt, save
from helpers.families import FAMILIES
from helpers.interpreted import interpreted
from tidewright.attention.reference import ReferenceAttention
from tidewright.devices import registry
from tidewright.devices.base import Device, DeviceError
from tidewright.devices.cpu.memory import CpuMemory
from tidewright.engine import model_runner
from tidewright.engine.model_runner import ModelRunner

with interpreted():
    from tidewright.devices.cuda.device import CudaDevice


@pytest.mark.parametrize("name", ["llama, tied", "qwen 3", "gemma 2", "gemma 3"])
def test_families_as_transformers_computes_them(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save(tmp_path, FAMILIES[name])
    device = CudaDevice(torch.device("cpu"), CpuMemory())
    monkeypatch.setattr(model_runner, "make_device", lambda *_, **__: device)
    runner = ModelRunner(engine_config(tmp_path, block_size=16))
    assert runner.device is device
    ids = prompt(40, seed=1)
    with torch.inference_mode():
        wanted_TV = model(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(logits(runner, ids, chunk=25), wanted_TV, rtol=1e-4, atol=1e-4)
    prompts = [prompt(length, seed=length) for length in (5, 30)]
    assert greedy(runner, prompts, 3, chunk=16) == [expected(model, ids, 3) for ids in prompts]


def test_a_gpu_computes_with_the_kernels_where_they_take_the_model(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)

    def made(attention: str, head_dim: int) -> Device:
        return registry.make_device("cuda:1", attention, 16, torch.bfloat16, head_dim)

    assert isinstance(device := made("auto", 64), CudaDevice)
    assert [device.torch_device] == current == [torch.device("cuda:1")]
    assert isinstance(made("reference", 64).attention, ReferenceAttention)
    assert not caplog.messages
    assert isinstance(made("auto", 320).attention, ReferenceAttention)
    assert "even head sizes up to 256, not 320" in caplog.text
    monkeypatch.setattr(registry, "find_spec", lambda name: None)
    with pytest.raises(DeviceError, match=r"needs PyPI's triton \(pip install tidewright\[gpu\]\); choose 'auto'"):
        made("native", 64)
    with pytest.raises(DeviceError, match="torch sees 2 GPUs"):
        registry.make_device("cuda:2", "auto", 16, torch.bfloat16, 64)
