"""Gemma 2 and 3 (text): Llama with norms after attention and MLP too, scaled embeddings, and caps on logits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from tidewright.attention.base import Attention
from tidewright.distributed.group import TensorParallelGroup
from tidewright.distributed.tensor_parallel import Loader
from tidewright.models.config import FULL, SLIDING, DecoderConfig, LayerConfig
from tidewright.models.llama import LlamaForCausalLM, LlamaLayer, RMSNorm

# What transformers takes where config.json leaves it out.
_DEFAULTS = {
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}


class GemmaLayer(LlamaLayer):
    is_plain = False

    def __init__(
        self, config: DecoderConfig, layer: LayerConfig, group: TensorParallelGroup, attention: Attention[Any]
    ) -> None:
        super().__init__(config, layer, group, attention)
        self.after_attention_norm = RMSNorm(config.hidden_size, config)
        self.after_mlp_norm = RMSNorm(config.hidden_size, config)

    def loaders(self, prefix: str) -> dict[str, Loader]:
        return {
            **super().loaders(prefix),
            f"{prefix}.post_attention_layernorm.weight": self.after_attention_norm.loader(),
            f"{prefix}.pre_feedforward_layernorm.weight": self.mlp_norm.loader(),
            f"{prefix}.post_feedforward_layernorm.weight": self.after_mlp_norm.loader(),
        }

    def forward(
        self, x_TE: torch.Tensor, residual_TE: torch.Tensor | None, *attention_inputs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x_TE, residual_TE = self.enter(x_TE, residual_TE)
        x_TE = self.after_attention_norm(self.attention(x_TE, *attention_inputs))
        x_TE, residual_TE = self.mlp_norm.add(x_TE, residual_TE)
        return self.after_mlp_norm(self.mlp(x_TE)), residual_TE


class Gemma2ForCausalLM(LlamaForCausalLM):
    layer_class = GemmaLayer

    @staticmethod
    def read_config(config: Mapping[str, Any]) -> DecoderConfig:
        caps = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
        return _read({**_DEFAULTS, **caps, **config}, pattern=2)

    def embed(self, token_ids_T: torch.Tensor) -> torch.Tensor:
        x_TE = self.embedding(token_ids_T)
        # The models were trained with this factor rounded to their own type.
        return x_TE * torch.tensor(self.config.hidden_size**0.5, dtype=x_TE.dtype).item()

    def logits(self, x_BE: torch.Tensor) -> torch.Tensor | None:
        logits_BV, cap = super().logits(x_BE), self.config.logit_softcap
        return logits_BV if logits_BV is None or cap is None else cap * torch.tanh(logits_BV / cap)


class Gemma3ForCausalLM(Gemma2ForCausalLM):
    @staticmethod
    def read_config(config: Mapping[str, Any]) -> DecoderConfig:
        ropes = config.get("rope_parameters") or {}
        if FULL not in ropes:  # as transformers 4 wrote it
            ropes = {
                FULL: {"rope_theta": config.get("rope_theta", 1e6), **(config.get("rope_scaling") or {})},
                SLIDING: {"rope_theta": config.get("rope_local_base_freq", 1e4)},
            }
        config = {**_DEFAULTS, **config, "rope_parameters": ropes, "rope_scaling": None}
        return replace(_read(config, config.get("sliding_window_pattern", 6)), qk_norm=True)


def _read(config: Mapping[str, Any], pattern: int) -> DecoderConfig:
    """One layer in `pattern` sees everything, the others have the window."""
    return replace(
        DecoderConfig.from_json(config, slides=lambda layer: (layer + 1) % pattern != 0),
        attention_scale=config["query_pre_attn_scalar"] ** -0.5,
        attention_softcap=config.get("attn_logit_softcapping"),
        logit_softcap=config.get("final_logit_softcapping"),
        norm_adds_one=True,
    )
