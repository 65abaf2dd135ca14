"""An NVIDIA GPU: our kernels in the Triton language between torch's products."""

from __future__ import annotations

import torch

from tidewright.devices.base import Device
from tidewright.devices.cuda import activations, norms
from tidewright.devices.cuda.attention import PagedCudaAttention
from tidewright.devices.cuda.sampler import CudaSampler
from tidewright.devices.memory import DeviceMemory
from tidewright.sampling.guided import GuidedDecoding


class CudaDevice(Device):
    def __init__(self, torch_device: torch.device, memory: DeviceMemory | None = None) -> None:
        super().__init__(torch_device, PagedCudaAttention(), memory)

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

    def sampler(self, guided: GuidedDecoding) -> CudaSampler:
        return CudaSampler(guided, self.torch_device)
