"""Attention of a step over the paged cache: launches attention_kernels.py. Writing keys and values is not done here.

No launch reads device data: grids, tiles and splits follow from shapes and from bounds that the host knows. So decode
can be captured in a CUDA graph and replayed with other lengths and blocks in the same tensors.
"""

# ruff: noqa: N815 - fields, too, carry their shape

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from tidewright.attention.base import AttentionLayer
from tidewright.devices.cuda import attention_kernels as kernels
from tidewright.devices.cuda.attention_launch import (
    AttentionShape,
    combine_launch,
    count_prefill_tiles,
    count_splits,
    decode_launch,
    prefill_launch,
)
from tidewright.devices.cuda.cache_arguments import cache_arguments, cache_strides, check_layout, codes_in
from tidewright.devices.cuda.launch import start
from tidewright.kv_cache.storage import LayerCache
from tidewright.step.batch import StepBatch

_INTERPRETED_PROCESSORS = 132  # without a GPU, under the interpreter: as an H100


@dataclass(frozen=True, eq=False)
class PagedStep:
    """Where the step's sequences stand. The first `num_decodes` sequences have one new token each, in the first rows.

    Tensors are on the device, as in StepBatch. A decode of length 0 is padding. The numbers are bounds known to the
    host.
    """

    tables_PM: torch.Tensor  # int32; entry i of a row holds positions i*S ... i*S+S-1; later entries are not read
    spans_B4: torch.Tensor  # int32; first row, its position, count of new tokens, where its table begins in tables_PM
    lengths_B: torch.Tensor  # int32; includes the new tokens, whose keys and values are already in the cache
    num_decodes: int
    max_context: int
    max_query: int = 1  # most new tokens of one sequence

    @classmethod
    def of(cls, batch: StepBatch) -> PagedStep:
        """`max_query` is this batch's own, so a graph can have decodes only."""
        return cls(
            tables_PM=batch.tables_PM,
            spans_B4=batch.spans_B4,
            lengths_B=batch.lengths_B,
            num_decodes=batch.num_decodes,
            max_context=batch.max_context,
            max_query=int(batch.host_spans_B4[:, 2].max(initial=1)),
        )


def paged_attention(
    q_THD: torch.Tensor,
    cache: LayerCache,
    step: PagedStep,
    layer: AttentionLayer,
    out_THD: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal grouped-query attention of all rows: one launch for decodes (two if split), one for all other spans."""
    if out_THD is None:
        out_THD = torch.empty(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device)
    check_layout(cache)
    for rows in (q_THD, out_THD):
        assert rows.stride()[1:] == (rows.shape[2], 1), "a row's heads are contiguous"
    decodes = step.num_decodes
    if decodes:
        decode(q_THD[:decodes], cache, step, layer, out_THD[:decodes])
    if len(step.spans_B4) > decodes:
        prefill(q_THD, cache, step, layer, out_THD)
    return out_THD


def decode(
    q_BHD: torch.Tensor,
    cache: LayerCache,
    step: PagedStep,
    layer: AttentionLayer,
    out_BHD: torch.Tensor,
) -> None:
    """One new token a sequence. Torch's allocator provides the memory between splits and combination."""
    batch, heads, head_dim = q_BHD.shape
    shape = _shape_of(q_BHD, cache, layer)
    splits = count_splits(shape.kv_heads, step.max_context, _processors(q_BHD.device))
    values, sums = out_BHD, out_BHD  # unused without splits
    if splits > 1:
        values = torch.empty((batch, heads, splits, head_dim), dtype=torch.float32, device=q_BHD.device)
        sums = torch.empty((batch, heads, splits), dtype=torch.float32, device=q_BHD.device)
    start(
        kernels.decode_kernel,
        (batch, shape.kv_heads, splits),
        decode_launch(shape, splits),
        out_BHD,
        values,
        sums,
        q_BHD,
        *cache_arguments(cache),
        step.tables_PM,
        step.spans_B4,
        step.lengths_B,
        out_BHD.stride(0),
        q_BHD.stride(0),
        *cache_strides(cache),
        *_numbers(layer),
    )
    if splits > 1:
        grid = (batch, heads)
        start(kernels.combine_kernel, grid, combine_launch(shape, splits), out_BHD, values, sums, out_BHD.stride(0))


def prefill(
    q_THD: torch.Tensor,
    cache: LayerCache,
    step: PagedStep,
    layer: AttentionLayer,
    out_THD: torch.Tensor,
) -> None:
    """The spans after the decodes: any number of new tokens each, and their earlier context from the cache."""
    shape = _shape_of(q_THD, cache, layer)
    decodes = step.num_decodes
    spans_B4 = step.spans_B4[decodes:]
    sequences = len(spans_B4)
    launch = prefill_launch(shape, step.max_query)
    start(
        kernels.prefill_kernel,
        (count_prefill_tiles(launch, len(q_THD) - decodes, sequences), shape.kv_heads),
        launch,
        out_THD,
        q_THD,
        *cache_arguments(cache),
        step.tables_PM,
        spans_B4,
        sequences,
        out_THD.stride(0),
        q_THD.stride(0),
        *cache_strides(cache),
        *_numbers(layer),
    )


def _numbers(layer: AttentionLayer) -> tuple[float, int, float]:
    return layer.scale, layer.window or 0, layer.softcap or 1.0


def _shape_of(q_THD: torch.Tensor, cache: LayerCache, layer: AttentionLayer) -> AttentionShape:
    _, block_size, kv_heads, head_dim = cache.keys_NSKD.shape
    return AttentionShape(
        heads=q_THD.shape[1],
        kv_heads=kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        itemsize=q_THD.dtype.itemsize,
        has_window=layer.window is not None,
        has_softcap=layer.softcap is not None,
        codes=codes_in(cache),
    )


@functools.cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return _INTERPRETED_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count
