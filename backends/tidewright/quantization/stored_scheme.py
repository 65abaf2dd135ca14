"""What a model folder's weights are quantized by, in a word; each weight says exactly. Reads no weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from tidewright.models.folder import read_json
from tidewright.quantization.affine import SCHEMES, QuantizationError, Scheme
from tidewright.quantization.checkpoint import has_plain_weights, reads_gguf, stored_format
from tidewright.quantization.choice import Stored
from tidewright.quantization.gguf_index import INDEX_FILE, GgufIndex
from tidewright.quantization.gguf_types import BLOCK_TYPES
from tidewright.quantization.methods import AWQ, GPTQ, quantization_of


def stored_in(folder: Path, config: Mapping[str, Any]) -> Stored | None:
    """None: the weights are plain. `config` is its config.json. Raises QuantizationError."""
    if not (name := stored_format(folder, config)):
        return None
    return Stored(name, stored_scheme(folder, prefer_plain=False), has_plain_weights(folder, config))


def stored_scheme(folder: Path, prefer_plain: bool = True) -> Scheme | None:
    """That of most weights, if they are quantized; `prefer_plain` as for `open_checkpoint`.

    Raises ModelConfigError or QuantizationError.
    """
    if reads_gguf(folder, prefer_plain):
        return _of_gguf(folder)
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    found = quantization_of(config)
    if found is None:
        return None
    if found["quant_method"] in (AWQ, GPTQ):
        return _of_groups(found)
    return _of_compressed_tensors(found)


def _of_gguf(folder: Path) -> Scheme | None:
    try:
        index = msgspec.json.decode((folder / INDEX_FILE).read_bytes(), type=GgufIndex)
    except (OSError, msgspec.MsgspecError) as error:
        raise QuantizationError(f"{folder / INDEX_FILE} is not readable: {error}; prepare the model anew") from error
    counts = Counter(tensor.type for tensor in index.tensors.values() if len(tensor.shape) == 2)
    ((name, _),) = counts.most_common(1) or [("F32", 0)]
    if (block := BLOCK_TYPES.get(name)) is None:
        return None
    return Scheme(f"gguf {name}", block.bits, block.group_size, symmetric=not block.has_offsets)


def _of_groups(found: Mapping[str, Any]) -> Scheme:
    method, bits = found["quant_method"], int(found.get("bits") or found.get("w_bit") or 4)
    size = max(int(found.get("group_size") or found.get("q_group_size") or 0), 0)  # -1: one for all inputs
    symmetric = method == GPTQ and bool(found.get("sym", True))
    return Scheme(f"{method} int{bits}{f'-g{size}' if size else ''}", bits, size, symmetric)


def _of_compressed_tensors(found: Mapping[str, Any]) -> Scheme:
    groups = found.get("config_groups")
    first = next(iter(groups.values()), None) if isinstance(groups, Mapping) else None
    group = first if isinstance(first, Mapping) else {}
    weights, inputs = group.get("weights") or {}, group.get("input_activations") or {}
    is_float = weights.get("type", "float" if found["quant_method"] == "fp8" else "int") == "float"
    bits, size = int(weights.get("num_bits") or 8), int(weights.get("group_size") or 0)
    activation_bits = int(inputs.get("num_bits") or 0) if inputs and not is_float else 0
    size = max(size, 0)
    if is_float:
        return SCHEMES["fp8"]
    name = f"int{bits}{f'-g{size}' if size else ''}" if not activation_bits else f"w{bits}a{activation_bits}"
    return Scheme(name, bits, size, bool(weights.get("symmetric", True)), activation_bits)
