"""A step on a GPU is one transfer to it and one from it, and between them the host waits for nothing.

The GPU here has no content: whoever asks for one fails (helpers/contentless.py).
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import msgspec
import pytest

from helpers.checkpoints import engine_config, prompt, save
from helpers.contentless import Crossings, Indices, contentless
from helpers.families import FAMILIES
from tidewright.engine.engine import Engine
from tidewright.engine.messages import EngineConfig, Submit
from tidewright.schema import SamplingParams


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EngineConfig:
    save(tmp_path, FAMILIES["llama, tied"])
    contentless(monkeypatch)
    return engine_config(tmp_path, max_batched_tokens=8)


TO_DEVICE, TO_HOST = "to the device", "to the host"
PLAIN: list[dict[str, Any]] = [{"temperature": 0.0}, {"top_p": 0.9, "top_k": 7, "min_p": 0.1}]
OTHERS: list[dict[str, Any]] = [
    {"logprobs": 3},
    {"repetition_penalty": 2.0, "temperature": 0.0},
    {"allowed_token_ids": [5, 6]},
    {"min_tokens": 2, "logit_bias": {3: 1.0}, "bad_words": ["x"]},
    {"guided_regex": "a", "logprobs": 0},
    {"prompt_logprobs": 2},
]


def crossings(config: EngineConfig, *mix: dict[str, Any]) -> list[list[str]]:
    """Of each step until all requests have ended; the model says token 0 all the time."""
    engine = Engine(config)
    for number, params in enumerate(mix):
        sampling = SamplingParams(max_tokens=4, seed=1, ignore_eos=True, **params)
        words = [[0, 1]] if "bad_words" in params else []
        engine.submit(Submit(number, prompt(5 + number, seed=number), sampling, bad_words_ids=words))
    steps = []
    while engine.has_work:
        with Crossings() as crossed, Indices(crossed.seen):
            engine.step()
        steps.append(crossed.seen)
    assert len(steps) > 4
    return steps


@pytest.mark.parametrize("async_scheduling", ["off", "on"])
def test_a_step_is_one_transfer_each_way(config: EngineConfig, async_scheduling: str) -> None:
    """Prompts in chunks, decodes, and both; a step that ends nothing but a chunk has no tokens to send."""
    steps = crossings(msgspec.structs.replace(config, async_scheduling=async_scheduling), *PLAIN)
    assert {*itertools.chain(*steps)} == {TO_DEVICE, TO_HOST}
    if async_scheduling == "off":
        assert steps[1:] == [[TO_DEVICE, TO_HOST]] * (len(steps) - 1)


@pytest.mark.parametrize("params", OTHERS, ids=lambda params: next(iter(params)))
def test_what_only_the_host_knows_of_a_row_is_one_transfer_more(config: EngineConfig, params: dict[str, Any]) -> None:
    steps = crossings(config, params, PLAIN[0], params)
    assert all(step in ([TO_DEVICE] * count + [TO_HOST] for count in (1, 2)) for step in steps[1:])
    assert [TO_DEVICE, TO_DEVICE, TO_HOST] in steps


def test_embeddings_come_with_the_one_transfer(config: EngineConfig) -> None:
    made = Engine(msgspec.structs.replace(config, task="embed"))
    made.submit(Submit(1, prompt(12, seed=1), SamplingParams(seed=0)))
    with Crossings() as crossed, Indices(crossed.seen):
        made.step(), made.step()
    assert crossed.seen == [TO_DEVICE, TO_DEVICE, TO_HOST]
