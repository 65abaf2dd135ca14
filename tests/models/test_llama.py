"""The decoder of models/llama.py in the engine, against transformers in float32: shapes, mixed batches, preemption."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from helpers.checkpoints import SIZES, engine_config, expected, logits, prompt, save
from tidewright.engine.engine import Engine
from tidewright.engine.messages import Submit
from tidewright.engine.model_runner import ModelRunner
from tidewright.schema import SamplingParams

VARIANTS: dict[str, dict[str, Any]] = {
    "one kv head": {"num_key_value_heads": 1},
    "no grouping": {"num_key_value_heads": 6},
    "gelu": {"hidden_act": "gelu_pytorch_tanh"},
    "llama3 rope": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "linear rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0}},
}


def generate(engine: Engine, prompts: list[list[int]], count: int, steps_between: int = 0) -> list[list[int]]:
    tokens: list[list[int]] = [[] for _ in prompts]

    def step() -> None:
        for output in engine.step():
            tokens[output.request_id] += output.token_ids

    params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, seed=0)
    for request_id, ids in enumerate(prompts):
        assert engine.submit(Submit(request_id, ids, params)) is None
        for _ in range(steps_between):
            step()
    while engine.has_work:
        step()
    return tokens


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, transformers.PreTrainedModel]:
    folder = tmp_path_factory.mktemp("llama")
    return folder, save(folder, transformers.LlamaConfig(**SIZES, tie_word_embeddings=True))


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_of_every_position(tmp_path: Path, name: str) -> None:
    model = save(tmp_path, transformers.LlamaConfig(**SIZES | VARIANTS[name]))
    ids = prompt(120, seed=1)
    with torch.inference_mode():
        wanted_TV = model(torch.tensor([ids])).logits[0]
    ours_TV = logits(ModelRunner(engine_config(tmp_path, max_batched_tokens=120)), ids, chunk=120)
    torch.testing.assert_close(ours_TV, wanted_TV, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"max_batched_tokens": 7},  # prompts in chunks, beside others' single tokens
        {"max_running": 2},
        {"block_size": 1},
        {"block_size": 64, "max_batched_tokens": 3},
    ],
)
@pytest.mark.parametrize("steps_between", [0, 3])
def test_mixed_batches_and_chunks_change_no_token(
    small: tuple[Path, transformers.PreTrainedModel], changes: dict[str, int], steps_between: int
) -> None:
    folder, model = small
    prompts = [prompt(length, seed=length) for length in (1, 17, 4, 50, 8, 23)]
    wanted = [expected(model, ids, 12) for ids in prompts]
    assert generate(Engine(engine_config(folder, **changes)), prompts, 12, steps_between) == wanted


def test_preemption_changes_no_token(small: tuple[Path, transformers.PreTrainedModel]) -> None:
    folder, model = small
    prompts = [prompt(length, seed=length) for length in (10, 12, 14)]
    wanted = [expected(model, ids, 20) for ids in prompts]
    bytes_per_token = 2 * 3 * 2 * 8 * 4
    engine = Engine(engine_config(folder, kv_cache_memory=str(64 * bytes_per_token), max_model_len=40))
    assert generate(engine, prompts, 20) == wanted
    assert engine.stats().preemptions > 0
    assert engine.stats().blocks_free == engine.stats().blocks_total
