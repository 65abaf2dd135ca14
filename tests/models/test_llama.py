"""models/llama.py against transformers, in float32: alone, in mixed batches, in chunks and after preemption."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tidewright.attention.base import span_order
from tidewright.engine.engine import Engine
from tidewright.engine.messages import EngineConfig, Submit
from tidewright.engine.model_runner import ModelRunner
from tidewright.engine.plan import ScheduledSequence, StepPlan
from tidewright.models.config import LlamaConfig, ModelConfigError
from tidewright.models.registry import model_class
from tidewright.schema import SamplingParams

VOCAB = 131
BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rope_theta": 5000.0,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "tied": {"tie_word_embeddings": True},
    "untied, wide heads": {"tie_word_embeddings": False, "head_dim": 12},
    "one kv head": {"num_key_value_heads": 1},
    "no grouping": {"num_key_value_heads": 6},
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
}


def save(folder: Path, shards: bool = False, **changes: Any) -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**(BASE | changes))).eval()
    model.save_pretrained(folder, max_shard_size="40KB" if shards else "5GB")
    return model


def config(folder: Path, **changes: Any) -> EngineConfig:
    values = {"dtype": "float32", "block_size": 4, "kv_cache_memory": "4MiB", "max_batched_tokens": 64}
    return EngineConfig(model_dir=str(folder), **(values | changes))


def prompt(length: int, seed: int) -> list[int]:
    return torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def expected(model: transformers.LlamaForCausalLM, ids: list[int], count: int) -> list[int]:
    """transformers' greedy tokens, from a full forward for each (no cache that could be wrong in the same way)."""
    ids, length = list(ids), len(ids)
    with torch.inference_mode():
        while len(ids) < length + count:
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[length:]


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
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, transformers.LlamaForCausalLM]:
    folder = tmp_path_factory.mktemp("llama")
    return folder, save(folder, tie_word_embeddings=True)


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_of_every_position(tmp_path: Path, name: str) -> None:
    model = save(tmp_path, **VARIANTS[name])
    runner = ModelRunner(config(tmp_path))
    ids = prompt(120, seed=1)
    span = ScheduledSequence(0, 0, tuple(ids), tuple(range(30)))
    spans = sorted(StepPlan((span,)).sequences, key=span_order)
    with torch.inference_mode():
        hidden_TE = runner.model(
            torch.tensor(ids), torch.arange(120), runner.kv_cache, runner._attention.prepare(spans)
        )
        torch.testing.assert_close(
            runner.model.logits(hidden_TE), model(torch.tensor([ids])).logits[0], rtol=1e-4, atol=1e-4
        )


def test_sharded_checkpoint(tmp_path: Path) -> None:
    model = save(tmp_path, shards=True)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    ids = prompt(9, seed=2)
    assert generate(Engine(config(tmp_path)), [ids], 6) == [expected(model, ids, 6)]


def test_rope_theta_at_the_top_of_the_config(tmp_path: Path) -> None:
    model = save(tmp_path)
    file = tmp_path / "config.json"
    content = json.loads(file.read_text())
    content["rope_theta"] = content.pop("rope_parameters")["rope_theta"]
    file.write_text(json.dumps(content))
    ids = prompt(30, seed=3)
    assert generate(Engine(config(tmp_path)), [ids], 4) == [expected(model, ids, 4)]


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
    small: tuple[Path, transformers.LlamaForCausalLM], changes: dict[str, int], steps_between: int
) -> None:
    folder, model = small
    prompts = [prompt(length, seed=length) for length in (1, 17, 4, 50, 8, 23)]
    wanted = [expected(model, ids, 12) for ids in prompts]
    assert generate(Engine(config(folder, **changes)), prompts, 12, steps_between) == wanted


def test_preemption_changes_no_token(small: tuple[Path, transformers.LlamaForCausalLM]) -> None:
    folder, model = small
    prompts = [prompt(length, seed=length) for length in (10, 12, 14)]
    wanted = [expected(model, ids, 20) for ids in prompts]
    bytes_per_token = 2 * 3 * 2 * 8 * 4
    engine = Engine(config(folder, kv_cache_memory=str(64 * bytes_per_token), max_model_len=40))
    assert generate(engine, prompts, 20) == wanted
    assert engine.stats().preemptions > 0
    assert engine.stats().blocks_free == engine.stats().blocks_total


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"hidden_size": None}, "needs hidden_size"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "RoPE scaling 'yarn'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "lacks 'low_freq_factor'"),
    ],
)
def test_configs_that_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelConfigError, match=message):
        LlamaConfig.from_json(BASE | changes)


@pytest.mark.parametrize("architectures", [None, [], ["GPT2LMHeadModel"]])
def test_unknown_architecture_is_told_what_there_is(architectures: list[str] | None) -> None:
    with pytest.raises(ModelConfigError, match="there is: LlamaForCausalLM"):
        model_class({"architectures": architectures})
