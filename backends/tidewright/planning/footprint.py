"""Bytes that one rank of a model keeps in memory, from its shapes, by the layers' own cuts and the pool's own blocks.

terraform/modules/sizing does the same in HCL; a test holds the two together.
"""

from __future__ import annotations

from typing import NamedTuple

from tidewright.devices.cuda.attention_launch import MAX_SPLITS, MIN_SPLIT
from tidewright.devices.cuda.head_sizes import takes_head
from tidewright.distributed.sharding import cut, cut_heads, vocabulary_rows
from tidewright.kv_cache.budget import SCALE_BYTES, bytes_per_block
from tidewright.models.config import DecoderConfig
from tidewright.planning.weight_formats import FLOAT32, WeightFormats

SCORED_ROWS = 128
"""Logits of prompts that are made at once; see engine/model_runner.py."""
_SPLIT_TOKENS = MIN_SPLIT // 2  # of a context, for each of its parts: their number is a power of two
_SAMPLING_COPIES = 5
"""Float32 copies of a row of logits that sampling has at a time, at most; see sampling/sampler.py."""


def parameters(model: DecoderConfig) -> int:
    """As they are published: without padding, and an embedding that is also the head counts once."""
    padding = vocabulary_rows(model.vocab_size, 1) - model.vocab_size
    matrices = sum(one.rows * one.depth * one.times for one in _matrices(model, 0, 1))
    others = _biases(model, 0, 1) + _norms(model)
    return matrices + others - padding * model.hidden_size * (1 if model.tied_embeddings else 2)


def weight_bytes(
    model: DecoderConfig, value_bytes: int, rank: int = 0, size: int = 1, formats: WeightFormats | None = None
) -> int:
    """`value_bytes`: of what is not quantized; `formats`: of matrices, else as the others. Raises ShardingError."""
    formats = formats or WeightFormats.plain(value_bytes)
    matrices = sum(
        one.times * (formats.head if one.is_head else formats.layers).bytes(one.depth, one.rows, one.whole)
        for one in _matrices(model, rank, size)
    )
    biases = _biases(model, rank, size) * value_bytes
    return matrices + biases + _norms(model) * (FLOAT32 if model.norm_adds_one else value_bytes)


def largest_rank(model: DecoderConfig, value_bytes: int, size: int, formats: WeightFormats | None = None) -> int:
    """The rank with the most weights. Raises ShardingError."""
    return max(range(size), key=lambda rank: weight_bytes(model, value_bytes, rank, size, formats))


def table_bytes(model: DecoderConfig, max_positions: int) -> int:
    """Cosines and sines of the rotary embedding, which every rank has whole."""
    return rotary_tables(model) * 2 * max_positions * model.head_dim * FLOAT32


def rotary_tables(model: DecoderConfig) -> int:
    """In some models layers with a window turn differently."""
    return len({layer.rope for layer in model.layers})


def kv_block_bytes(model: DecoderConfig, value_bytes: int, block_size: int, size: int = 1) -> int:
    """On the rank with the most KV heads, whose pool is the smallest: all ranks have as many blocks. ShardingError."""
    kv_heads = max(cut_heads(model.num_heads, model.num_kv_heads, rank, size)[1].count for rank in range(size))
    scale_bytes = SCALE_BYTES if value_bytes == 1 else 0
    return bytes_per_block(model.num_layers, kv_heads, model.head_dim, block_size, value_bytes, scale_bytes)


def step_bytes(model: DecoderConfig, value_bytes: int, tokens: int, size: int = 1) -> int:
    """Activations of a step that computes so many tokens, at their peak: an estimate from the shapes."""
    heads, kv_heads = _head_counts(model, size)
    stream = 3 * model.hidden_size  # the input of a part, its output, and the residual stream
    attention = stream + 2 * (heads + 2 * kv_heads) * model.head_dim + heads * model.head_dim
    mlp = stream + 3 * max(cut(model.intermediate_size, rank, size).count for rank in range(size))
    return tokens * max(attention, mlp) * value_bytes


def logits_bytes(model: DecoderConfig, value_bytes: int, size: int = 1) -> int:
    """Of one row on rank 0, which gathers the others' parts and samples."""
    gathered = (1 if size == 1 else 2) * vocabulary_rows(model.vocab_size, size) * size * value_bytes
    return gathered + _SAMPLING_COPIES * model.vocab_size * FLOAT32


def partial_bytes(model: DecoderConfig, context: int, size: int = 1) -> int:
    """Of one decoding sequence: what the parts of its context leave for each head until they are combined, at most."""
    if not takes_head(model.head_dim):
        return 0
    heads, _ = _head_counts(model, size)
    return heads * min(MAX_SPLITS, -(-context // _SPLIT_TOKENS)) * (model.head_dim + 1) * FLOAT32


def gathered_layers(model: DecoderConfig) -> int:
    """Layers whose keys and values are copied at a time, as if padded to twice their length; kernels need none."""
    return 0 if takes_head(model.head_dim) else 2


def layer_values(model: DecoderConfig, size: int = 1) -> int:
    """Weights that each token is multiplied by in all layers, on the rank that has the most."""
    return sum(one.times * one.rows * one.depth for one in _largest_matrices(model, size) if not one.is_head)


def head_values(model: DecoderConfig, size: int = 1) -> int:
    """Likewise by the head, which only the last token of a prompt goes through."""
    return vocabulary_rows(model.vocab_size, size) * model.hidden_size


def layer_bytes(model: DecoderConfig, formats: WeightFormats, size: int = 1) -> int:
    """Of those weights, which a step reads."""
    matrices = [one for one in _largest_matrices(model, size) if not one.is_head]
    return sum(one.times * formats.layers.bytes(one.depth, one.rows, one.whole) for one in matrices)


def head_bytes(model: DecoderConfig, formats: WeightFormats, size: int = 1) -> int:
    return formats.head.bytes(model.hidden_size, vocabulary_rows(model.vocab_size, size))


def _head_counts(model: DecoderConfig, size: int) -> tuple[int, int]:
    """Of the rank that has the most."""
    cuts = [cut_heads(model.num_heads, model.num_kv_heads, rank, size) for rank in range(size)]
    return max(heads.count for heads, _ in cuts), max(kv.count for _, kv in cuts)


class _Matrix(NamedTuple):
    rows: int
    depth: int
    times: int
    is_head: bool = False
    """Or an embedding."""
    whole: int = 0
    """Inputs over all ranks, where they divide them; else 0."""


def _matrices(model: DecoderConfig, rank: int, size: int) -> list[_Matrix]:
    heads, kv_heads = cut_heads(model.num_heads, model.num_kv_heads, rank, size)
    return _shapes(model, heads.count, kv_heads.count, cut(model.intermediate_size, rank, size).count, size)


def _largest_matrices(model: DecoderConfig, size: int) -> list[_Matrix]:
    """Of a rank that would have the most of each."""
    features = max(cut(model.intermediate_size, rank, size).count for rank in range(size))
    return _shapes(model, *_head_counts(model, size), features, size)


def _shapes(model: DecoderConfig, heads: int, kv_heads: int, features: int, size: int) -> list[_Matrix]:
    hidden, head_dim, layers = model.hidden_size, model.head_dim, model.num_layers
    return [
        _Matrix((heads + 2 * kv_heads) * head_dim, hidden, layers),
        _Matrix(hidden, heads * head_dim, layers, whole=model.num_heads * head_dim),
        _Matrix(2 * features, hidden, layers),
        _Matrix(hidden, features, layers, whole=model.intermediate_size),
        _Matrix(vocabulary_rows(model.vocab_size, size), hidden, 1 if model.tied_embeddings else 2, is_head=True),
    ]


def _biases(model: DecoderConfig, rank: int, size: int) -> int:
    heads, kv_heads = cut_heads(model.num_heads, model.num_kv_heads, rank, size)
    features, is_first = cut(model.intermediate_size, rank, size).count, rank == 0
    attention = model.qkv_bias * (heads.count + 2 * kv_heads.count) * model.head_dim
    mlp = model.mlp_bias * 2 * features
    return model.num_layers * (attention + mlp + is_first * (model.output_bias + model.mlp_bias) * model.hidden_size)


def _norms(model: DecoderConfig) -> int:
    norms = (4 if model.norms_after else 2) * model.hidden_size + (2 * model.head_dim if model.qk_norm else 0)
    return model.num_layers * norms + model.hidden_size
