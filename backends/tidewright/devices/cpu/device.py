"""A CPU: our kernels where they take the numbers at hand, torch where not."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from tidewright.attention.base import Attention
from tidewright.devices.base import Device
from tidewright.devices.cpu.build import processor
from tidewright.devices.cpu.fusion import fuse_layers
from tidewright.devices.cpu.huge_pages import huge_empty
from tidewright.devices.cpu.kernels import kernels_for, kernels_of
from tidewright.devices.cpu.layer import CpuLayers, LayerStep
from tidewright.devices.cpu.linear import CpuLinear, native_rows
from tidewright.devices.cpu.lora import CpuLora
from tidewright.devices.cpu.memory import CpuMemory
from tidewright.devices.cpu.prefault import Prefaulter
from tidewright.devices.cpu.quantized import quantized_kernels_of
from tidewright.devices.cpu.quantized_linear import CpuQuantizedLinear
from tidewright.devices.cpu.sampling import cpu_choice
from tidewright.devices.cpu.step_threads import StepThreads
from tidewright.layers.linear_method import LinearMethod
from tidewright.lora.layer import LoraLayer
from tidewright.quantization.hardware import Hardware, of_processor
from tidewright.sampling.guided import GuidedDecoding
from tidewright.sampling.sampler import Sampler

if TYPE_CHECKING:
    from tidewright.kv_cache.storage import KVCache
    from tidewright.models.llama import LlamaForCausalLM
    from tidewright.step.batch import StepBatch
    from tidewright.step.buffers import StepBuffers


class CpuDevice(Device):
    """Steps of few rows go through all layers in one call, see layer.py; results are the same to the bit."""

    def __init__(self, attention: Attention, threads: StepThreads | None = None) -> None:
        """Without `threads`, steps compute with as many as torch has."""
        memory = CpuMemory()
        super().__init__(torch.device("cpu"), attention, memory)
        self._weights = memory.weights
        self._layers: CpuLayers | None = None
        self.fused_rows = 0  # that go through them
        self._threads = threads or StepThreads(torch.get_num_threads(), None)
        self._prefaulter: Prefaulter | None = None

    def hardware(self, dtype: torch.dtype) -> Hardware:
        return of_processor(processor().features, quantized_kernels_of(dtype) is not None)

    def linear_method(self, out_features: int, in_features: int, is_head: bool = False) -> LinearMethod:
        if quantized := self._quantized(out_features, in_features, is_head):
            return quantized
        return CpuLinear(out_features, in_features, self.quantization.scheme_of(is_head))

    def embedding_method(self, out_features: int, in_features: int) -> LinearMethod:
        quantized = self._quantized(out_features, in_features, is_head=True)
        return quantized or super().embedding_method(out_features, in_features)

    def _quantized(self, out_features: int, in_features: int, is_head: bool) -> LinearMethod | None:
        """None: the weight stays as it is, or torch has to do it."""
        kernels, chosen = quantized_kernels_of(torch.get_default_dtype()), self.quantization
        scheme = chosen.scheme_of(is_head)
        if kernels is None or not (scheme or chosen.is_stored):
            return None
        return CpuQuantizedLinear(out_features, in_features, scheme, kernels, self._weights.take, is_head)

    def rms_norm(self, x_TE: torch.Tensor, weight_E: torch.Tensor, eps: float) -> torch.Tensor:
        if weight_E.dtype == x_TE.dtype and (kernels := kernels_for(x_TE)):
            return kernels.rms_norm(x_TE, weight_E, eps)
        return super().rms_norm(x_TE, weight_E, eps)

    def add_rms_norm(
        self, x_TE: torch.Tensor, residual_TE: torch.Tensor, weight_E: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if weight_E.dtype == x_TE.dtype and (kernels := kernels_for(x_TE)):
            return kernels.add_rms_norm(x_TE, residual_TE, weight_E, eps)
        return super().add_rms_norm(x_TE, residual_TE, weight_E, eps)

    def silu_and_mul(self, gate_up_TF2: torch.Tensor) -> torch.Tensor:
        if kernels := kernels_for(gate_up_TF2):
            return kernels.silu_and_mul(gate_up_TF2)
        return super().silu_and_mul(gate_up_TF2)

    def lora_layer(self, part_features: Sequence[int], in_features: int, slots: int, max_rank: int) -> LoraLayer:
        dtype = torch.get_default_dtype()
        if kernels_of(dtype) is None:
            return super().lora_layer(part_features, in_features, slots, max_rank)
        return CpuLora(part_features, in_features, slots, max_rank, dtype)

    def adapter_memory(self, size: int) -> torch.Tensor:
        return huge_empty(size)  # steps read all of it

    def finish(self, model: LlamaForCausalLM) -> None:
        super().finish(model)
        if layers := fuse_layers(model):
            self._layers = layers
            # A plain weight, which a quantized checkpoint may have as well, has a faster way for many rows.
            self.fused_rows = sys.maxsize if layers.are_quantized else native_rows(model.dtype)

    @contextmanager
    def step(self, cache: KVCache, newest_block: int) -> Iterator[None]:
        if self._prefaulter is None:
            self._prefaulter = Prefaulter(cache)
        with self._threads.step(), self._prefaulter.step(newest_block):
            yield

    def resized(self, model: LlamaForCausalLM, kv_cache: KVCache, buffers: StepBuffers, is_elsewhere: bool) -> None:
        if self._prefaulter:
            self._prefaulter.resized()

    def forward(self, model: LlamaForCausalLM, batch: StepBatch, kv_cache: KVCache) -> torch.Tensor:
        if not self._layers or len(batch.token_ids_T) > self.fused_rows:
            return super().forward(model, batch, kv_cache)
        indices = batch.positions_T, batch.slots_T, batch.spans_B4, batch.tables_PM
        step = LayerStep(model.embed(batch.token_ids_T), *indices, kv_cache, batch.adapters, model.layers_computed)
        self._layers.run(step)
        return step.hidden()

    def sampler(self, guided: GuidedDecoding) -> Sampler:
        return Sampler(guided, cpu_choice())
