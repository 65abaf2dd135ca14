"""Which models' layers the kernels can compute in one call, and what that needs of a layer."""

from __future__ import annotations

from tidewright.devices.cpu.attention import NativeCpuAttention
from tidewright.devices.cpu.layer import CpuLayers, LayerParts, Weight
from tidewright.devices.cpu.linear import CpuLinear
from tidewright.devices.cpu.lora import CpuLora
from tidewright.devices.cpu.quantized_linear import CpuQuantizedLinear
from tidewright.layers.rotary import RotaryEmbedding
from tidewright.layers.tensor_parallel import LinearLayer
from tidewright.models.llama import LlamaForCausalLM, LlamaLayer


def fuse_layers(model: LlamaForCausalLM) -> CpuLayers | None:
    """All layers, or none. The weights must have their last layout."""
    made = []
    for index, layer in enumerate(model.layers):
        assert isinstance(layer, LlamaLayer)
        parts = _parts(layer, model.rotary_of(index))
        if parts is None:
            return None
        made.append(parts)
    return CpuLayers(made, model.group.all_reduce if model.group.size > 1 else None)


def _parts(layer: LlamaLayer, rotary: RotaryEmbedding) -> LayerParts | None:
    attention, norm, mlp = layer.attention, layer.attention_norm, layer.mlp
    is_plain = layer.is_plain and mlp.activation == "silu" and not norm.offset
    qkv, output = _packed(attention.qkv), _packed(attention.output)
    gate_up, down = _packed(mlp.gate_up), _packed(mlp.down)
    if not (is_plain and isinstance(attention.attention, NativeCpuAttention) and qkv and output and gate_up and down):
        return None
    return LayerParts(
        attention_norm=norm.weight,
        qkv=qkv,
        q_norm=attention.q_norm.weight if attention.q_norm else None,
        k_norm=attention.k_norm.weight if attention.k_norm else None,
        output=output,
        mlp_norm=layer.mlp_norm.weight,
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


def _packed(layer: LinearLayer) -> Weight | None:
    packed = layer.method.packed if isinstance(layer.method, CpuLinear | CpuQuantizedLinear) else None
    if packed is None or not (layer.lora is None or isinstance(layer.lora, CpuLora)):
        return None
    return Weight(packed, layer.bias, layer.lora)
