"""The adapters of one model: their weights in the host's memory by name, and some of them in the device's slots."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from tidewright.devices.base import Device
from tidewright.layers.tensor_parallel import LinearLayer, Projection
from tidewright.lora.adapter import Adapter, LowRank, Update
from tidewright.lora.checkpoint import AdapterLimits, Shape, read_adapter
from tidewright.models.llama import LlamaForCausalLM


def make_lora_layers(model: LlamaForCausalLM, device: Device, slots: int, max_rank: int) -> None:
    """Lets adapters add to all projections of a model, which need not be loaded yet."""
    for projection in model.projections().values():
        layer = projection.layer
        if layer.lora is None:
            features = [part.count for part in layer.parts]
            layer.lora = device.lora_layer(features, layer.columns.count, slots, max_rank)


class LoraModel:
    """`read` may run beside all else; the rest is for the thread that runs the steps."""

    def __init__(
        self, projections: Mapping[str, Projection], limits: AdapterLimits, allocate: Callable[[int], torch.Tensor]
    ) -> None:
        """Of a model with LoRA layers. `allocate`: so many bytes for an adapter."""
        self._limits, self._projections, self._allocate = limits, projections, allocate
        self._shapes = {name: Shape(one.rows, one.columns) for name, one in projections.items()}
        self._layers: dict[LinearLayer, dict[int, str]] = {}  # by part, the projection's name
        for name, projection in projections.items():
            self._layers.setdefault(projection.layer, {})[projection.part] = name
        self._adapters: dict[str, Adapter] = {}
        self._slots: dict[int, str] = {}

    def read(self, path: str) -> Adapter:
        """Raises AdapterError."""
        return self._side_by_side(read_adapter(path, self._shapes, self._limits, self._arranged))

    def _arranged(self, name: str, update: LowRank) -> Update:
        layer = self._projections[name].layer
        assert layer.lora is not None
        return layer.lora.arranged(update)

    def _side_by_side(self, adapter: Adapter) -> Adapter:
        """Its matrices in one piece of memory, in the order in which a step reads them."""
        updates = adapter.updates
        layers = [[name for name in parts.values() if name in updates] for parts in self._layers.values()]
        matrices = [
            matrix
            for names in layers
            for matrix in (*(updates[name].a for name in names), *(updates[name].b for name in names))
        ]
        memory = self._allocate(sum(matrix.nbytes for matrix in matrices)).view(self._limits.dtype)
        placed: dict[int, torch.Tensor] = {}
        for matrix, piece in zip(matrices, memory.split([matrix.numel() for matrix in matrices]), strict=True):
            placed[id(matrix)] = piece.view_as(matrix).copy_(matrix)
        moved = {name: replace(one, a=placed[id(one.a)], b=placed[id(one.b)]) for name, one in updates.items()}
        return replace(adapter, updates=moved)

    def add(self, name: str, adapter: Adapter) -> None:
        self._adapters[name] = adapter

    def remove(self, name: str) -> None:
        """No sequence has it."""
        del self._adapters[name]
        for slot in [slot for slot, other in self._slots.items() if other == name]:
            del self._slots[slot]
            for layer in self._layers:
                assert layer.lora is not None
                layer.lora.clear(slot)

    def put(self, slot: int, name: str) -> None:
        """Lets the slot hold the adapter from the next step on."""
        updates = self._adapters[name].updates
        self._slots[slot] = name
        for layer, parts in self._layers.items():
            assert layer.lora is not None
            layer.lora.put(slot, [updates.get(parts[part]) for part in range(len(parts))])
