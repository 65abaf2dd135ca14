"""Llama (also SmolLM and others of that architecture): the decoder that all families share.

It runs on tensor-parallel layers and paged attention. mistral.py, qwen.py and gemma.py say what differs there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tidewright.attention.base import Attention, AttentionLayer, Rotation
from tidewright.devices.cpu.attention import NativeCpuAttention
from tidewright.devices.cpu.layer import CpuLayer, LayerParts, LayerStep, Weight
from tidewright.devices.cpu.linear import native_rows
from tidewright.distributed.group import TensorParallelGroup
from tidewright.kv_cache.storage import KVCache
from tidewright.layers.rotary import RotaryEmbedding
from tidewright.layers.tensor_parallel import (
    Loader,
    MergedColumnParallelLinear,
    ParallelLMHead,
    QKVParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    replicated_loader,
)
from tidewright.models.config import DecoderConfig, LayerConfig
from tidewright.models.ops import add_rms_norm, gelu_tanh_and_mul, rms_norm, silu_and_mul
from tidewright.step.batch import StepBatch


class RMSNorm(nn.Module):
    def __init__(self, size: int, config: DecoderConfig) -> None:
        super().__init__()
        # 1 + weight is kept in float32: the small weights would vanish in a sum of fewer digits.
        dtype = torch.float32 if config.norm_adds_one else None
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype), requires_grad=False)
        self.offset = 1.0 if config.norm_adds_one else 0.0
        self.eps = config.norm_eps

    def loader(self) -> Loader:
        return replicated_loader(self.weight, self.offset)

    def forward(self, x_TE: torch.Tensor) -> torch.Tensor:
        return rms_norm(x_TE, self.weight, self.eps)

    def add(self, x_TE: torch.Tensor, residual_TE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds x to the residual stream; returns the norm of the stream, and the stream."""
        return add_rms_norm(x_TE, residual_TE, self.weight, self.eps)


class LlamaAttention(nn.Module):
    def __init__(
        self, config: DecoderConfig, layer: LayerConfig, group: TensorParallelGroup, attention: Attention
    ) -> None:
        super().__init__()
        self.attention = attention
        self.layer = AttentionLayer(config.attention_scale, layer.window, config.attention_softcap)
        self.qkv = QKVParallelLinear(
            config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim, group, config.qkv_bias
        )
        heads, _ = group.cut_heads(config.num_heads, config.num_kv_heads)
        self.output = RowParallelLinear(heads.of(config.head_dim), config.hidden_size, group, config.output_bias)
        self.q_norm = RMSNorm(config.head_dim, config) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config) if config.qk_norm else None

    def loaders(self, prefix: str) -> dict[str, Loader]:
        loaders = {
            **self.qkv.loaders(f"{prefix}.q_proj", 0),
            **self.qkv.loaders(f"{prefix}.k_proj", 1),
            **self.qkv.loaders(f"{prefix}.v_proj", 2),
            **self.output.loaders(f"{prefix}.o_proj"),
        }
        if self.q_norm and self.k_norm:
            loaders[f"{prefix}.q_norm.weight"] = self.q_norm.loader()
            loaders[f"{prefix}.k_norm.weight"] = self.k_norm.loader()
        return loaders

    def forward(
        self,
        x_TE: torch.Tensor,
        rotation: Rotation,
        k_cache_NSKD: torch.Tensor,
        v_cache_NSKD: torch.Tensor,
        batch: StepBatch,
    ) -> torch.Tensor:
        qkv_TXD = self.qkv(x_TE)
        if self.q_norm and self.k_norm:
            q_THD, k_TKD, v_TKD = qkv_TXD.tensor_split(
                (self.qkv.num_heads, self.qkv.num_heads + self.qkv.num_kv_heads), dim=1
            )
            qkv_TXD = torch.cat((self.q_norm(q_THD), self.k_norm(k_TKD), v_TKD), dim=1)
        out_THD = self.attention.forward(qkv_TXD, rotation, k_cache_NSKD, v_cache_NSKD, batch, self.layer)
        return self.output(out_THD.flatten(1))


class LlamaMLP(nn.Module):
    def __init__(self, config: DecoderConfig, group: TensorParallelGroup) -> None:
        super().__init__()
        sizes = (config.intermediate_size, config.intermediate_size)
        self.gate_up = MergedColumnParallelLinear(config.hidden_size, sizes, group, config.mlp_bias)
        self.down = RowParallelLinear(group.cut(config.intermediate_size), config.hidden_size, group, config.mlp_bias)
        self.activate = {"silu": silu_and_mul, "gelu_pytorch_tanh": gelu_tanh_and_mul}[config.activation]

    def loaders(self, prefix: str) -> dict[str, Loader]:
        return {
            **self.gate_up.loaders(f"{prefix}.gate_proj", 0),
            **self.gate_up.loaders(f"{prefix}.up_proj", 1),
            **self.down.loaders(f"{prefix}.down_proj"),
        }

    def forward(self, x_TE: torch.Tensor) -> torch.Tensor:
        return self.down(self.activate(self.gate_up(x_TE)))


class LlamaLayer(nn.Module):
    is_plain = True  # its forward is the one below

    def __init__(
        self, config: DecoderConfig, layer: LayerConfig, group: TensorParallelGroup, attention: Attention
    ) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config)
        self.attention = LlamaAttention(config, layer, group, attention)
        self.mlp_norm = RMSNorm(config.hidden_size, config)
        self.mlp = LlamaMLP(config, group)

    def loaders(self, prefix: str) -> dict[str, Loader]:
        return {
            f"{prefix}.input_layernorm.weight": self.attention_norm.loader(),
            f"{prefix}.post_attention_layernorm.weight": self.mlp_norm.loader(),
            **self.attention.loaders(f"{prefix}.self_attn"),
            **self.mlp.loaders(f"{prefix}.mlp"),
        }

    def forward(
        self,
        x_TE: torch.Tensor,
        residual_TE: torch.Tensor | None,
        *attention_inputs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Takes and returns the residual stream, and before it what is still to be added to it.

        `attention_inputs` go to the attention as they are.
        """
        x_TE, residual_TE = self.enter(x_TE, residual_TE)
        x_TE = self.attention(x_TE, *attention_inputs)
        x_TE, residual_TE = self.mlp_norm.add(x_TE, residual_TE)
        return self.mlp(x_TE), residual_TE

    def parts(self, rotary: RotaryEmbedding) -> LayerParts | None:
        """For running it in few calls; None where it is not one that can be."""
        attention, norm = self.attention, self.attention_norm
        is_plain = self.is_plain and self.mlp.activate is silu_and_mul and not norm.offset
        if not is_plain or not isinstance(attention.attention, NativeCpuAttention):
            return None
        linears = attention.qkv, attention.output, self.mlp.gate_up, self.mlp.down
        packed = [Weight(linear.packed, linear.bias) for linear in linears if linear.packed]
        if len(packed) < len(linears):
            return None
        qkv, output, gate_up, down = packed
        return LayerParts(
            attention_norm=norm.weight,
            qkv=qkv,
            q_norm=attention.q_norm.weight if attention.q_norm else None,
            k_norm=attention.k_norm.weight if attention.k_norm else None,
            output=output,
            mlp_norm=self.mlp_norm.weight,
            gate_up=gate_up,
            down=down,
            cos=rotary.cos_PD,
            sin=rotary.sin_PD,
            num_heads=attention.qkv.num_heads,
            num_kv_heads=attention.qkv.num_kv_heads,
            head_dim=attention.qkv.head_dim,
            norm_eps=norm.eps,
            scale=attention.layer.scale,
            window=attention.layer.window or 0,
            softcap=attention.layer.softcap or 0.0,
        )

    def enter(self, x_TE: torch.Tensor, residual_TE: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """The first norm. Before the first layer, the embedding alone is the stream."""
        if residual_TE is None:
            return self.attention_norm(x_TE), x_TE
        return self.attention_norm.add(x_TE, residual_TE)


class LlamaForCausalLM(nn.Module):
    """One forward takes the new tokens of all sequences, prompts and single tokens alike, in one flat row."""

    layer_class = LlamaLayer

    def __init__(
        self, config: DecoderConfig, max_positions: int, group: TensorParallelGroup, attention: Attention
    ) -> None:
        super().__init__()
        self.config, self.group = config, group
        self.embedding = VocabParallelEmbedding(config.vocab_size, config.hidden_size, group)
        # Most models turn alike in all layers; in some, those with a window turn differently.
        ropes = list(dict.fromkeys(layer.rope for layer in config.layers))
        self.rotaries = nn.ModuleList(RotaryEmbedding(rope, config.head_dim, max_positions) for rope in ropes)
        self._rotary_of_layer = [ropes.index(layer.rope) for layer in config.layers]
        layers = [self.layer_class(config, layer, group, attention) for layer in config.layers]
        self.layers = nn.ModuleList(layers)
        self.num_kv_heads = layers[0].attention.qkv.num_kv_heads  # on this rank
        self.layers_computed = 0  # so far, in all forwards
        self._fused_layers: list[CpuLayer] = []
        self.fused_rows = 0  # up to so many go through them
        self.norm = RMSNorm(config.hidden_size, config)
        self.head = ParallelLMHead(config.vocab_size, config.hidden_size, group)
        if config.tied_embeddings:
            self.head.tie(self.embedding)

    def loaders(self) -> dict[str, Loader]:
        loaders = {
            "model.embed_tokens.weight": self.embedding.loader(),
            "model.norm.weight": self.norm.loader(),
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

    def fuse(self) -> None:
        """To be called when all weights are packed: where it can be, a step goes through few calls."""
        for index, (layer, rotary) in enumerate(zip(self.layers, self._rotary_of_layer, strict=True)):
            table = self.rotaries[rotary]
            assert isinstance(layer, LlamaLayer)
            assert isinstance(table, RotaryEmbedding)
            if parts := layer.parts(table):
                self._fused_layers.append(CpuLayer(index, parts, self.group.all_reduce))
        if len(self._fused_layers) == len(self.layers):
            self.fused_rows = native_rows(self.embedding.weight.dtype)

    def embed(self, token_ids_T: torch.Tensor) -> torch.Tensor:
        return self.embedding(token_ids_T)

    def forward(self, batch: StepBatch, kv_cache: KVCache) -> torch.Tensor:
        """Hidden states of the last layer. The attention must be prepared for the batch."""
        x_TE = self.embed(batch.token_ids_T)
        if len(x_TE) <= self.fused_rows:
            indices = batch.positions_T, batch.slots_T, batch.spans_B4, batch.tables_PM
            step = LayerStep(x_TE, *indices, kv_cache.k_cache_LNSKD, kv_cache.v_cache_LNSKD)
            for fused_layer in self._fused_layers:
                fused_layer.run(step)
                self.layers_computed += 1
            return step.hidden()

        residual_TE: torch.Tensor | None = None
        rotations = [rotary(batch.positions_T) for rotary in self.rotaries]
        caches = zip(kv_cache.k_cache_LNSKD, kv_cache.v_cache_LNSKD, strict=True)
        for layer, rotary, (k_cache_NSKD, v_cache_NSKD) in zip(self.layers, self._rotary_of_layer, caches, strict=True):
            x_TE, residual_TE = layer(x_TE, residual_TE, rotations[rotary], k_cache_NSKD, v_cache_NSKD, batch)
            self.layers_computed += 1
        assert residual_TE is not None  # there is at least one layer
        return x_TE + residual_TE

    def logits(self, x_BE: torch.Tensor) -> torch.Tensor | None:
        """logits_BV of the rows of hidden states that need them, on rank 0; None on the others, which must call too."""
        return self.head(self.norm(x_BE))
