"""Bytes that one rank of a model keeps in memory, from its shapes, by the layers' own cuts and the pool's own blocks.

terraform/modules/sizing does the same in HCL; a test holds the two together.
"""

from __future__ import annotations

from tidewright.distributed.sharding import cut, cut_heads, vocabulary_rows
from tidewright.kv_cache.budget import SCALE_BYTES, bytes_per_block
from tidewright.models.config import DecoderConfig

FLOAT32 = 4
SCORED_ROWS = 128
"""Logits of prompts that are made at once; see engine/model_runner.py."""
_SAMPLING_COPIES = 5
"""Float32 copies of a row of logits that sampling has at a time, at most; see sampling/sampler.py."""


def parameters(model: DecoderConfig) -> int:
    """As they are published: without padding, and an embedding that is also the head counts once."""
    padding = vocabulary_rows(model.vocab_size, 1) - model.vocab_size
    return sum(_values(model, 0, 1)) - padding * model.hidden_size * (1 if model.tied_embeddings else 2)


def weight_bytes(model: DecoderConfig, value_bytes: int, rank: int = 0, size: int = 1) -> int:
    """Raises ShardingError."""
    values, norms = _values(model, rank, size)
    return values * value_bytes + norms * (FLOAT32 if model.norm_adds_one else value_bytes)


def largest_rank(model: DecoderConfig, value_bytes: int, size: int) -> int:
    """The rank with the most weights. Raises ShardingError."""
    return max(range(size), key=lambda rank: weight_bytes(model, value_bytes, rank, size))


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


def layer_values(model: DecoderConfig, size: int = 1) -> int:
    """Weights that each token is multiplied by in all layers, on the rank that has the most."""
    heads, kv_heads = _head_counts(model, size)
    features = max(cut(model.intermediate_size, rank, size).count for rank in range(size))
    layer = (2 * heads + 2 * kv_heads) * model.head_dim + 3 * features
    return model.num_layers * layer * model.hidden_size


def head_values(model: DecoderConfig, size: int = 1) -> int:
    """Likewise by the head, which only the last token of a prompt goes through."""
    return vocabulary_rows(model.vocab_size, size) * model.hidden_size


def _head_counts(model: DecoderConfig, size: int) -> tuple[int, int]:
    """Of the rank that has the most."""
    cuts = [cut_heads(model.num_heads, model.num_kv_heads, rank, size) for rank in range(size)]
    return max(heads.count for heads, _ in cuts), max(kv.count for _, kv in cuts)


def _values(model: DecoderConfig, rank: int, size: int) -> tuple[int, int]:
    """Numbers of weights in matrices and biases, and in norms."""
    hidden, head_dim, is_first = model.hidden_size, model.head_dim, rank == 0
    heads, kv_heads = cut_heads(model.num_heads, model.num_kv_heads, rank, size)
    qkv = (heads.count + 2 * kv_heads.count) * head_dim
    features = cut(model.intermediate_size, rank, size).count
    attention = qkv * (hidden + model.qkv_bias) + hidden * (heads.count * head_dim + (model.output_bias and is_first))
    mlp = 2 * features * (hidden + model.mlp_bias) + hidden * (features + (model.mlp_bias and is_first))
    embeddings = vocabulary_rows(model.vocab_size, size) * hidden * (1 if model.tied_embeddings else 2)
    norms = (4 if model.norms_after else 2) * hidden + (2 * head_dim if model.qk_norm else 0)
    return model.num_layers * (attention + mlp) + embeddings, model.num_layers * norms + hidden
