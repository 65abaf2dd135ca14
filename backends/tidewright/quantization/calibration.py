"""A text on its way through a model, one layer in memory at a time: what comes into each linear layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from tidewright.attention.reference import ReferenceAttention
from tidewright.devices.cpu.device import CpuDevice
from tidewright.distributed.group import ALONE
from tidewright.engine.plan import ScheduledSequence, StepPlan
from tidewright.kv_cache.storage import KVCache, KVCacheShape
from tidewright.layers.weights import WeightSlice
from tidewright.models.families import read_config
from tidewright.models.folder import read_json
from tidewright.models.llama import LlamaForCausalLM, LlamaLayer
from tidewright.models.registry import model_class
from tidewright.quantization.affine import AffineSource
from tidewright.quantization.gptq_solver import InputProducts
from tidewright.step.batch import StepBatch
from tidewright.step.buffers import StepBuffers, StepLimits

Source = WeightSlice | AffineSource
Hidden = list[tuple[torch.Tensor, torch.Tensor | None]]
"""Of each sequence, as a layer takes it: what is to be added to the residual stream, and that stream."""
LENGTH = 512
"""Tokens of each sequence that the text is cut into."""
_CPU = torch.device("cpu")
# Linear layers that have one input in common, as checkpoints call them, and the module that computes them together.
_JOINED = {
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.output": ("self_attn.o_proj",),
    "mlp.gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down": ("mlp.down_proj",),
}


class CalibrationRun:
    """The hidden states of a text, before the next layer."""

    def __init__(self, folder: Path, token_ids: list[int], weights: Mapping[str, Source]) -> None:
        """Raises ModelConfigError or CheckpointError."""
        config = read_json(folder / "config.json")
        self._architecture, self._config = model_class(config), read_config(config)
        length = min(LENGTH, self._config.max_positions)
        self._sequences = [token_ids[first : first + length] for first in range(0, len(token_ids), length)]
        self._device = CpuDevice(ReferenceAttention(length, _CPU))
        self._limits = StepLimits(1, length, length, length)
        sizes = self._config.num_kv_heads, self._config.head_dim, length, torch.float32
        self._cache = KVCache(KVCacheShape(1, *sizes), 1, self._device.memory)
        self._hidden: Hidden = self._embedded(weights["model.embed_tokens.weight"])

    @torch.inference_mode()
    def _embedded(self, source: Source) -> Hidden:
        """By a model whose vocabulary is the text's own: the whole embedding may be the largest weight of all."""
        ids = sorted({token for sequence in self._sequences for token in sequence})
        width = source.get_shape()[1]
        rows = [_read(source, slice(token, token + 1), slice(0, width)) for token in ids]
        model = self._model(0, len(ids))
        model.embedding.method.get_parameter("weight")[: len(ids)].copy_(torch.cat(rows))
        numbers = {token: number for number, token in enumerate(ids)}
        return [(model.embed(torch.tensor([numbers[t] for t in sequence])), None) for sequence in self._sequences]

    def _model(self, layer: int, vocab_size: int = 1) -> LlamaForCausalLM:
        """With that layer alone, in float32."""
        config = replace(self._config, layers=(self._config.layers[layer],), vocab_size=vocab_size)
        model = self._architecture(config, self._config.max_positions, ALONE, self._device).eval()
        if config.tied_embeddings:
            model.embedding.untie()
        model.head = None
        return model

    def pass_layer(self, number: int, weights: Mapping[str, Source]) -> None:
        """Through layer `number`, whose weights are among `weights`."""
        self._hidden = list(self._through(number, weights))

    def inputs(self, number: int, weights: Mapping[str, Source]) -> dict[str, InputProducts]:
        """What comes into each linear layer of layer `number`, by its name in the checkpoint. The text stays there."""
        products: dict[str, InputProducts] = {}

        def watch(layer: nn.Module) -> ExitStack:
            watching = ExitStack()
            for name, joined in _JOINED.items():
                module = layer.get_submodule(name)
                watching.callback(module.register_forward_pre_hook(_adder(products, joined)).remove)
            return watching

        self._through(number, weights, watch)
        return {f"model.layers.{number}.{name}": found for name, found in products.items()}

    @torch.inference_mode()
    def _through(
        self, number: int, weights: Mapping[str, Source], watch: Callable[[nn.Module], ExitStack] | None = None
    ) -> Hidden:
        model = self._model(number)
        layer, rotary = model.layers[0], model.rotary_of(0)
        assert isinstance(layer, LlamaLayer)
        for name, load in layer.loaders(f"model.layers.{number}").items():
            load(weights[name])  # type: ignore[arg-type]
        buffers, after = StepBuffers(self._limits, _CPU), []
        with watch(layer) if watch else ExitStack():
            for request, (sequence, (x_TE, residual_TE)) in enumerate(zip(self._sequences, self._hidden, strict=True)):
                ended = (request - 1,) if request else ()
                batch = self._batch(buffers, request, sequence, ended)
                # A layer may write into the stream, which before the first one is its input.
                stream = x_TE.clone(), None if residual_TE is None else residual_TE.clone()
                after.append(layer(*stream, rotary(batch.positions_T), self._cache.layers[0], batch))
        return after

    def _batch(self, buffers: StepBuffers, request: int, sequence: list[int], ended: tuple[int, ...]) -> StepBatch:
        plan = StepPlan((ScheduledSequence(request, 0, tuple(sequence), new_blocks=(0,)),), ended=ended)
        batch = buffers.fill(plan)
        self._device.attention.prepare(batch)
        return batch


def _adder(products: dict[str, InputProducts], names: tuple[str, ...]) -> Callable[..., None]:
    def add(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        x_TE = arguments[0]
        found = products.setdefault(names[0], InputProducts(x_TE.shape[-1]))
        found.add(x_TE.flatten(0, -2))
        products.update(dict.fromkeys(names, found))

    return add


def _read(source: Source, rows: slice, columns: slice) -> torch.Tensor:
    if isinstance(source, AffineSource):
        return source.cut(rows, columns).dequantized()
    return source[rows, columns].float()
