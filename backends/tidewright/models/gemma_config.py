"""What config.json says of Gemma 2 and 3 (text), and what transformers takes where it says nothing. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tidewright.models.config import FULL, SLIDING, DecoderConfig

# What transformers takes where config.json leaves it out.
_DEFAULTS = {
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}


def read_gemma2(config: Mapping[str, Any]) -> DecoderConfig:
    caps = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    return _read({**_DEFAULTS, **caps, **config}, pattern=2)


def read_gemma3(config: Mapping[str, Any]) -> DecoderConfig:
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
        norms_after=True,
    )
