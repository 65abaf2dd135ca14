"""Makes a GGUF file of the Llama architecture into a model folder: kept as it is, or converted to bf16.

The folder has config, tokenizer and the file itself, with an index of where its tensors stand. For readers of
safetensors only, weights are converted: one tensor is dequantized, rounded and written before the next, so memory
stays small.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from tidewright.launch.errors import PrepareError, UnsupportedModelError
from tidewright.launch.gguf_tokenizer import write_tokenizer
from tidewright.launch.model_sources import link
from tidewright.quantization.gguf_index import GGUF_FILE, INDEX_FILE, SERVED_TYPES, GgufIndex, GgufTensor

SUPPORTED_ARCHITECTURES = ("llama",)
_TOKENIZER_BYTES = 16_000_000  # of the other files, at most about

_GLOBAL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER_TENSOR = re.compile(r"blk\.(\d+)\.(\w+)\.weight")


@dataclass(frozen=True)
class _Tensor:
    """A tensor of the file: `source` is gguf's own object, `shape` and `name` are the Hugging Face ones."""

    name: str
    shape: tuple[int, ...]
    permuted_heads: int  # llama.cpp stores these rows interleaved for its rope, by head; 0: as they are
    source: Any


class GgufSource:
    """A GGUF file whose model can be converted."""

    def __init__(self, path: Path) -> None:
        """Reads all but the weights.

        Raises:
            UnsupportedModelError: an architecture or tensor that isn't known.
            PrepareError: not a readable GGUF file, or the package that reads it is missing.
        """
        try:
            from tidewright.launch.gguf_reader import BoundedReader
        except ImportError:
            raise PrepareError(
                "reading a GGUF file needs the package gguf; run: pip install 'tidewright[server]'"
            ) from None
        try:
            reader = BoundedReader(path)
            if reader.byte_order != "I":
                raise ValueError("its numbers are big-endian")
            self._metadata = {name: field.contents() for name, field in reader.fields.items()}
        except (ValueError, IndexError, KeyError, TypeError, OverflowError, OSError) as error:
            raise PrepareError(f"{path} is not a complete GGUF file: {error}") from error
        self._config = _model_config(self._metadata, {tensor.name for tensor in reader.tensors})
        heads = self._config["num_attention_heads"], self._config["num_key_value_heads"]
        self.path, self._tensors = path, [_describe(tensor, *heads) for tensor in reader.tensors]

    @property
    def converted_bytes(self) -> int:
        """About how much `convert` writes: the weights in bf16, and a few MB of tokenizer."""
        return 2 * sum(math.prod(tensor.shape) for tensor in self._tensors) + _TOKENIZER_BYTES

    def keep(self, folder: Path) -> None:
        """Write config and tokenizer into `folder`, link the file, unless it is there, and write its index.

        Raises:
            UnsupportedModelError: a tokenizer that isn't known, or a type of weights that isn't served.
        """
        for tensor in self._tensors:
            if (name := tensor.source.tensor_type.name) not in SERVED_TYPES:
                raise UnsupportedModelError(
                    f"the GGUF file stores {tensor.name} as {name}, which is not served; there is "
                    f"{', '.join(SERVED_TYPES)}. Take a file of another quantization, such as Q4_K_M or Q8_0, or the "
                    "model's Hugging Face folder"
                )
        self.write_tokenizer(folder)
        index = GgufIndex(self.path.stat().st_size, {tensor.name: _place(tensor) for tensor in self._tensors})
        (folder / INDEX_FILE).write_bytes(msgspec.json.encode(index))
        if self.path != folder / GGUF_FILE:
            link(self.path.resolve(), folder / GGUF_FILE)

    def convert(self, folder: Path, on_progress: Callable[[int, int], None]) -> None:
        """Write config, weights and tokenizer into `folder`.

        `on_progress` hears (bytes written, bytes in all) after each tensor.

        Raises:
            UnsupportedModelError: a tokenizer that isn't known.
        """
        self.write_tokenizer(folder)
        _write_safetensors(folder / "model.safetensors", self._tensors, on_progress)

    def write_tokenizer(self, folder: Path) -> None:
        """Write all but the weights. Raises UnsupportedModelError: a tokenizer that isn't known."""
        write_tokenizer(self._metadata, folder)
        _write_json(folder / "config.json", self._config)
        _write_json(folder / "generation_config.json", _generation_config(self._metadata))


def _model_config(metadata: dict[str, Any], tensor_names: set[str]) -> dict[str, Any]:
    architecture = metadata.get("general.architecture")
    if architecture not in SUPPORTED_ARCHITECTURES:
        raise UnsupportedModelError(
            f"the GGUF file holds a model of architecture {architecture!r}; supported: "
            f"{', '.join(SUPPORTED_ARCHITECTURES)}. Other families are served from their Hugging Face folder."
        )

    def get(key: str, default: Any = None) -> Any:
        value = metadata.get(f"llama.{key}", default)
        if value is None:
            raise PrepareError(f"the GGUF file lacks llama.{key}; download it again or convert it anew")
        return value

    if get("expert_count", 0):
        raise UnsupportedModelError("the GGUF file holds a mixture of experts, which is not supported")
    # The scaling's parameters can't be had back from the file, and without them long texts come out wrong.
    if "rope_freqs.weight" in tensor_names or get("rope.scaling.type", "none") != "none":
        raise UnsupportedModelError(
            "the GGUF file scales its rotary embeddings (as Llama 3.1 and later do), which can't be "
            "converted; prepare the model's Hugging Face folder instead"
        )
    heads, hidden = get("attention.head_count"), get("embedding_length")
    theta = _shortest(get("rope.freq_base", 10000.0))
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(metadata.get("tokenizer.ggml.tokens", ())),
        "hidden_size": hidden,
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", heads),
        "head_dim": get("attention.key_length", hidden // heads),
        "max_position_embeddings": get("context_length"),
        "rms_norm_eps": _shortest(get("attention.layer_norm_rms_epsilon")),
        # Readers before and after transformers 5 look in different places.
        "rope_theta": theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "tie_word_embeddings": "output.weight" not in tensor_names,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "dtype": "bfloat16",
        **_generation_config(metadata),
    }


def _generation_config(metadata: dict[str, Any]) -> dict[str, Any]:
    ends = [metadata.get(f"tokenizer.ggml.{role}_token_id") for role in ("eos", "eot")]
    eos = sorted({end for end in ends if end is not None})
    ids = {
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
    }
    return {key: value for key, value in ids.items() if value is not None}


def _shortest(value: float) -> float:
    """Undo the detour through float32: 9.999999747378752e-06 was meant as 1e-05."""
    return float(str(np.float32(value)))


def _describe(tensor: Any, heads: int, kv_heads: int) -> _Tensor:
    shape = tuple(int(size) for size in reversed(tensor.shape))
    if tensor.name in _GLOBAL_NAMES:
        return _Tensor(_GLOBAL_NAMES[tensor.name], shape, 0, tensor)
    match = _LAYER_TENSOR.fullmatch(tensor.name)
    if match is None or match[2] not in _LAYER_NAMES:
        raise UnsupportedModelError(
            f"the GGUF file has a tensor {tensor.name!r} that plain Llama models lack; "
            "prepare the model's Hugging Face folder instead"
        )
    permuted_heads = {"attn_q": heads, "attn_k": kv_heads}.get(match[2], 0)
    return _Tensor(f"model.layers.{match[1]}.{_LAYER_NAMES[match[2]]}.weight", shape, permuted_heads, tensor)


def _place(tensor: _Tensor) -> GgufTensor:
    source = tensor.source
    return GgufTensor(source.tensor_type.name, tensor.shape, int(source.data_offset), tensor.permuted_heads)


def _write_safetensors(path: Path, tensors: list[_Tensor], on_progress: Callable[[int, int], None]) -> None:
    """The safetensors layout: length of the header, header as JSON, raw tensors in the header's order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    total = 0
    for tensor in tensors:
        end = total + 2 * int(np.prod(tensor.shape))
        header[tensor.name] = {"dtype": "BF16", "shape": tensor.shape, "data_offsets": [total, end]}
        total = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    written = 0
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in tensors:
            written += file.write(_bf16_bits(_dequantize(tensor)).data)
            on_progress(written, total)


def _dequantize(tensor: _Tensor) -> np.ndarray:
    from gguf.quants import dequantize

    try:
        weights = dequantize(tensor.source.data, tensor.source.tensor_type)
    except NotImplementedError:
        raise UnsupportedModelError(
            f"the GGUF file stores {tensor.name} as {tensor.source.tensor_type.name}, which can't be read; "
            "take a file of another quantization"
        ) from None
    weights = weights.reshape(tensor.shape)
    if tensor.permuted_heads:
        rows, columns = tensor.shape
        # Rows of a head stand as pairs (i, i + D/2) side by side; Hugging Face wants the two halves apart.
        pairs = weights.reshape(tensor.permuted_heads, rows // tensor.permuted_heads // 2, 2, columns)
        weights = pairs.swapaxes(1, 2).reshape(tensor.shape)
    return weights


def _bf16_bits(weights: np.ndarray) -> np.ndarray:
    """Round float32 to the nearest bf16 (ties to even), as raw 16-bit words: numpy has no bf16."""
    bits = np.ascontiguousarray(weights, dtype=np.float32).view(np.uint32)
    bits = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return (bits >> np.uint32(16)).astype("<u2")


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
