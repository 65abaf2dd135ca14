"""A small configuration of every family that there is, with its peculiarities on."""

from __future__ import annotations

import transformers as hf

from helpers.checkpoints import SIZES

WINDOW = 9
ROPE = {"rope_type": "default", "rope_theta": 5000.0}
GEMMA2 = {
    "rope_parameters": ROPE,
    "query_pre_attn_scalar": 20,
    "sliding_window": WINDOW,
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 3.0,
}
GEMMA3 = {
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
    },
    "query_pre_attn_scalar": 20,
    "sliding_window": WINDOW,
    "sliding_window_pattern": 2,
}
FAMILIES: dict[str, hf.PreTrainedConfig] = {
    "llama, tied": hf.LlamaConfig(**SIZES, rope_parameters=ROPE, tie_word_embeddings=True),
    "llama, biases": hf.LlamaConfig(**SIZES, rope_parameters=ROPE, head_dim=12, attention_bias=True, mlp_bias=True),
    "mistral": hf.MistralConfig(**SIZES, rope_parameters=ROPE, head_dim=12, sliding_window=WINDOW),
    "mistral, no window": hf.MistralConfig(**SIZES, sliding_window=None, tie_word_embeddings=True),
    "qwen 2": hf.Qwen2Config(**SIZES, rope_parameters=ROPE, sliding_window=WINDOW, tie_word_embeddings=True),
    "qwen 2, windows": hf.Qwen2Config(
        **SIZES, rope_parameters=ROPE, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1
    ),
    "qwen 3": hf.Qwen3Config(**SIZES, rope_parameters=ROPE, head_dim=12, tie_word_embeddings=True),
    "qwen 3, biases and windows": hf.Qwen3Config(
        **SIZES,
        rope_parameters=ROPE,
        head_dim=12,
        attention_bias=True,
        use_sliding_window=True,
        sliding_window=WINDOW,
        max_window_layers=2,
    ),
    "gemma 2": hf.Gemma2Config(**SIZES, **GEMMA2, head_dim=12),
    "gemma 2, untied": hf.Gemma2Config(
        **SIZES, **GEMMA2 | {"attn_logit_softcapping": None}, head_dim=8, tie_word_embeddings=False
    ),
    "gemma 3": hf.Gemma3TextConfig(**SIZES, **GEMMA3, head_dim=12),
    "gemma 3, untied": hf.Gemma3TextConfig(
        **SIZES, **GEMMA3, head_dim=8, tie_word_embeddings=False, final_logit_softcapping=3.0
    ),
}
