"""What a model's config.json says, read and checked once. What the code can't compute is refused here.

It reads what the families have in common; a family's own file adds what is its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tidewright.quantization.methods import unsupported as unsupported_quantization

ACTIVATIONS = ("silu", "gelu_pytorch_tanh")
FULL, SLIDING = "full_attention", "sliding_attention"  # the layer types as config.json calls them
MOST = 2**31 - 1
MOST_PARTS = 10_000  # layers and heads: there is a loop over them
_NOT_COMPUTED = (
    "vision_config",
    "num_experts",
    "num_local_experts",
    "dual_chunk_attention_config",
    "use_bidirectional_attention",
)


class ModelConfigError(ValueError):
    """config.json is incomplete, or asks for what this architecture's code doesn't do."""


@dataclass(frozen=True)
class Llama3Scaling:
    """Stretches the slow rotations of RoPE beyond the context that the model was first trained on."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True)
class LinearScaling:
    """Stretches all rotations of RoPE alike."""

    factor: float


@dataclass(frozen=True)
class Rope:
    theta: float
    scaling: Llama3Scaling | LinearScaling | None = None


@dataclass(frozen=True)
class LayerConfig:
    """What need not be the same in all layers. `window`: a token sees itself and the window - 1 before it."""

    rope: Rope
    window: int | None = None


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: tuple[LayerConfig, ...]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    norm_eps: float
    activation: str
    tied_embeddings: bool
    attention_scale: float
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    norm_adds_one: bool = False
    norms_after: bool = False
    """Attention and MLP are followed by a norm each, beside those before them."""
    attention_softcap: float | None = None
    logit_softcap: float | None = None

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @classmethod
    def from_json(cls, config: Mapping[str, Any], slides: Callable[[int], bool] = lambda layer: False) -> DecoderConfig:
        """`slides` says which layers have a sliding window where config.json has no layer_types.

        Raises:
            ModelConfigError: names the field that is missing, wrong or not supported.
        """
        for name in _NOT_COMPUTED:
            if config.get(name):
                raise ModelConfigError(f"config.json sets {name}, which is not supported")
        if refusal := unsupported_quantization(config):
            raise ModelConfigError(refusal)
        activation = config.get("hidden_activation") or config.get("hidden_act") or "silu"
        if activation not in ACTIVATIONS:
            known = " and ".join(ACTIVATIONS)
            raise ModelConfigError(f"hidden_act {activation!r} is not supported; there is {known}")
        hidden_size, num_heads = _number(config, "hidden_size"), _number(config, "num_attention_heads", most=MOST_PARTS)
        num_kv_heads = _number(config, "num_key_value_heads", num_heads, MOST_PARTS)
        if num_heads % num_kv_heads:
            raise ModelConfigError(
                f"num_attention_heads ({num_heads}) is not a multiple of num_key_value_heads ({num_kv_heads})"
            )
        head_dim = _number(config, "head_dim", hidden_size // num_heads)
        return cls(
            vocab_size=_number(config, "vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=_number(config, "intermediate_size"),
            layers=_layers(config, slides),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            max_positions=_number(config, "max_position_embeddings"),
            norm_eps=config.get("rms_norm_eps", 1e-6),
            activation=activation,
            tied_embeddings=config.get("tie_word_embeddings", False),
            attention_scale=head_dim**-0.5,
            qkv_bias=config.get("attention_bias", False),
            output_bias=config.get("attention_bias", False),
            mlp_bias=config.get("mlp_bias", False),
        )


def _number(config: Mapping[str, Any], name: str, default: int | None = None, most: int = MOST) -> int:
    value = config.get(name)
    if value is None:
        value = default
    if not isinstance(value, int) or not 1 <= value <= most:
        raise ModelConfigError(f"config.json needs {name} as a whole number from 1 to {most}, not {value!r:.99}")
    return value


def _layers(config: Mapping[str, Any], slides: Callable[[int], bool]) -> tuple[LayerConfig, ...]:
    count = _number(config, "num_hidden_layers", most=MOST_PARTS)
    kinds = config.get("layer_types") or [SLIDING if slides(layer) else FULL for layer in range(count)]
    if len(kinds) != count:
        raise ModelConfigError(f"layer_types has {len(kinds)} entries for {count} layers (num_hidden_layers)")
    for kind in kinds:
        if kind not in (FULL, SLIDING):
            raise ModelConfigError(f"layer_types has {kind!r}, which is not supported; there is {FULL} and {SLIDING}")
    return tuple(
        LayerConfig(_rope(config, kind), _number(config, "sliding_window") if kind == SLIDING else None)
        for kind in kinds
    )


def _rope(config: Mapping[str, Any], kind: str) -> Rope:
    """transformers 5 writes everything into rope_parameters, earlier ones into rope_theta and rope_scaling."""
    rope = config.get("rope_parameters") or {}
    rope = rope.get(kind, rope) | (config.get("rope_scaling") or {})
    fraction = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1
    if fraction != 1:
        raise ModelConfigError(f"partial_rotary_factor {fraction!r} is not supported, only 1")
    return Rope(float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0), _rope_scaling(rope))


def _rope_scaling(rope: Mapping[str, Any]) -> Llama3Scaling | LinearScaling | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    try:
        if kind == "default":
            return None
        if kind == "linear":
            return LinearScaling(rope["factor"])
        if kind == "llama3":
            return Llama3Scaling(
                factor=rope["factor"],
                low_freq_factor=rope["low_freq_factor"],
                high_freq_factor=rope["high_freq_factor"],
                original_max_positions=rope["original_max_position_embeddings"],
            )
    except KeyError as error:
        raise ModelConfigError(f"{kind} RoPE scaling in config.json lacks {error}") from None
    raise ModelConfigError(f"RoPE scaling (rope_type) {kind!r} is not supported, only 'linear' and 'llama3'")
