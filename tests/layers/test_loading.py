"""layers/loading.py: both layouts of a checkpoint, and what a wrong one is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tidewright.layers.loading import CheckpointError, load_weights
from tidewright.layers.weights import Loader, replicated_loader

WEIGHTS = {"a": torch.arange(4.0), "b": torch.arange(6.0).view(2, 3)}


def parameters() -> tuple[dict[str, nn.Parameter], dict[str, Loader]]:
    weights = {name: nn.Parameter(torch.zeros_like(value), requires_grad=False) for name, value in WEIGHTS.items()}
    return weights, {name: replicated_loader(weight) for name, weight in weights.items()}


def save_sharded(folder: Path) -> None:
    for name, value in WEIGHTS.items():
        save_file({name: value}, folder / f"{name}.safetensors")
    index = {"weight_map": {name: f"{name}.safetensors" for name in WEIGHTS}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("sharded", [False, True])
def test_loads_single_and_sharded(tmp_path: Path, sharded: bool) -> None:
    if sharded:
        save_sharded(tmp_path)
    else:
        save_file(WEIGHTS, tmp_path / "model.safetensors")
    weights, loaders = parameters()
    load_weights(tmp_path, loaders)
    for name, value in WEIGHTS.items():
        torch.testing.assert_close(weights[name].data, value)


def test_weights_are_converted_to_the_parameters_type(tmp_path: Path) -> None:
    save_file({"a": torch.arange(4).bfloat16()}, tmp_path / "model.safetensors")
    weights, loaders = parameters()
    load_weights(tmp_path, {"a": loaders["a"]})
    assert weights["a"].tolist() == [0.0, 1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ({"a": WEIGHTS["a"]}, "lacks b"),
        ({}, "lacks a, b"),
        ({**WEIGHTS, "c": torch.zeros(1)}, "has no weight named c"),
        ({"a": torch.zeros(2, 3), "b": WEIGHTS["b"]}, r"weight a: expected shape \(4,\), found \(2, 3\)"),
    ],
)
def test_a_checkpoint_of_another_model(tmp_path: Path, saved: dict[str, torch.Tensor], message: str) -> None:
    save_file(saved, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        load_weights(tmp_path, parameters()[1])


def test_ignored_weights_are_left_out(tmp_path: Path) -> None:
    save_file({**WEIGHTS, "c": torch.zeros(1)}, tmp_path / "model.safetensors")
    load_weights(tmp_path, parameters()[1], ignored=frozenset({"c"}))


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"neither model.safetensors nor"):
        load_weights(tmp_path, {})


def test_a_shard_that_is_not_there(tmp_path: Path) -> None:
    save_sharded(tmp_path)
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"not there: b.safetensors"):
        load_weights(tmp_path, parameters()[1])


def test_a_damaged_file(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        load_weights(tmp_path, {})
