"""What a model's config.json says, read and checked once. What the code can't compute is refused here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


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
class LlamaConfig:
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    norm_eps: float
    rope_theta: float
    rope_scaling: Llama3Scaling | None
    tied_embeddings: bool

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> LlamaConfig:
        """Raises ModelConfigError."""
        for name in ("attention_bias", "mlp_bias", "quantization_config"):
            if config.get(name):
                raise ModelConfigError(f"config.json sets {name}, which is not supported")
        if config.get("hidden_act", "silu") != "silu":
            raise ModelConfigError(f"hidden_act {config['hidden_act']!r} is not supported, only 'silu'")
        num_heads = _number(config, "num_attention_heads")
        hidden_size = _number(config, "hidden_size")
        rope = config.get("rope_parameters") or {}
        return cls(
            vocab_size=_number(config, "vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=_number(config, "intermediate_size"),
            num_layers=_number(config, "num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=config.get("num_key_value_heads") or num_heads,
            head_dim=config.get("head_dim") or hidden_size // num_heads,
            max_positions=_number(config, "max_position_embeddings"),
            norm_eps=config.get("rms_norm_eps", 1e-6),
            # transformers 5 writes theta under rope_parameters only, earlier ones at the top only.
            rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
            rope_scaling=_rope_scaling(config.get("rope_scaling") or rope),
            tied_embeddings=config.get("tie_word_embeddings", False),
        )


def _number(config: Mapping[str, Any], name: str) -> int:
    if not isinstance(value := config.get(name), int) or value < 1:
        raise ModelConfigError(f"config.json needs {name} as a positive whole number, not {value!r}")
    return value


def _rope_scaling(rope: Mapping[str, Any]) -> Llama3Scaling | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    if kind != "llama3":
        raise ModelConfigError(f"RoPE scaling {kind!r} is not supported, only 'llama3'")
    try:
        return Llama3Scaling(
            factor=rope["factor"],
            low_freq_factor=rope["low_freq_factor"],
            high_freq_factor=rope["high_freq_factor"],
            original_max_positions=rope["original_max_position_embeddings"],
        )
    except KeyError as error:
        raise ModelConfigError(f"llama3 RoPE scaling in config.json lacks {error}") from None
