"""Logits with adapters against PEFT's in float32: each target module, scaling and family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from helpers.adapters import ALL, save_adapter
from helpers.checkpoints import engine_config, logits, prompt, save
from helpers.families import FAMILIES
from tidewright.engine.model_runner import ModelRunner
from tidewright.lora import checkpoint
from tidewright.lora.config import AdapterError

IDS = prompt(23, seed=1)
OPTIONS: dict[str, dict[str, Any]] = {
    **{target: {"target_modules": [target]} for target in ALL},
    "all": {},
    "rank-stabilized": {"use_rslora": True, "r": 5},
    "all-linear": {"target_modules": "all-linear", "r": 1},
    "pattern": {"target_modules": r".*\.(q_proj|up_proj)"},
    "some layers": {"target_modules": ["v_proj", "down_proj"], "layers_to_transform": [0, 2]},
    "ranks": {
        "rank_pattern": {"q_proj": 7, "layers.1.mlp.up_proj": 2},
        "alpha_pattern": {"^model.layers.0.mlp.down_proj": 3},
    },
}


def runner_of(folder: Path, **changes: Any) -> ModelRunner:
    return ModelRunner(engine_config(folder / "model", adapter_folder=str(folder), max_adapters=2, **changes))


def with_adapter(runner: ModelRunner, path: str, chunk: int = 9) -> torch.Tensor:
    runner.add_adapter(path, runner.read_adapter(path))
    runner._lora.put(1, path)
    found = logits(runner, IDS, chunk, adapter=1)
    runner.drop_adapter(path)
    return found


def by_peft(model: peft.PeftModel) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([IDS])).logits[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def model(folder: Path) -> transformers.PreTrainedModel:
    return save(folder / "model", FAMILIES["llama, tied"])


@pytest.fixture(scope="module")
def runner(folder: Path, model: transformers.PreTrainedModel) -> ModelRunner:
    return runner_of(folder)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_logits_are_peft_s(
    folder: Path, model: transformers.PreTrainedModel, runner: ModelRunner, options: dict[str, Any], request: Any
) -> None:
    name = request.node.callspec.id
    wanted = by_peft(save_adapter(model, folder / name, **options))
    before = logits(runner, IDS, 9)
    torch.testing.assert_close(with_adapter(runner, name), wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(before, wanted, atol=1e-2)
    assert torch.equal(logits(runner, IDS, 9), before)


@pytest.mark.parametrize("family", ["llama, biases", "qwen 3", "gemma 3"])
def test_of_each_family(tmp_path: Path, family: str) -> None:
    model = save(tmp_path / "model", FAMILIES[family])
    wanted = by_peft(save_adapter(model, tmp_path / "adapter", scale=0.3))
    torch.testing.assert_close(with_adapter(runner_of(tmp_path), "adapter"), wanted, rtol=1e-3, atol=1e-3)


def test_without_our_attention_layers_run_one_by_one(folder: Path, model: transformers.PreTrainedModel) -> None:
    wanted = by_peft(save_adapter(model, folder / "one by one"))
    found = with_adapter(runner_of(folder, attention="reference"), "one by one")
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_on_quantized_weights_the_adapter_adds_the_same(folder: Path, model: transformers.PreTrainedModel) -> None:
    """The adapter changes the logits by about what it changes those of the plain weights by."""
    wanted = by_peft(save_adapter(model, folder / "quantized", scale=0.3))
    runner = runner_of(folder, quantization="int8")
    with torch.inference_mode():
        base = model(torch.tensor([IDS])).logits[0]
    change = with_adapter(runner, "quantized") - logits(runner, IDS, 9)
    assert float((change - (wanted - base)).norm() / (wanted - base).norm()) < 0.2


def test_what_can_not_fit_into_the_memory_for_adapters_is_not_read(
    folder: Path, model: transformers.PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_adapter(model, folder / "large")
    file = folder / "large" / checkpoint.WEIGHTS_FILE
    monkeypatch.setattr(checkpoint, "_HEADER", 2**14)
    numbers = (file.stat().st_size - 2**14) // 4
    read: list[Path] = []
    monkeypatch.setattr(checkpoint, "read_at_most", lambda file, most: read.append(file) or file.read_bytes())
    with pytest.raises(AdapterError, match=r"it takes 0\.\d MiB or more, but there are 0\.\d MiB .*adapter_memory"):
        runner_of(folder, adapter_memory=f"{4 * numbers - 1}B").read_adapter("large")
    assert read == []
    assert runner_of(folder, adapter_memory=f"{4 * numbers}B").read_adapter("large").rank == 4
    assert read == [file]
