"""Every family against transformers, in float32: logits and greedy tokens on prompts longer than any window."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as hf

from helpers.checkpoints import SIZES, engine_config, expected, greedy, logits, prompt, save
from tidewright.engine.model_runner import ModelRunner

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


@pytest.mark.parametrize("name", FAMILIES)
def test_as_transformers_computes_it(tmp_path: Path, name: str) -> None:
    model = save(tmp_path, FAMILIES[name], shards="tied" in name)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 2) == ("tied" in name)
    runner = ModelRunner(engine_config(tmp_path))
    ids = prompt(60, seed=1)
    with torch.inference_mode():
        wanted_TV = model(torch.tensor([ids])).logits[0]
    for chunk in (60, 7):
        torch.testing.assert_close(logits(runner, ids, chunk), wanted_TV, rtol=2e-5, atol=2e-5)
    prompts = [prompt(length, seed=length) for length in (5, 23, 40)]
    wanted = [expected(model, ids, 24) for ids in prompts]
    assert greedy(runner, prompts, 24, chunk=6) == wanted
    assert all(len(set(ids)) > 4 for ids in wanted)  # the model does not say the same thing whatever it reads


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_layers_in_few_calls_compute_the_same_bits(tmp_path: Path, name: str, dtype: str) -> None:
    save(tmp_path, FAMILIES[name])
    runner = ModelRunner(engine_config(tmp_path, dtype=dtype))
    ids = prompt(33, seed=1)
    in_few_TV = logits(runner, ids, chunk=5)
    assert (runner.model.fused_rows >= 5) == ("gemma" not in name)
    runner.model.fused_rows = 0
    assert torch.equal(in_few_TV, logits(runner, ids, chunk=5))


@pytest.mark.parametrize("name", ["gemma 2", "gemma 3"])
def test_gemma_in_bfloat16_rounds_where_transformers_does(tmp_path: Path, name: str) -> None:
    """1 + weight would lose most of a small weight's digits in bf16; the embedding's factor is rounded to bf16."""
    model = save(tmp_path, FAMILIES[name], dtype=torch.bfloat16)
    ours = ModelRunner(engine_config(tmp_path, dtype="bfloat16")).model
    ids_T = torch.tensor(prompt(20, seed=4))
    with torch.inference_mode():
        x_TE = model.model.embed_tokens(ids_T)
        assert torch.equal(ours.embed(ids_T), x_TE)
        assert torch.equal(ours.norm(x_TE), model.model.norm(x_TE))
