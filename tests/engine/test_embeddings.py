"""Embeddings of the engine, held against transformers in float32: pooling, chunks, batches, preemption, ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from helpers.checkpoints import SIZES, VOCAB, engine_config, prompt, save
from helpers.engine_process import bridge, config, hear_ready
from helpers.families import FAMILIES
from tidewright.engine.engine import Engine
from tidewright.engine.messages import SequenceOutput, Submit
from tidewright.schema import SamplingParams

Pooling = Literal["last", "mean"]
PROMPTS = [prompt(length, seed) for seed, length in enumerate((1, 7, 100, 33, 256, 2, 33))]
PROMPTS[3][:20] = PROMPTS[2][:20]  # a prefix to share


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, transformers.PreTrainedModel]:
    folder = tmp_path_factory.mktemp("model")
    return folder, save(folder, transformers.LlamaConfig(**SIZES), shards=True)


def expected(
    model: transformers.PreTrainedModel, ids: list[int], pooling: Pooling = "last", normalize: bool = True
) -> np.ndarray:
    with torch.inference_mode():
        states_TE = model.model(torch.tensor([ids]), use_cache=False).last_hidden_state[0]
    vector_E = states_TE.mean(dim=0) if pooling == "mean" else states_TE[-1]
    if normalize:
        vector_E = vector_E / vector_E.norm()
    return vector_E.numpy()


def engine(folder: Path, **changes: Any) -> Engine:
    return Engine(engine_config(folder, **{"task": "embed", "kv_cache_memory": "2MiB", **changes}))


def submit(request_id: int, ids: list[int], **params: Any) -> Submit:
    return Submit(request_id, ids, SamplingParams(seed=0, **params))


def vector(output: SequenceOutput) -> np.ndarray:
    assert output.finish_reason == "stop"
    assert output.token_ids == []
    assert output.embedding is not None
    return np.frombuffer(output.embedding, "<f4")


def embed(made: Engine, prompts: list[list[int]]) -> list[np.ndarray]:
    """Each request ends exactly once, and no block is lost."""
    for number, ids in enumerate(prompts):
        assert made.submit(submit(number, ids)) is None
    found: dict[int, np.ndarray] = {}
    while made.has_work:
        for output in made.step():
            assert output.request_id not in found
            found[output.request_id] = vector(output)
        made.scheduler.check_integrity()
    assert made.stats().blocks_free == made.stats().blocks_total
    return [found[number] for number in range(len(prompts))]


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"max_batched_tokens": 13}, {"max_batched_tokens": 1024}, {"max_running": 2, "block_size": 1}],
    ids=["plain", "small chunks", "one batch", "small blocks"],
)
def test_they_are_those_of_transformers(
    checkpoint: tuple[Path, transformers.PreTrainedModel], pooling: Pooling, normalize: bool, changes: dict[str, Any]
) -> None:
    folder, model = checkpoint
    made = engine(folder, pooling=pooling, normalize=normalize, **changes)
    for _ in range(2):  # the second time, blocks are cached
        for got, ids in zip(embed(made, PROMPTS), PROMPTS, strict=True):
            np.testing.assert_allclose(got, expected(model, ids, pooling, normalize), atol=2e-5)
    assert (made.stats().prefix_hits > 0) == (pooling == "last")
    assert made.stats().prompt_tokens == 2 * sum(map(len, PROMPTS))


@pytest.mark.parametrize("family", ["qwen 3", "gemma 2, untied", "gemma 3", "mistral"])
def test_every_family_has_them(tmp_path: Path, family: str) -> None:
    model = save(tmp_path, FAMILIES[family])
    for pooling in ("last", "mean"):
        made = engine(tmp_path, pooling=pooling, max_batched_tokens=32)
        for got, ids in zip(embed(made, PROMPTS), PROMPTS, strict=True):
            np.testing.assert_allclose(got, expected(model, ids, pooling), atol=5e-5)  # type: ignore[arg-type]


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_a_preempted_request_begins_anew(
    checkpoint: tuple[Path, transformers.PreTrainedModel], pooling: Pooling
) -> None:
    folder, model = checkpoint
    made = engine(folder, pooling=pooling, kv_cache_memory="60KiB", max_model_len=100, max_batched_tokens=16)
    late, urgent = prompt(90, seed=1), prompt(80, seed=2)
    assert made.submit(submit(1, late)) is None
    assert made.step() == []
    assert made.submit(submit(2, urgent, priority=-1)) is None
    outputs = [output for _ in range(20) for output in made.step()]
    assert made.stats().preemptions == 1
    assert [output.request_id for output in outputs] == [2, 1]
    for output, ids in zip(outputs, (urgent, late), strict=True):
        np.testing.assert_allclose(vector(output), expected(model, ids, pooling), atol=2e-5)


def test_what_is_kept_of_an_aborted_prompt_goes(checkpoint: tuple[Path, transformers.PreTrainedModel]) -> None:
    folder, model = checkpoint
    made = engine(folder, pooling="mean", max_batched_tokens=16)
    made.submit(submit(1, PROMPTS[2]))
    made.step()
    made.abort(1)
    (got,) = embed(made, [PROMPTS[1]])
    np.testing.assert_allclose(got, expected(model, PROMPTS[1], "mean"), atol=2e-5)
    assert not made.runner._pooler._sums  # type: ignore[attr-defined]


def test_a_prompt_may_fill_the_context_and_no_more(checkpoint: tuple[Path, transformers.PreTrainedModel]) -> None:
    made = engine(checkpoint[0], max_model_len=20, kv_cache_memory="100KiB")
    assert len(embed(made, [prompt(20, seed=1)])) == 1
    refusal = made.submit(submit(1, prompt(21, seed=1)))
    assert refusal is not None
    assert (refusal.finish_reason, refusal.message) == (
        "invalid",
        "the prompt has 21 tokens, but a prompt is limited to 20",
    )
    refusal = made.submit(submit(2, [VOCAB]))
    assert refusal is not None
    assert "token ids outside" in refusal.message
    assert made.ready().embedding_size == SIZES["hidden_size"]


def test_a_checkpoint_without_a_head_and_without_prefixes(tmp_path: Path) -> None:
    """As embedding models are published."""
    model = save(tmp_path, transformers.Qwen3Config(**SIZES, tie_word_embeddings=False))
    file = tmp_path / "model.safetensors"
    weights = {name.removeprefix("model."): tensor for name, tensor in load_file(file).items()}
    del weights["lm_head.weight"]
    save_file(weights, file, {"format": "pt"})
    (got,) = embed(engine(tmp_path), [PROMPTS[1]])
    np.testing.assert_allclose(got, expected(model, PROMPTS[1]), atol=2e-5)


@pytest.mark.heavy
@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_two_ranks_give_the_same(checkpoint: tuple[Path, transformers.PreTrainedModel], pooling: Pooling) -> None:
    folder, model = checkpoint
    with bridge() as started:
        options = {"task": "embed", "pooling": pooling, "max_batched_tokens": 32, "block_size": 4}
        started.begin(config(folder, tensor_parallel_size=2, **options))
        hear_ready(started)
        for number, ids in enumerate(PROMPTS):
            started.say(submit(number, ids))
        outputs = started.outputs(set(range(len(PROMPTS))))
    assert len(outputs) == len(PROMPTS)
    for output in outputs:
        np.testing.assert_allclose(vector(output), expected(model, PROMPTS[output.request_id], pooling), atol=2e-5)
