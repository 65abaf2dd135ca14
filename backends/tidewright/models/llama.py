"""Llama (also SmolLM and other models with that architecture), on tensor-parallel layers and paged attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tidewright.attention.base import Attention, AttentionLayer
from tidewright.distributed.tensor_parallel import (
    Loader,
    MergedColumnParallelLinear,
    ParallelLMHead,
    QKVParallelLinear,
    RowParallelLinear,
    TensorParallelGroup,
    VocabParallelEmbedding,
    replicated_loader,
)
from tidewright.kv_cache.storage import KVCache
from tidewright.models.config import LlamaConfig
from tidewright.models.rotary import RotaryEmbedding, rotate


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size), requires_grad=False)
        self.eps = eps

    def forward(self, x_TE: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x_TE, self.weight.shape, self.weight, self.eps)


class LlamaAttention(nn.Module):
    def __init__(self, config: LlamaConfig, group: TensorParallelGroup, attention: Attention[Any]) -> None:
        super().__init__()
        self.attention = attention
        self.layer = AttentionLayer(scale=config.head_dim**-0.5)
        self.qkv = QKVParallelLinear(config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim, group)
        self.output = RowParallelLinear(config.num_heads * config.head_dim, config.hidden_size, group)

    def loaders(self, prefix: str) -> dict[str, Loader]:
        return {
            f"{prefix}.q_proj.weight": self.qkv.loader(0),
            f"{prefix}.k_proj.weight": self.qkv.loader(1),
            f"{prefix}.v_proj.weight": self.qkv.loader(2),
            f"{prefix}.o_proj.weight": self.output.loader(),
        }

    def forward(
        self,
        x_TE: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        k_cache_NSKD: torch.Tensor,
        v_cache_NSKD: torch.Tensor,
        metadata: Any,
    ) -> torch.Tensor:
        heads, kv_heads = self.qkv.num_heads, self.qkv.num_kv_heads
        qkv_TXD = self.qkv(x_TE)
        # q and k lie side by side, so both turn in one go.
        qk_TXD = rotate(qkv_TXD[:, : heads + kv_heads], *rotary)
        out_THD = self.attention.forward(
            qk_TXD[:, :heads],
            qk_TXD[:, heads:],
            qkv_TXD[:, heads + kv_heads :],
            k_cache_NSKD,
            v_cache_NSKD,
            metadata,
            self.layer,
        )
        return self.output(out_THD.flatten(1))


class LlamaMLP(nn.Module):
    def __init__(self, config: LlamaConfig, group: TensorParallelGroup) -> None:
        super().__init__()
        sizes = (config.intermediate_size, config.intermediate_size)
        self.gate_up = MergedColumnParallelLinear(config.hidden_size, sizes, group)
        self.down = RowParallelLinear(config.intermediate_size, config.hidden_size, group)

    def loaders(self, prefix: str) -> dict[str, Loader]:
        return {
            f"{prefix}.gate_proj.weight": self.gate_up.loader(0),
            f"{prefix}.up_proj.weight": self.gate_up.loader(1),
            f"{prefix}.down_proj.weight": self.down.loader(),
        }

    def forward(self, x_TE: torch.Tensor) -> torch.Tensor:
        gate_TF, up_TF = self.gate_up(x_TE).chunk(2, dim=-1)
        return self.down(F.silu(gate_TF) * up_TF)


class LlamaLayer(nn.Module):
    def __init__(self, config: LlamaConfig, group: TensorParallelGroup, attention: Attention[Any]) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = LlamaAttention(config, group, attention)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = LlamaMLP(config, group)

    def loaders(self, prefix: str) -> dict[str, Loader]:
        return {
            f"{prefix}.input_layernorm.weight": replicated_loader(self.attention_norm.weight),
            f"{prefix}.post_attention_layernorm.weight": replicated_loader(self.mlp_norm.weight),
            **self.attention.loaders(f"{prefix}.self_attn"),
            **self.mlp.loaders(f"{prefix}.mlp"),
        }

    def forward(
        self,
        x_TE: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        k_cache_NSKD: torch.Tensor,
        v_cache_NSKD: torch.Tensor,
        metadata: Any,
    ) -> torch.Tensor:
        x_TE = x_TE + self.attention(self.attention_norm(x_TE), rotary, k_cache_NSKD, v_cache_NSKD, metadata)
        return x_TE + self.mlp(self.mlp_norm(x_TE))


class LlamaForCausalLM(nn.Module):
    """One forward takes the new tokens of all sequences, prompts and single tokens alike, in one flat row."""

    def __init__(
        self, config: LlamaConfig, max_positions: int, group: TensorParallelGroup, attention: Attention[Any]
    ) -> None:
        super().__init__()
        self.config = config
        self.embedding = VocabParallelEmbedding(config.vocab_size, config.hidden_size, group)
        self.rotary = RotaryEmbedding(config, max_positions)
        layers = [LlamaLayer(config, group, attention) for _ in range(config.num_layers)]
        self.layers = nn.ModuleList(layers)
        self.num_kv_heads = layers[0].attention.qkv.num_kv_heads  # on this rank
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.head = ParallelLMHead(config.vocab_size, config.hidden_size, group)
        if config.tied_embeddings:
            self.head.tie(self.embedding)

    @staticmethod
    def read_config(config: Mapping[str, Any]) -> LlamaConfig:
        return LlamaConfig.from_json(config)

    def loaders(self) -> dict[str, Loader]:
        loaders = {
            "model.embed_tokens.weight": self.embedding.loader(),
            "model.norm.weight": replicated_loader(self.norm.weight),
        }
        if not self.config.tied_embeddings:
            loaders["lm_head.weight"] = self.head.loader()
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, LlamaLayer)
            loaders |= layer.loaders(f"model.layers.{index}")
        return loaders

    def ignored_weights(self) -> frozenset[str]:
        """Weights that some checkpoints carry although they follow from others."""
        names = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(self.config.num_layers)}
        return frozenset(names | {"lm_head.weight"})

    def forward(
        self, token_ids_T: torch.Tensor, positions_T: torch.Tensor, kv_cache: KVCache, metadata: Any
    ) -> torch.Tensor:
        """Hidden states of the last layer. `metadata` is what the attention prepared for this step."""
        x_TE = self.embedding(token_ids_T)
        rotary = self.rotary(positions_T, x_TE.dtype)
        caches = zip(kv_cache.k_cache_LNSKD, kv_cache.v_cache_LNSKD, strict=True)
        for layer, (k_cache_NSKD, v_cache_NSKD) in zip(self.layers, caches, strict=True):
            x_TE = layer(x_TE, rotary, k_cache_NSKD, v_cache_NSKD, metadata)
        return x_TE

    def logits(self, x_BE: torch.Tensor) -> torch.Tensor:
        """logits_BV of the rows of hidden states that need them."""
        return self.head(self.norm(x_BE))
