"""Attention as nodes of the graph: the cache comes in as tensors and goes out longer. Not: anything that computes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from onnx import TensorProto

from tidewright.attention.base import Attention, AttentionLayer, Rotation
from tidewright.onnx_export.symbols import ROWS, Graph, Symbol
from tidewright.step.batch import StepBatch

# Not -inf: a row of padding sees nothing, and the standard makes NaN of the softmax of nothing, which would spread
_HIDDEN = np.float32(-1e30)


@dataclass
class Step:
    """What the layers share, by names of the graph's tensors; and what they leave behind."""

    graph: Graph
    kv_heads: int
    masks: dict[int | None, str] = field(default_factory=dict)
    shapes: dict[int, str] = field(default_factory=dict)
    present: list[tuple[str, str]] = field(default_factory=list)

    def mask(self, window: int | None) -> str:
        """mask_B1TC of float32, made by the first layer with this window: 0 where there is something to see.

        Sequences end together, padding is on the left, so distances in the row are distances in the sequence.
        """
        if window not in self.masks:
            one, zero = np.int64(1), np.int64(0)
            total = self.graph.one("Squeeze", self.graph.one("Shape", "attention_mask", start=1, end=2))
            new = self.graph.one("Squeeze", self.graph.one("Shape", "input_ids", start=1, end=2))
            keys_C = self.graph.one("Range", zero, total, one)
            queries_T = self.graph.one("Range", self.graph.one("Sub", total, new), total, one)
            queries_T1 = self.graph.one("Unsqueeze", queries_T, np.array([1]))
            seen_TC = self.graph.one("LessOrEqual", keys_C, queries_T1)
            if window is not None:
                near_TC = self.graph.one("Greater", keys_C, self.graph.one("Sub", queries_T1, np.int64(window)))
                seen_TC = self.graph.one("And", seen_TC, near_TC)
            real_BC = self.graph.one("Cast", "attention_mask", to=TensorProto.BOOL)
            real_B11C = self.graph.one("Unsqueeze", real_BC, np.array([1, 2]))
            seen_B1TC = self.graph.one("And", seen_TC, real_B11C)
            self.masks[window] = self.graph.one("Where", seen_B1TC, np.float32(0), _HIDDEN)
        return self.masks[window]

    def heads(self, x_RXD: Symbol) -> str:
        """x_BXTD of the rows of all sequences."""
        _, heads, head_dim = x_RXD.shape
        if heads not in self.shapes:
            batch_and_new = self.graph.one("Shape", "input_ids")
            self.shapes[heads] = self.graph.one("Concat", batch_and_new, np.array([heads, head_dim]), axis=0)
        return self.graph.one("Transpose", self.graph.one("Reshape", x_RXD, self.shapes[heads]), perm=[0, 2, 1, 3])


class OnnxAttention(Attention):
    """A layer's cache is two names of past_key_values. A graph is made once; `step` is what all steps share."""

    step: Step

    def forward(
        self,
        qkv_TXD: Any,
        rotation: Rotation,
        cache: Any,
        batch: StepBatch,
        layer: AttentionLayer,
    ) -> Any:
        step = self.step
        graph, kv_heads = step.graph, step.kv_heads
        heads = qkv_TXD.shape[1] - 2 * kv_heads
        q, k, v = (step.heads(x) for x in qkv_TXD.split([heads, kv_heads, kv_heads], 1))
        tables = (rotation.cos_PD, rotation.sin_PD, "position_ids")
        q, k = (graph.one("RotaryEmbedding", x, *tables) for x in (q, k))
        out_BHTD, key, value = graph.call(
            "Attention",
            q,
            k,
            v,
            step.mask(layer.window),
            *cache,
            outputs=3,
            scale=layer.scale,
            softcap=layer.softcap or 0.0,
        )
        step.present.append((key, value))
        out_BTHD = graph.one("Transpose", out_BHTD, perm=[0, 2, 1, 3])
        head_dim = qkv_TXD.shape[2]
        return Symbol(graph, graph.one("Reshape", out_BTHD, np.array([-1, heads, head_dim])), (ROWS, heads, head_dim))
