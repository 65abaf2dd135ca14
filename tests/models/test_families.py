"""Every family against transformers, in float32: logits and greedy tokens on prompts longer than any window."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from helpers.checkpoints import engine_config, expected, greedy, logits, prompt, save
from helpers.families import FAMILIES
from tidewright.engine.model_runner import ModelRunner


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


@pytest.mark.parametrize(
    ("dtype", "kv_cache_dtype"), [("float32", "auto"), ("bfloat16", "auto"), ("bfloat16", "int8"), ("float32", "fp8")]
)
@pytest.mark.parametrize("name", FAMILIES)
def test_layers_in_few_calls_compute_the_same_bits(tmp_path: Path, name: str, dtype: str, kv_cache_dtype: str) -> None:
    save(tmp_path, FAMILIES[name])
    runner = ModelRunner(engine_config(tmp_path, dtype=dtype, kv_cache_dtype=kv_cache_dtype))
    ids = prompt(33, seed=1)
    in_few_TV = logits(runner, ids, chunk=5)
    assert (runner.device.fused_rows >= 5) == ("gemma" not in name)
    runner.device.fused_rows = 0
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
