"""Ranks of a quantized checkpoint: each reads its slices of the codes, and together they give one rank's tokens."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import msgspec
import numpy as np
import pytest
import torch
import transformers
from gguf.quants import quantize
from safetensors.torch import load_file, save_file

from distributed.test_ranks import group
from helpers.checkpoints import SIZES, prompt, save
from helpers.engine_process import config, tokens_of
from helpers.one_engine import tokens_of_engine
from tidewright.distributed.placement import place
from tidewright.engine.engine import Engine
from tidewright.engine.messages import Submit
from tidewright.quantization.affine import scheme_named
from tidewright.quantization.gguf_index import GGUF_FILE, INDEX_FILE, GgufIndex, GgufTensor
from tidewright.quantization.quantize_model import QuantizationRun, Recipe
from tidewright.schema import SamplingParams

# Ranks' parts are whole groups of 64 inputs, of which activations share a scale: so codes of x are those of one rank.
CONFIG = transformers.LlamaConfig(
    **SIZES
    | {"hidden_size": 192, "head_dim": 64, "num_key_value_heads": 3, "intermediate_size": 384, "num_hidden_layers": 2}
)


def int8_and_int4(folder: Path) -> Path:
    """The first layer in int8, the second in int4 of groups, as one checkpoint."""
    save(folder / "plain", CONFIG)
    tensors: dict[str, torch.Tensor] = {}
    for scheme, is_own in (
        ("int8", lambda name: ".layers.0." in name),
        ("int4-g64", lambda name: ".layers.0." not in name),
    ):
        made = folder / scheme
        made.mkdir()
        QuantizationRun(folder / "plain", made, Recipe(scheme_named(scheme), scheme_named("int8"))).run(
            lambda done, total: None
        )
        for file in made.glob("*.safetensors"):
            tensors |= {name: tensor for name, tensor in load_file(file).items() if is_own(name)}
    mixed = folder / "mixed"
    mixed.mkdir()
    save_file(tensors, mixed / "model.safetensors")
    shutil.copy(folder / "int4-g64" / "config.json", mixed)
    return mixed


def gguf_file(folder: Path) -> Path:
    """Q4_1, and the down projections in Q8_0, as files of mixed types are."""
    save(folder / "plain", CONFIG)
    found, data = {}, b""
    for name, tensor in load_file(folder / "plain" / "model.safetensors").items():
        kind = "F32" if tensor.dim() == 1 else "Q8_0" if "down_proj" in name else "Q4_1"
        found[name] = GgufTensor(kind, tuple(tensor.shape), len(data))
        data += np.ascontiguousarray(quantize(tensor.numpy(), gguf.GGMLQuantizationType[kind])).tobytes()
    made = folder / "gguf"
    made.mkdir()
    (made / GGUF_FILE).write_bytes(data)
    (made / INDEX_FILE).write_bytes(msgspec.json.encode(GgufIndex(len(data), found)))
    (made / "config.json").write_text(json.dumps(CONFIG.to_dict() | {"architectures": ["LlamaForCausalLM"]}))
    return made


@pytest.mark.parametrize(("size", "make"), [(2, int8_and_int4), (3, gguf_file)])
def test_quantized_ranks_give_the_tokens_of_one(tmp_path: Path, size: int, make: Callable[[Path], Path]) -> None:
    model = make(tmp_path)
    greedy = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, seed=0)
    requests = [Submit(i, prompt(length, seed=i), greedy) for i, length in enumerate((5, 30, 70))]
    wanted = tokens_of_engine(Engine(place(config(model), 0)), requests)
    with group(model, size) as started:
        assert tokens_of(started, requests) == wanted
