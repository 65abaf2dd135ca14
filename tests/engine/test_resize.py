"""The KV cache of a running engine grows and shrinks: requests go on, and say what they would have said."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from helpers.checkpoints import SIZES, engine_config, prompt, save
from tidewright.attention.reference import ReferenceAttention
from tidewright.devices.base import Device
from tidewright.devices.memory import DeviceMemory
from tidewright.engine import model_runner
from tidewright.engine.engine import Engine
from tidewright.engine.messages import Submit
from tidewright.kv_cache import storage
from tidewright.kv_cache.storage import BlockMoveError
from tidewright.schema import SamplingParams

CPU = torch.device("cpu")
LEAST, MOST = 21, 64  # blocks
SIZE = 2 * 3 * 2 * 8 * 4 * 4  # keys and values, layers, KV heads, head size, tokens, float32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    save(path, transformers.LlamaConfig(**SIZES))
    return path


class CopiedMemory(DeviceMemory):
    """As a GPU's: what shrinks has to be copied."""

    is_bounded = False

    def free(self) -> int:
        return 1 << 30

    def capacity(self) -> int:
        return 1 << 30

    def trim(self) -> None:
        pass

    def zeros(self, dimensions: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(dimensions, dtype=dtype)


def make(folder: Path, **changes: Any) -> Engine:
    values = {"max_model_len": 4 * LEAST, "max_running": 6, "kv_cache_memory": str(MOST * SIZE)}
    return Engine(engine_config(folder, **(values | changes)))


def mixed() -> list[Submit]:
    """Some share a beginning, some preempt others."""
    kinds: list[dict[str, Any]] = [{"temperature": 0}, {"top_p": 0.9, "logprobs": 1}, {"frequency_penalty": 0.5}]
    values = {"max_tokens": 20, "ignore_eos": True, "seed": 4}
    params = [SamplingParams(**(values | kinds[n % 3] | {"priority": n % 2})) for n in range(12)]
    return [Submit(n, prompt(60 - 4 * n, seed=n % 4), params[n]) for n in range(12)]


def outputs(engine: Engine, sizes: list[int]) -> dict[int, list[int]]:
    """Tokens by request. Before each step the cache gets the next of `sizes`, which go round."""
    tokens: dict[int, list[int]] = {}
    for request in mixed():
        assert engine.submit(request) is None
        tokens[request.request_id] = []
    round_ = itertools.cycle(sizes)
    while engine.has_work:
        engine.resize(next(round_))
        for output in engine.step():
            tokens[output.request_id] += output.token_ids
            assert output.finish_reason in (None, "length")
    engine.scheduler.check_integrity()
    assert engine.stats().blocks_free == engine.stats().blocks_total == engine.runner.num_blocks
    return tokens


@pytest.mark.parametrize(
    ("changes", "copied"),
    [
        ({}, False),
        ({"kv_cache_dtype": "int8"}, True),
        ({"async_scheduling": "on"}, False),
        ({"speculative_tokens": 2}, True),
    ],
    ids=str,
)
def test_outputs_are_the_same_while_the_cache_is_resized(
    folder: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], copied: bool
) -> None:
    if copied:
        device = Device(CPU, ReferenceAttention(4, CPU), CopiedMemory(CPU))
        monkeypatch.setattr(model_runner, "make_device", lambda *_, **__: device)
    wanted = outputs(make(folder, **changes), [MOST])
    engine = make(folder, **changes)
    assert outputs(engine, [MOST, 40, 30, LEAST, LEAST, 50, 57]) == wanted
    assert engine.stats().preemptions > 0


def test_an_engine_that_can_t_move_its_blocks_does_not_go_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They have new numbers by then. A copy of a layer that finds no memory is survived: no block is elsewhere."""

    def move(_: torch.Tensor, sources: list[int], places: list[int]) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(storage, "_move", move)
    with pytest.raises(BlockMoveError):
        outputs(make(folder), [MOST, 40, 30, LEAST])
