"""A linear layer's weight in float8 (e4m3) on a GPU: torch's scaled product, with tokens quantized as they come."""

# ruff: noqa: N815 - fields, too, carry their shape

from __future__ import annotations

from dataclasses import dataclass

import torch

from tidewright.devices.cuda.quantized_weight import quantize_tokens
from tidewright.quantization import hardware
from tidewright.quantization.affine import AffineWeight

_MULTIPLE = 16  # of inputs and of outputs, which the product asks for


def multiplies_float8(device: torch.device) -> bool:
    return device.type == "cuda" and hardware.multiplies_float8(torch.cuda.get_device_capability(device))


@dataclass(frozen=True)
class Float8Weight:
    codes_FE: torch.Tensor
    scales_F: torch.Tensor
    """float32; of a weight with one scale, F times the same."""

    @property
    def features(self) -> int:
        return self.codes_FE.shape[0]

    @property
    def nbytes(self) -> int:
        return self.codes_FE.nbytes + self.scales_F.nbytes

    def multiply(self, x_TE: torch.Tensor, bias_F: torch.Tensor | None, out_TF: torch.Tensor) -> torch.Tensor:
        """x w^T + bias. A scale per token and per output needs results in bfloat16, whatever the model has."""
        if len(x_TE):
            tokens = quantize_tokens(x_TE, torch.float8_e4m3fn)
            product_TF = torch._scaled_mm(
                tokens.codes_TE,
                self.codes_FE.t(),
                tokens.scales_T[:, None],
                self.scales_F[None, :],
                out_dtype=torch.bfloat16,
            )
            out_TF.copy_(product_TF if bias_F is None else product_TF + bias_F)
        return out_TF

    def read_rows(self, ids_T: torch.Tensor, out_TE: torch.Tensor) -> torch.Tensor:
        codes_TE = self.codes_FE.view(torch.int8)[ids_T].view(self.codes_FE.dtype)
        return out_TE.copy_(codes_TE.float() * self.scales_F[ids_T, None])


def takes(weight: AffineWeight) -> bool:
    features, depth = weight.codes_FE.shape
    return weight.is_float and weight.group_size >= depth and not features % _MULTIPLE and not depth % _MULTIPLE


def pack_float8(weight: AffineWeight, device: torch.device) -> Float8Weight:
    return Float8Weight(weight.codes_FE.to(device).contiguous(), weight.scales_FG[:, 0].to(device).contiguous())
