"""An NVIDIA GPU: our kernels in the Triton language between torch's products."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from tidewright.devices.base import Device
from tidewright.devices.cuda import activations, norms
from tidewright.devices.cuda.attention import PagedCudaAttention
from tidewright.devices.cuda.float8_weight import multiplies_float8
from tidewright.devices.cuda.graphs import CudaRecorder, DecodeGraphs, Recorder, sizes_of
from tidewright.devices.cuda.lora import CudaLora
from tidewright.devices.cuda.quantized_linear import CudaQuantizedLinear
from tidewright.devices.cuda.sampler import CudaSampler
from tidewright.devices.memory import DeviceMemory
from tidewright.layers.linear_method import LinearMethod
from tidewright.lora.layer import LoraLayer
from tidewright.quantization.hardware import Hardware, of_card
from tidewright.sampling.guided import GuidedDecoding

if TYPE_CHECKING:
    from tidewright.kv_cache.storage import KVCache
    from tidewright.models.llama import LlamaForCausalLM
    from tidewright.step.batch import StepBatch
    from tidewright.step.buffers import StepBuffers

log = logging.getLogger(__name__)


class CudaDevice(Device):
    """Decodes are replayed from CUDA graphs, except on tensor-parallel ranks."""

    def __init__(
        self, torch_device: torch.device, memory: DeviceMemory | None = None, recorder: Recorder | None = None
    ) -> None:
        """Without `recorder`, a GPU has CUDA's graphs, and another device none."""
        super().__init__(torch_device, PagedCudaAttention(), memory)
        self._recorder = recorder or (CudaRecorder(torch_device) if torch_device.type == "cuda" else None)
        self._graphs: DecodeGraphs | None = None
        self.compiles = torch_device.type == "cuda"  # elsewhere they are interpreted

    def hardware(self, dtype: torch.dtype) -> Hardware:
        is_card = self.torch_device.type == "cuda"
        name = torch.cuda.get_device_name(self.torch_device) if is_card else str(self)
        return of_card(name, multiplies_float8(self.torch_device))

    def linear_method(self, out_features: int, in_features: int, is_head: bool = False) -> LinearMethod:
        chosen = self.quantization
        if not (chosen.scheme_of(is_head) or chosen.is_stored):
            return super().linear_method(out_features, in_features, is_head)
        device, dtype = self.torch_device, torch.get_default_dtype()
        return CudaQuantizedLinear(out_features, in_features, chosen, is_head, device, dtype)

    def embedding_method(self, out_features: int, in_features: int) -> LinearMethod:
        return self.linear_method(out_features, in_features, is_head=True)

    def rms_norm(self, x_TE: torch.Tensor, weight_E: torch.Tensor, eps: float) -> torch.Tensor:
        if weight_E.shape[0] > norms.MAX_SIZE:
            return super().rms_norm(x_TE, weight_E, eps)
        return norms.rms_norm(x_TE, weight_E, eps)

    def add_rms_norm(
        self, x_TE: torch.Tensor, residual_TE: torch.Tensor, weight_E: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if weight_E.shape[0] > norms.MAX_SIZE:
            return super().add_rms_norm(x_TE, residual_TE, weight_E, eps)
        return norms.add_rms_norm(x_TE, residual_TE, weight_E, eps)

    def silu_and_mul(self, gate_up_TF2: torch.Tensor) -> torch.Tensor:
        return activations.silu_and_mul(gate_up_TF2)

    def gelu_tanh_and_mul(self, gate_up_TF2: torch.Tensor) -> torch.Tensor:
        return activations.gelu_tanh_and_mul(gate_up_TF2)

    def lora_layer(self, part_features: Sequence[int], in_features: int, slots: int, max_rank: int) -> LoraLayer:
        return CudaLora(part_features, in_features, slots, max_rank)

    def sampler(self, guided: GuidedDecoding) -> CudaSampler:
        return CudaSampler(guided, self.torch_device)

    def decode_sizes(self, most: int) -> tuple[int, ...]:
        return sizes_of(most) if self._recorder else ()

    @torch.inference_mode()
    def prepare(self, model: LlamaForCausalLM, kv_cache: KVCache, buffers: StepBuffers) -> None:
        if not self._recorder or model.group.size > 1:
            return
        log.info("recording CUDA graphs of %d batch sizes", len(buffers.sizes))
        self._graphs = None  # those that there were knew another cache
        began, before = time.monotonic(), self.memory.free()
        compute = functools.partial(super().forward, model, kv_cache=kv_cache)
        self._graphs = DecodeGraphs(self._recorder, buffers.sizes, buffers.decodes, compute, buffers.has_adapters)
        if lacks := self._graphs.lacks:
            sizes, lack = ", ".join(map(str, sorted(lacks))), next(iter(lacks.values()))
            log.warning("no CUDA graphs for decodes of %s sequences, which are slower: %s", sizes, lack)
        took, mib = time.monotonic() - began, (before - self.memory.free()) / 2**20
        log.info("recorded CUDA graphs in %.1f s; they take %.0f MiB", took, mib)

    def forward(self, model: LlamaForCausalLM, batch: StepBatch, kv_cache: KVCache) -> torch.Tensor:
        if self._graphs is None or not self._graphs.has(batch):
            return super().forward(model, batch, kv_cache)
        model.layers_computed.value += len(model.layers)
        return self._graphs.forward(batch)
