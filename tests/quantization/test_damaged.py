"""Quantized files cut short or with bytes changed: they load, or are refused with a message; nothing else happens."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from helpers.quantized import LAYER, Layer, awq, gptq, save
from quantization.test_compressed_tensors import FORMATS, compressed
from quantization.test_gguf_file import write
from tidewright.models.config import ModelConfigError
from tidewright.quantization.affine import AffineSource, QuantizationError
from tidewright.quantization.checkpoint import CheckpointError, open_checkpoint

ROUNDS = 60


def of_gguf(folder: Path) -> Path:
    folder.mkdir()
    packed = np.random.default_rng(0).integers(0, 60, (24, 512 // 32 * 20), dtype=np.uint8)
    return write(folder, packed, type="Q4_1", shape=(24, 512), permuted_heads=3)


MAKERS: dict[str, Callable[[Path], Path]] = {
    "awq": lambda folder: save(folder, *awq(Layer(96, 24, 32, 4, False))),
    "gptq": lambda folder: save(folder, *gptq(Layer(96, 24, 32, 4, False))),
    "gguf": of_gguf,
    **{
        name: lambda folder, name=name: save(folder, *compressed(*FORMATS[name])[:2])  # type: ignore[misc]
        for name in ("int8 per channel", "int4, zero points", "fp8 per channel")
    },
}


def read_all(folder: Path) -> None:
    with open_checkpoint(folder) as weights:
        for source in weights.values():
            shape = source.get_shape()
            if isinstance(source, AffineSource):
                source.cut(slice(0, shape[0]), slice(0, shape[1])).dequantized()
            else:
                source[tuple(slice(None) for _ in shape)]


@pytest.mark.parametrize("name", MAKERS)
def test_damage_is_told_or_does_not_matter(tmp_path: Path, name: str) -> None:
    folder = MAKERS[name](tmp_path / "model")
    read_all(folder)
    chance, refused = random.Random(0), 0
    for file in folder.iterdir():
        whole = file.read_bytes()
        for _ in range(ROUNDS):
            damaged = bytearray(whole)
            if chance.random() < 0.3:
                del damaged[chance.randrange(len(damaged)) :]
            # Mostly where sizes and names are.
            for _ in range(chance.randrange(4)):
                if damaged:
                    damaged[chance.randrange(min(len(damaged), chance.choice((8, 400, 10**9))))] = chance.randrange(256)
            file.write_bytes(damaged)
            try:
                read_all(folder)
            except (CheckpointError, QuantizationError, ModelConfigError):
                refused += 1
        file.write_bytes(whole)
    assert refused > ROUNDS / 4
    read_all(folder)


def test_a_damaged_layer_is_named(tmp_path: Path) -> None:
    tensors, config = gptq(Layer(96, 24, 32, 4, False))
    tensors[f"{LAYER}.scales"][0, 0] = float("nan")
    with pytest.raises(QuantizationError, match=f"{LAYER} has scales that are not finite"):
        read_all(save(tmp_path / "model", tensors, config))
