"""What engine and models ask of the device that they run on; the answers here are plain torch, for any device."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from tidewright.attention.base import Attention
from tidewright.devices.memory import DeviceMemory
from tidewright.devices.moments import CudaMoment, Moment
from tidewright.layers.linear_method import LinearMethod, PlainLinear
from tidewright.lora.layer import LoraLayer
from tidewright.quantization.choice import NOT_QUANTIZED
from tidewright.quantization.hardware import Hardware
from tidewright.sampling.guided import GuidedDecoding
from tidewright.sampling.sampler import Sampler

if TYPE_CHECKING:
    from tidewright.kv_cache.storage import KVCache
    from tidewright.models.llama import LlamaForCausalLM
    from tidewright.step.batch import StepBatch
    from tidewright.step.buffers import StepBuffers


class DeviceError(ValueError):
    """The device, or what it should compute in, is not to be had here. The message says what is."""


class Device:
    """One of them is made for an engine; layers get what they compute with from it and know no device themselves.

    What a device can do better than torch's own operations, its class overrides.
    """

    compiles = False
    """Kernels are compiled when they are first called."""

    def __init__(self, torch_device: torch.device, attention: Attention, memory: DeviceMemory | None = None) -> None:
        self.torch_device, self.attention = torch_device, attention
        self.quantization = NOT_QUANTIZED
        """Of the model whose layers are made next."""
        self.memory = memory or DeviceMemory(torch_device)

    def __str__(self) -> str:
        return str(self.torch_device)

    def hardware(self, dtype: torch.dtype) -> Hardware:
        """What it multiplies weights in few bits by, in a model that computes in `dtype`."""
        return Hardware(f"{self} without kernels for them")

    # Layers

    def linear_method(self, out_features: int, in_features: int, is_head: bool = False) -> LinearMethod:
        """For a layer's weight, as `quantization` says. `is_head`: it makes logits, and may be a tied embedding."""
        return PlainLinear(out_features, in_features, self.quantization.scheme_of(is_head))

    def embedding_method(self, out_features: int, in_features: int) -> LinearMethod:
        """For an embedding of its own, whose rows are read, never multiplied by."""
        return PlainLinear(out_features, in_features, self.quantization.scheme_of(is_head=True))

    def rms_norm(self, x_TE: torch.Tensor, weight_E: torch.Tensor, eps: float) -> torch.Tensor:
        """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in x's type.

        A float32 weight beside a narrower x (Gemma's) means that only the product is rounded.
        """
        if weight_E.dtype != x_TE.dtype:
            return F.rms_norm(x_TE.to(weight_E.dtype), weight_E.shape, weight_E, eps).to(x_TE.dtype)
        return F.rms_norm(x_TE, weight_E.shape, weight_E, eps)

    def add_rms_norm(
        self, x_TE: torch.Tensor, residual_TE: torch.Tensor, weight_E: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The norm of x + residual, and that sum: the residual stream after this addition.

        The sum may take the place of `residual_TE` in memory.
        """
        residual_TE = x_TE + residual_TE
        return self.rms_norm(residual_TE, weight_E, eps), residual_TE

    def silu_and_mul(self, gate_up_TF2: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up of [gate, up] side by side."""
        gate_TF, up_TF = gate_up_TF2.chunk(2, dim=-1)
        return F.silu(gate_TF) * up_TF

    def gelu_tanh_and_mul(self, gate_up_TF2: torch.Tensor) -> torch.Tensor:
        """gelu(gate) * up of [gate, up] side by side, with the tanh approximation of gelu."""
        gate_TF, up_TF = gate_up_TF2.chunk(2, dim=-1)
        return F.gelu(gate_TF, approximate="tanh") * up_TF

    def lora_layer(self, part_features: Sequence[int], in_features: int, slots: int, max_rank: int) -> LoraLayer:
        """What adapters add to a linear layer of these projections, `max_rank` at most each."""
        return LoraLayer(part_features, slots)

    def adapter_memory(self, size: int) -> torch.Tensor:
        """[size] bytes on the host, for one adapter. Called beside all else."""
        return torch.empty(size, dtype=torch.uint8)

    # Steps

    def finish(self, model: LlamaForCausalLM) -> None:
        """To be called when all weights are loaded and stay."""
        for module in model.modules():
            if isinstance(module, LinearMethod):
                module.finish()

    def decode_sizes(self, most: int) -> tuple[int, ...]:
        """The numbers of sequences, up to `most`, to which it wants steps of single tokens padded, in order."""
        return ()

    def prepare(self, model: LlamaForCausalLM, kv_cache: KVCache, buffers: StepBuffers) -> None:
        """To be called before the first step, if there will be decodes."""

    def resized(self, model: LlamaForCausalLM, kv_cache: KVCache, buffers: StepBuffers, is_elsewhere: bool) -> None:
        """The cache has another number of blocks, and its layers may have other memory. No `prepare` is needed."""
        if is_elsewhere:
            self.prepare(model, kv_cache, buffers)

    def step(self, cache: KVCache, newest_block: int) -> AbstractContextManager[None]:
        """Around each step; `newest_block` is the highest that it uses."""
        return contextlib.nullcontext()

    def forward(self, model: LlamaForCausalLM, batch: StepBatch, kv_cache: KVCache) -> torch.Tensor:
        """Hidden states of the model's last layer."""
        self.attention.prepare(batch)
        hidden_TE: torch.Tensor = model(batch, kv_cache)
        return hidden_TE

    def sampler(self, guided: GuidedDecoding) -> Sampler:
        """For one model."""
        return Sampler(guided)

    def moment(self) -> Moment:
        """When it has done all that it was given so far."""
        return CudaMoment(self.torch_device) if self.torch_device.type == "cuda" else Moment()
