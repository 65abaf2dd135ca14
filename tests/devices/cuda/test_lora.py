"""devices/cuda/lora.py, interpreted on the CPU, against numpy in float64; and an engine's logits against PEFT's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from helpers.adapter_rows import adapter_rows
from helpers.adapters import save_adapter
from helpers.checkpoints import engine_config, logits, prompt, save
from helpers.families import FAMILIES
from helpers.interpreted import interpreted
from helpers.low_rank import DEPTH, FEATURES, MOST_RANK, SLOTS, TOLERANCE, expected, fill, updates
from tidewright.devices.cpu.memory import CpuMemory
from tidewright.engine import model_runner
from tidewright.engine.model_runner import ModelRunner

with interpreted():
    from tidewright.devices.cuda.device import CudaDevice
    from tidewright.devices.cuda.lora import CudaLora


def layer(dtype: torch.dtype) -> CudaLora:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return CudaLora(FEATURES, DEPTH, SLOTS, MOST_RANK + 20)
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_each_row_gets_what_its_adapter_adds_and_is_its_own(dtype: torch.dtype) -> None:
    made, lora = updates(dtype), layer(dtype)
    for matrix in (lora.a_SPRE, lora.b_SRF):
        matrix.fill_(float("nan"))  # what was there before
    fill(lora, made)
    slots = [-1, 0, 2, 0, -1, 1, 2, *[1] * 18]
    x, y = torch.randn(len(slots), DEPTH).to(dtype), torch.randn(len(slots), sum(FEATURES)).to(dtype)
    wanted, before = expected(x, y, slots, made), y.clone()
    lora.add(x, y, adapter_rows(slots))
    np.testing.assert_allclose(y.double().numpy(), wanted, rtol=TOLERANCE[dtype], atol=10 * TOLERANCE[dtype])
    for row in (0, 2, 5, 24):
        alone = before[row : row + 1].clone()
        if slots[row] >= 0:
            lora.add(x[row : row + 1], alone, adapter_rows([slots[row]]))
        assert torch.equal(alone[0], y[row])
    lora.clear(1)
    after = y.clone()
    lora.add(x, y, adapter_rows([slot if slot == 1 else -1 for slot in slots]))
    assert torch.equal(after, y)


def test_a_model_s_logits_are_peft_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save(tmp_path / "model", FAMILIES["qwen 3"])
    oracle = save_adapter(model, tmp_path / "adapter", scale=0.3)
    device = CudaDevice(torch.device("cpu"), CpuMemory())
    monkeypatch.setattr(model_runner, "make_device", lambda *_, **__: device)
    runner = ModelRunner(engine_config(tmp_path / "model", block_size=16, adapter_folder=str(tmp_path), max_adapters=2))
    runner.add_adapter("a", runner.read_adapter("adapter"))
    runner._lora.put(1, "a")
    ids = prompt(7, seed=1)
    with torch.inference_mode():
        wanted = oracle(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(logits(runner, ids, chunk=5, adapter=1), wanted, rtol=1e-4, atol=1e-3)
