"""Quantized layers in the formats of GPTQ and AWQ, packed number by number, and folders of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

LAYER = "model.layers.0.mlp.up_proj"


class Layer:
    """Random codes [E, F], zero points and scales [G, F]: the weight is scale * (code - zero).

    `is_ordered`: a group's inputs lie anywhere, as GPTQ's desc_act has it.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        group_size: int,
        bits: int,
        symmetric: bool,
        is_ordered: bool = False,
    ) -> None:
        rng = np.random.default_rng(in_features * bits + symmetric)
        groups = -(-in_features // group_size)
        self.bits, self.symmetric, self.group_size = bits, symmetric, group_size
        self.codes = rng.integers(0, 2**bits, (in_features, out_features))
        shape = (groups, out_features)
        # GPTQ's first format can't store a zero point of 0.
        self.zeros = np.full(shape, 2 ** (bits - 1)) if symmetric else rng.integers(1, 2**bits, shape)
        self.scales = rng.uniform(0.001, 0.1, shape).astype(np.float16)
        self.groups = (np.arange(in_features) // group_size).astype(np.int32)
        if is_ordered:
            rng.shuffle(self.groups)

    @property
    def weight(self) -> torch.Tensor:
        """[F, E]"""
        scales, zeros = self.scales.astype(np.float32)[self.groups], self.zeros[self.groups]
        return torch.from_numpy((scales * (self.codes - zeros).astype(np.float32)).T.copy())


def pack(numbers: np.ndarray, bits: int, order: list[int]) -> np.ndarray:
    """Along the first dimension; in each word, number order[i] has place i."""
    words = np.zeros((-(-len(numbers) // len(order)), numbers.shape[1]), dtype=np.uint32)
    for word in range(len(words)):
        for place, number in enumerate(order):
            if word * len(order) + number < len(numbers):
                words[word] |= numbers[word * len(order) + number].astype(np.uint32) << np.uint32(bits * place)
    return words.view(np.int32)


def gptq(layer: Layer, version: int = 1, name: str = LAYER) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and quantization_config."""
    order = list(range(32 // layer.bits))
    stored_zeros = layer.zeros - 1 if version == 1 else layer.zeros
    arrays = {
        "qweight": pack(layer.codes, layer.bits, order),
        "qzeros": pack(stored_zeros.T, layer.bits, order).T.copy(),
        "scales": layer.scales,
        "g_idx": layer.groups,
    }
    config = {
        "quant_method": "gptq",
        "bits": layer.bits,
        "group_size": layer.group_size,
        "sym": layer.symmetric,
        "desc_act": bool((np.diff(layer.groups) < 0).any()),
        **({"checkpoint_format": "gptq_v2"} if version == 2 else {}),
    }
    return {f"{name}.{part}": torch.from_numpy(array) for part, array in arrays.items()}, config


def awq(layer: Layer, name: str = LAYER) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    arrays = {
        "qweight": pack(layer.codes.T, 4, order).T.copy(),
        "qzeros": pack(layer.zeros.T, 4, order).T.copy(),
        "scales": layer.scales,
    }
    config = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": layer.group_size,
        "zero_point": True,
        "version": "gemm",
    }
    return {f"{name}.{part}": torch.from_numpy(array) for part, array in arrays.items()}, config


def save(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": config}))
    return folder
