"""Gemma 2 and 3 (text): Llama with norms after attention and MLP too, scaled embeddings, and caps on logits."""

from __future__ import annotations

import torch

from tidewright.attention.base import Rotation
from tidewright.devices.base import Device
from tidewright.distributed.group import TensorParallelGroup
from tidewright.kv_cache.storage import LayerCache
from tidewright.layers.weights import Loader
from tidewright.models.config import DecoderConfig, LayerConfig
from tidewright.models.llama import LlamaForCausalLM, LlamaLayer, make_norm
from tidewright.step.batch import StepBatch


class GemmaLayer(LlamaLayer):
    is_plain = False

    def __init__(self, config: DecoderConfig, layer: LayerConfig, group: TensorParallelGroup, device: Device) -> None:
        super().__init__(config, layer, group, device)
        self.after_attention_norm = make_norm(config.hidden_size, config, device)
        self.after_mlp_norm = make_norm(config.hidden_size, config, device)

    def loaders(self, prefix: str) -> dict[str, Loader]:
        return {
            **super().loaders(prefix),
            f"{prefix}.post_attention_layernorm.weight": self.after_attention_norm.loader(),
            f"{prefix}.pre_feedforward_layernorm.weight": self.mlp_norm.loader(),
            f"{prefix}.post_feedforward_layernorm.weight": self.after_mlp_norm.loader(),
        }

    def forward(
        self,
        x_TE: torch.Tensor,
        residual_TE: torch.Tensor | None,
        rotation: Rotation,
        cache: LayerCache,
        batch: StepBatch,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x_TE, residual_TE = self.enter(x_TE, residual_TE)
        x_TE = self.after_attention_norm(self.attention(x_TE, rotation, cache, batch))
        x_TE, residual_TE = self.mlp_norm.add(x_TE, residual_TE)
        return self.after_mlp_norm(self.mlp(x_TE, batch)), residual_TE


class GemmaForCausalLM(LlamaForCausalLM):
    layer_class = GemmaLayer

    def embed(self, token_ids_T: torch.Tensor) -> torch.Tensor:
        x_TE = self.embedding(token_ids_T)
        # The models were trained with this factor rounded to their own type.
        return x_TE * torch.tensor(self.config.hidden_size**0.5, dtype=x_TE.dtype).item()

    def logits(self, x_BE: torch.Tensor) -> torch.Tensor | None:
        logits_BV, cap = super().logits(x_BE), self.config.logit_softcap
        return logits_BV if logits_BV is None or cap is None else cap * torch.tanh(logits_BV / cap)
