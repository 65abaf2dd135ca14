"""Shapes of Llama 3.1, for what only calculates with them."""

from __future__ import annotations

from dataclasses import replace

from tidewright.models.families import read_config

LLAMA_8B_JSON = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
}
LLAMA_8B = read_config(LLAMA_8B_JSON)
LLAMA_70B = replace(LLAMA_8B, hidden_size=8192, intermediate_size=28672, layers=LLAMA_8B.layers[:1] * 80, num_heads=64)
