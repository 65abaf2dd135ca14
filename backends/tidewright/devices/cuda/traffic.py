"""The bytes that each kernel of a decode step moves, by its shapes, and a lower bound of the step's time. No torch.

A bound, not a measurement: each kernel reads its inputs once, writes its outputs once, and runs at the speed of memory
or of arithmetic, whichever takes longer. Kernels run one after the other, so their times add up. planning/roofline.py,
which sizes clusters, counts only weights and KV cache and treats the step as one kernel.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from tidewright.distributed.sharding import vocabulary_rows
from tidewright.models.config import DecoderConfig
from tidewright.planning.gpus import Gpu
from tidewright.planning.weight_formats import FLOAT32, WeightFormat

SEARCH_PASSES = 16
"""Passes over a row's weights for each of top_k and top_p; see sampling.py."""
INT64 = 8


@dataclass(frozen=True)
class Traffic:
    """Bytes and operations of one launch of a kernel that a step launches `times` times."""

    kernel: str
    weights: int = 0
    """Bytes that do not depend on the batch."""
    cache: int = 0
    """Bytes of keys and values, read or written."""
    activations: int = 0
    flops: int = 0
    times: int = 1

    @property
    def bytes(self) -> int:
        return self.weights + self.cache + self.activations

    def seconds(self, gpu: Gpu, dtype: str) -> float:
        """Of all launches."""
        return self.times * max(self._seconds(gpu, dtype))

    def is_bound_by_arithmetic(self, gpu: Gpu, dtype: str) -> bool:
        memory, arithmetic = self._seconds(gpu, dtype)
        return arithmetic > memory

    def _seconds(self, gpu: Gpu, dtype: str) -> tuple[float, float]:
        flops = gpu.flops(dtype)
        assert gpu.bandwidth
        assert flops
        return self.bytes / gpu.bandwidth, self.flops / flops


def product(
    kernel: str,
    rows: int,
    depth: int,
    features: int,
    value: int,
    times: int = 1,
    weights: WeightFormat | None = None,
) -> Traffic:
    """A matrix product of `rows` rows with a weight. `value`: bytes of one number."""
    return Traffic(
        kernel,
        weights=weights.bytes(depth, features) if weights else depth * features * value,
        activations=rows * (depth + features) * value,
        flops=2 * rows * depth * features,
        times=times,
    )


def norm(rows: int, size: int, value: int, is_added: bool = True, times: int = 1) -> Traffic:
    """Reads x and writes the result; with the addition it also reads and writes the residual stream."""
    return Traffic(
        "rms norm", weights=size * value, activations=rows * size * value * (4 if is_added else 2), times=times
    )


def rope_and_cache(rows: int, heads: int, kv_heads: int, head_dim: int, value: int, times: int = 1) -> Traffic:
    """Reads half a row of each table, as the halves are equal up to the sign."""
    read = rows * ((heads + 2 * kv_heads) * head_dim * value + head_dim * FLOAT32 + 2 * INT64)
    stored = rows * 2 * kv_heads * head_dim * value
    written = rows * heads * head_dim * value
    return Traffic("rope and cache", cache=stored, activations=read + written, times=times)


def attention(rows: int, context: int, heads: int, kv_heads: int, head_dim: int, value: int, times: int = 1) -> Traffic:
    """One query per sequence over `context` cached tokens: each query head multiplies all keys and all values."""
    return Traffic(
        "attention: decode",
        cache=rows * context * 2 * kv_heads * head_dim * value,
        activations=2 * rows * heads * head_dim * value,
        flops=4 * rows * context * heads * head_dim,
        times=times,
    )


def activation(rows: int, size: int, value: int, times: int = 1) -> Traffic:
    return Traffic("activation", activations=3 * rows * size * value, times=times)


def sampling(rows: int, vocab: int, value: int, searches: int = 0) -> list[Traffic]:
    """`searches`: 1 with top_k or top_p, 2 with both. On large GPUs most of their passes hit the L2 cache, which is
    faster than the memory that this bound assumes.
    """
    found = [
        Traffic("sampling: penalise", activations=rows * vocab * (value + FLOAT32)),
        Traffic("sampling: weigh", activations=rows * vocab * 2 * FLOAT32),
    ]
    if searches:
        found.append(Traffic("sampling: truncate", activations=rows * vocab * searches * SEARCH_PASSES * FLOAT32))
    return [*found, Traffic("sampling: race", activations=rows * vocab * FLOAT32)]


def decode_step(
    model: DecoderConfig,
    rows: int,
    context: int,
    value: int = 2,
    searches: int = 0,
    weights: WeightFormat | None = None,
) -> list[Traffic]:
    """All kernels of a step on one GPU that decodes one token for each of `rows` sequences of `context` tokens."""
    hidden, layers = model.hidden_size, model.num_layers
    heads, kv_heads, head_dim = model.num_heads, model.num_kv_heads, model.head_dim
    step = [
        Traffic("embedding", activations=2 * rows * hidden * value + rows * INT64),
        norm(rows, hidden, value, is_added=False),  # the first has nothing to add
        norm(rows, hidden, value, times=2 * layers),  # the last stands before the head
        product("q, k and v", rows, hidden, (heads + 2 * kv_heads) * head_dim, value, layers, weights),
        rope_and_cache(rows, heads, kv_heads, head_dim, value, layers),
        *(
            attention(rows, min(context, window or context), heads, kv_heads, head_dim, value, times)
            for window, times in Counter(layer.window for layer in model.layers).items()
        ),
        product("output of attention", rows, heads * head_dim, hidden, value, layers, weights),
        product("gate and up", rows, hidden, 2 * model.intermediate_size, value, layers, weights),
        activation(rows, model.intermediate_size, value, layers),
        product("down", rows, model.intermediate_size, hidden, value, layers, weights),
        product("head", rows, hidden, vocabulary_rows(model.vocab_size, 1), value, weights=weights),
    ]
    if model.qk_norm:
        step.append(norm(rows * (heads + kv_heads), head_dim, value, is_added=False, times=layers))
    if model.norms_after:
        step.append(norm(rows, hidden, value, is_added=False, times=2 * layers))
    return [*step, *sampling(rows, model.vocab_size, value, searches)]


def step_seconds(step: Iterable[Traffic], gpu: Gpu, dtype: str = "bfloat16") -> float:
    return sum(kernel.seconds(gpu, dtype) for kernel in step)
