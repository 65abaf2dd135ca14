"""Llama (also SmolLM and others of that architecture): the decoder that all families share.

It runs on tensor-parallel layers and paged attention. mistral.py, qwen.py and gemma.py say what differs there.
"""

from __future__ import annotations

from collections.abc import Mapping
from ctypes import c_int64

import torch
from torch import nn

from tidewright.attention.base import AttentionLayer, Rotation
from tidewright.devices.base import Device
from tidewright.distributed.group import TensorParallelGroup
from tidewright.kv_cache.storage import KVCache, LayerCache
from tidewright.layers.norm import RMSNorm
from tidewright.layers.rotary import RotaryEmbedding
from tidewright.layers.tensor_parallel import (
    MergedColumnParallelLinear,
    ParallelLMHead,
    Projection,
    QKVParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from tidewright.layers.weights import Loader
from tidewright.models.config import DecoderConfig, LayerConfig
from tidewright.step.batch import StepBatch


def loaders_of(projections: Mapping[str, Projection]) -> dict[str, Loader]:
    return {key: loader for name, one in projections.items() for key, loader in one.loaders(name).items()}


def make_norm(size: int, config: DecoderConfig, device: Device) -> RMSNorm:
    return RMSNorm(size, config.norm_eps, config.norm_adds_one, device)


class LlamaAttention(nn.Module):
    def __init__(self, config: DecoderConfig, layer: LayerConfig, group: TensorParallelGroup, device: Device) -> None:
        super().__init__()
        self.attention = device.attention
        self.layer = AttentionLayer(config.attention_scale, layer.window, config.attention_softcap)
        self.qkv = QKVParallelLinear(
            config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim, group, device, config.qkv_bias
        )
        heads, _ = group.cut_heads(config.num_heads, config.num_kv_heads)
        columns = heads.of(config.head_dim)
        self.output = RowParallelLinear(columns, config.hidden_size, group, device, config.output_bias)
        self.q_norm = make_norm(config.head_dim, config, device) if config.qk_norm else None
        self.k_norm = make_norm(config.head_dim, config, device) if config.qk_norm else None

    def projections(self, prefix: str) -> dict[str, Projection]:
        parts = {
            f"{prefix}.{name}": Projection(self.qkv, part) for part, name in enumerate(("q_proj", "k_proj", "v_proj"))
        }
        return parts | {f"{prefix}.o_proj": Projection(self.output)}

    def loaders(self, prefix: str) -> dict[str, Loader]:
        loaders = loaders_of(self.projections(prefix))
        if self.q_norm and self.k_norm:
            loaders[f"{prefix}.q_norm.weight"] = self.q_norm.loader()
            loaders[f"{prefix}.k_norm.weight"] = self.k_norm.loader()
        return loaders

    def forward(self, x_TE: torch.Tensor, rotation: Rotation, cache: LayerCache, batch: StepBatch) -> torch.Tensor:
        qkv_TXD = self.qkv(x_TE, batch.adapters)
        if self.q_norm and self.k_norm:
            q_THD, k_TKD, v_TKD = qkv_TXD.tensor_split(
                (self.qkv.num_heads, self.qkv.num_heads + self.qkv.num_kv_heads), dim=1
            )
            qkv_TXD = torch.cat((self.q_norm(q_THD), self.k_norm(k_TKD), v_TKD), dim=1)
        out_THD = self.attention.forward(qkv_TXD, rotation, cache, batch, self.layer)
        return self.output(out_THD.flatten(1), batch.adapters)


class LlamaMLP(nn.Module):
    def __init__(self, config: DecoderConfig, group: TensorParallelGroup, device: Device) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_up = MergedColumnParallelLinear(hidden, (inner, inner), group, device, config.mlp_bias)
        self.down = RowParallelLinear(group.cut(inner), hidden, group, device, config.mlp_bias)
        self.activation = config.activation
        activations = {"silu": device.silu_and_mul, "gelu_pytorch_tanh": device.gelu_tanh_and_mul}
        self.activate = activations[config.activation]

    def projections(self, prefix: str) -> dict[str, Projection]:
        return {
            f"{prefix}.gate_proj": Projection(self.gate_up, 0),
            f"{prefix}.up_proj": Projection(self.gate_up, 1),
            f"{prefix}.down_proj": Projection(self.down),
        }

    def forward(self, x_TE: torch.Tensor, batch: StepBatch) -> torch.Tensor:
        return self.down(self.activate(self.gate_up(x_TE, batch.adapters)), batch.adapters)


class LlamaLayer(nn.Module):
    is_plain = True  # its forward is the one below

    def __init__(self, config: DecoderConfig, layer: LayerConfig, group: TensorParallelGroup, device: Device) -> None:
        super().__init__()
        self.attention_norm = make_norm(config.hidden_size, config, device)
        self.attention = LlamaAttention(config, layer, group, device)
        self.mlp_norm = make_norm(config.hidden_size, config, device)
        self.mlp = LlamaMLP(config, group, device)

    def loaders(self, prefix: str) -> dict[str, Loader]:
        return {
            f"{prefix}.input_layernorm.weight": self.attention_norm.loader(),
            f"{prefix}.post_attention_layernorm.weight": self.mlp_norm.loader(),
            **self.attention.loaders(f"{prefix}.self_attn"),
            **loaders_of(self.mlp.projections(f"{prefix}.mlp")),
        }

    def projections(self, prefix: str) -> dict[str, Projection]:
        return {**self.attention.projections(f"{prefix}.self_attn"), **self.mlp.projections(f"{prefix}.mlp")}

    def forward(
        self,
        x_TE: torch.Tensor,
        residual_TE: torch.Tensor | None,
        rotation: Rotation,
        cache: LayerCache,
        batch: StepBatch,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Takes and returns the residual stream, and before it what is still to be added to it."""
        x_TE, residual_TE = self.enter(x_TE, residual_TE)
        x_TE = self.attention(x_TE, rotation, cache, batch)
        x_TE, residual_TE = self.mlp_norm.add(x_TE, residual_TE)
        return self.mlp(x_TE, batch), residual_TE

    def enter(self, x_TE: torch.Tensor, residual_TE: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """The first norm. Before the first layer, the embedding alone is the stream."""
        if residual_TE is None:
            return self.attention_norm(x_TE), x_TE
        return self.attention_norm.add(x_TE, residual_TE)


class LlamaForCausalLM(nn.Module):
    """One forward takes the new tokens of all sequences, prompts and single tokens alike, in one flat row."""

    layer_class = LlamaLayer

    def __init__(self, config: DecoderConfig, max_positions: int, group: TensorParallelGroup, device: Device) -> None:
        super().__init__()
        self.config, self.group = config, group
        self.embedding = VocabParallelEmbedding(config.vocab_size, config.hidden_size, group, device)
        # Most models turn alike in all layers; in some, those with a window turn differently.
        ropes = list(dict.fromkeys(layer.rope for layer in config.layers))
        self.rotaries = nn.ModuleList(RotaryEmbedding(rope, config.head_dim, max_positions) for rope in ropes)
        self._rotary_of_layer = [ropes.index(layer.rope) for layer in config.layers]
        layers = [self.layer_class(config, layer, group, device) for layer in config.layers]
        self.layers = nn.ModuleList(layers)
        self.num_kv_heads = layers[0].attention.qkv.num_kv_heads  # on this rank
        self.layers_computed = c_int64()  # so far, in all forwards; kernels count as well
        self.norm = make_norm(config.hidden_size, config, device)
        self.head: ParallelLMHead | None = ParallelLMHead(config.vocab_size, config.hidden_size, group, device)
        if config.tied_embeddings:
            self.embedding.method = self.head.method

    @property
    def dtype(self) -> torch.dtype:
        return self.norm.weight.dtype

    def remove_head(self) -> None:
        """No logits are wanted. To be called before the weights are loaded."""
        self.head = None
        if self.config.tied_embeddings:
            self.embedding.untie()

    def rotary_of(self, layer: int) -> RotaryEmbedding:
        rotary = self.rotaries[self._rotary_of_layer[layer]]
        assert isinstance(rotary, RotaryEmbedding)
        return rotary

    def loaders(self) -> dict[str, Loader]:
        loaders = {**self.embedding.loaders("model.embed_tokens"), "model.norm.weight": self.norm.loader()}
        if self.head and not self.config.tied_embeddings:
            loaders |= self.head.loaders("lm_head")
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, LlamaLayer)
            loaders |= layer.loaders(f"model.layers.{index}")
        return loaders

    def projections(self) -> dict[str, Projection]:
        """The linear layers' weights, which LoRA adapters can add to, as the checkpoint calls them."""
        found: dict[str, Projection] = {}
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, LlamaLayer)
            found |= layer.projections(f"model.layers.{index}")
        return found

    def ignored_weights(self) -> frozenset[str]:
        """Weights that some checkpoints carry although they follow from others."""
        names = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(self.config.num_layers)}
        return frozenset(names | {"lm_head.weight"})

    def embed(self, token_ids_T: torch.Tensor) -> torch.Tensor:
        return self.embedding(token_ids_T)

    def forward(self, batch: StepBatch, kv_cache: KVCache) -> torch.Tensor:
        """Hidden states of the last layer."""
        x_TE = self.embed(batch.token_ids_T)
        residual_TE: torch.Tensor | None = None
        rotations = [rotary(batch.positions_T) for rotary in self.rotaries]
        for layer, rotary, cache in zip(self.layers, self._rotary_of_layer, kv_cache.layers, strict=True):
            x_TE, residual_TE = layer(x_TE, residual_TE, rotations[rotary], cache, batch)
            self.layers_computed.value += 1
        assert residual_TE is not None  # there is at least one layer
        return x_TE + residual_TE

    def logits(self, x_BE: torch.Tensor) -> torch.Tensor | None:
        """logits_BV of the rows of hidden states that need them, on rank 0; None on the others, which must call too."""
        assert self.head
        return self.head(self.norm(x_BE))
