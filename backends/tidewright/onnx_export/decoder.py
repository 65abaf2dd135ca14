"""A model class as an ONNX graph: inputs and outputs, and which weights they need. Weights themselves: weights.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper

from tidewright.devices.base import Device
from tidewright.distributed.group import ALONE
from tidewright.models.config import DecoderConfig
from tidewright.models.llama import LlamaForCausalLM
from tidewright.onnx_export.attention import OnnxAttention, Step
from tidewright.onnx_export.int8 import DOMAIN
from tidewright.onnx_export.symbols import ROWS, Graph, Symbol

OPSET = 23  # the first with Attention, RotaryEmbedding and RMSNormalization
IR_VERSION = 11


def decoder_graph(architecture: type[LlamaForCausalLM], config: DecoderConfig, int8: bool) -> onnx.ModelProto:
    """The whole model without its weights: `initializer` holds small constants only.

    Weights keep the names that the model class gives its parameters and buffers.
    """
    with torch.device("meta"):
        attention = OnnxAttention()
        device = Device(torch.device("meta"), attention)
        model = architecture(config, config.max_positions, ALONE, device).eval()
    tensors = [*model.named_parameters(), *model.named_buffers()]
    graph = Graph({id(tensor): name for name, tensor in tensors}, int8)
    layers = range(config.num_layers)
    past = [(f"past_key_values.{layer}.key", f"past_key_values.{layer}.value") for layer in layers]
    attention.step = step = Step(graph, config.num_kv_heads)

    rows = Symbol(graph, graph.one("Reshape", "input_ids", np.array([-1])), (ROWS,))
    hidden_RE: Any = model(_Batch(rows), _Past(past))
    # Only the last token of each sequence goes through the head, which is the largest of all products.
    shape = graph.one("Concat", graph.one("Shape", "input_ids"), np.array([config.hidden_size]), axis=0)
    last_BE = graph.one("Gather", graph.one("Reshape", hidden_RE, shape), np.int64(-1), axis=1)
    logits: Any = model.logits(Symbol(graph, last_BE, (ROWS, config.hidden_size)))  # type: ignore[arg-type]

    present = [(f"present.{layer}.key", f"present.{layer}.value") for layer in layers]
    for inner, outer in zip(step.present, present, strict=True):
        for source, name in zip(inner, outer, strict=True):
            graph.nodes.append(helper.make_node("Identity", [source], [name]))
    graph.nodes.append(helper.make_node("Identity", [logits.name], ["logits"]))
    inputs = [_ids("input_ids", "new"), _ids("attention_mask", "total"), _ids("position_ids", "new")]
    inputs += [_cache(name, config, "past") for pair in past for name in pair]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", config.vocab_size])]
    outputs += [_cache(name, config, "total") for pair in present for name in pair]
    proto = helper.make_graph(graph.nodes, "decoder", inputs, outputs, list(graph.constants.values()))
    opsets = [helper.make_opsetid("", OPSET), *([helper.make_opsetid(DOMAIN, 1)] if int8 else [])]
    return helper.make_model(proto, opset_imports=opsets, ir_version=IR_VERSION, producer_name="tidewright")


class _Batch:
    """Stands for the step's batch: OnnxAttention has names for all else."""

    def __init__(self, token_ids: Symbol) -> None:
        self.token_ids_T, self.positions_T, self.adapters = token_ids, None, None


class _Past:
    """Stands for the KV cache: names in place of tensors, as OnnxAttention takes them."""

    def __init__(self, names: list[tuple[str, str]]) -> None:
        self.layers = names


def _ids(name: str, length: str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", length])


def _cache(name: str, config: DecoderConfig, length: str) -> onnx.ValueInfoProto:
    shape: list[str | int | None] = ["batch", config.num_kv_heads, length, config.head_dim]
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
