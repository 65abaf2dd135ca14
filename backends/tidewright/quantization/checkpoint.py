"""The weights of a model folder by name, plain or quantized, whatever format they are stored in.

Nothing is read before it is asked for: files are memory-mapped, and each layer reads only its part.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from tidewright.layers.weights import WeightSlice
from tidewright.models.folder import read_json
from tidewright.quantization.affine import AffineSource, QuantizationError
from tidewright.quantization.awq import awq_weights
from tidewright.quantization.compressed_tensors import compressed_tensors_weights
from tidewright.quantization.gguf_file import GgufFile
from tidewright.quantization.gguf_index import INDEX_FILE as GGUF_INDEX
from tidewright.quantization.gptq import gptq_weights
from tidewright.quantization.methods import AWQ, COMPRESSED_TENSORS, FP8, GPTQ, quantization_of, unsupported
from tidewright.quantization.stored import modules

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

Source = WeightSlice | AffineSource
_READERS = {
    AWQ: awq_weights,
    COMPRESSED_TENSORS: compressed_tensors_weights,
    FP8: compressed_tensors_weights,
    GPTQ: gptq_weights,
}
# Beside a layer's weight: what the layer is made of, and scales of a KV cache, which finds its own.
_NEVER_LOADED = ("k_scale", "v_scale", "kv_scale", "q_scale", "input_scale", "input_zero_point", "output_scale")


class CheckpointError(ValueError):
    """The checkpoint is not readable, or is not of this model."""


@contextmanager
def open_checkpoint(folder: Path, prefer_plain: bool = True) -> Iterator[Mapping[str, Source]]:
    """A quantized weight is an `AffineSource` under the name that it would have plain: `….weight`.

    A folder that a GGUF file was made into may hold that file and the same weights plain: `prefer_plain` chooses.

    Raises:
        CheckpointError: files are missing or damaged, or quantized in a way that isn't served.
    """
    if reads_gguf(folder, prefer_plain):
        try:
            weights: Mapping[str, Source] = GgufFile(folder).weights()
        except QuantizationError as error:
            raise CheckpointError(str(error)) from error
        yield weights
        return
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    with ExitStack() as files:
        tensors: dict[str, WeightSlice] = {}
        for file in weight_files(folder):
            try:
                opened = files.enter_context(safe_open(file, framework="pt"))
                tensors |= {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{file} is not a readable safetensors file: {error}") from error
        try:
            found = _quantized(tensors, config)
        except QuantizationError as error:
            raise CheckpointError(f"{folder}: {error}") from error
        yield found


def _quantized(tensors: dict[str, WeightSlice], config: Mapping[str, Any]) -> Mapping[str, Source]:
    """Raises QuantizationError."""
    if refusal := unsupported(config):
        raise QuantizationError(refusal)
    found = quantization_of(config)
    if found is None:
        return tensors
    by_layer = _READERS[found["quant_method"]](tensors, found)
    kept: dict[str, Source] = {
        f"{module}.{part}": tensor
        for module, parts in modules(tensors).items()
        for part, tensor in parts.items()
        if part not in _NEVER_LOADED and (module not in by_layer or part == "bias")
    }
    return kept | {f"{module}.weight": weight for module, weight in by_layer.items()}


def reads_gguf(folder: Path, prefer_plain: bool) -> bool:
    """The weights come from a GGUF file, as `open_checkpoint` chooses."""
    return (folder / GGUF_INDEX).is_file() and not (prefer_plain and has_plain_files(folder))


def stored_format(folder: Path, config: Mapping[str, Any]) -> str:
    """What the weights are quantized in; empty if they are plain."""
    if (folder / GGUF_INDEX).is_file():
        return "GGUF"
    found = quantization_of(config)
    return str(found["quant_method"]) if found else ""


def has_plain_weights(folder: Path, config: Mapping[str, Any]) -> bool:
    """Beside quantized ones, if it has such."""
    return has_plain_files(folder) and quantization_of(config) is None


def has_plain_files(folder: Path) -> bool:
    return (folder / SINGLE_FILE).is_file() or (folder / INDEX_FILE).is_file()


def weight_files(folder: Path) -> list[Path]:
    """Raises CheckpointError."""
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    if not (folder / INDEX_FILE).is_file():
        raise CheckpointError(f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}")
    try:
        index = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))
        files = [folder / str(name) for name in sorted(set(index["weight_map"].values()))]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder / INDEX_FILE} is not a readable index: {error!r}") from error
    if absent := [file.name for file in files if not file.is_file()]:
        raise CheckpointError(f"{folder}: {INDEX_FILE} names files that are not there: {', '.join(absent)}")
    return files
