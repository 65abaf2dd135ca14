"""engine/warm_up.py: after it no request needs a kernel that is not compiled yet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from helpers.adapters import save_adapter
from helpers.checkpoints import engine_config, prompt, save
from helpers.contentless import Crossings, contentless
from helpers.families import FAMILIES
from tidewright.engine.engine import Engine
from tidewright.engine.messages import Submit
from tidewright.schema import SamplingParams


@pytest.mark.parametrize(("task", "has_adapters"), [("generate", False), ("embed", True)])
def test_requests_find_every_kernel_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str, has_adapters: bool
) -> None:
    """On a device without content: what counts is which kernels are launched, with which constants."""
    compiled: set[tuple[Any, ...]] = set()

    def start(kernel: Any, grid: Any, launch: Any, *_: Any) -> None:
        compiled.add((kernel.fn.__name__, *sorted(launch.constants.items()), *sorted(launch.options.items())))

    model = save(tmp_path, FAMILIES["gemma 2"])  # with windows in some layers
    contentless(monkeypatch, start).compiles = True
    config = engine_config(tmp_path, block_size=16, max_batched_tokens=200, max_running=4)
    if has_adapters:
        save_adapter(model, tmp_path / "a")
        config = msgspec.structs.replace(config, adapter_folder=str(tmp_path), max_adapters=2)
    with Crossings():
        engine = Engine(msgspec.structs.replace(config, task=task))
    if has_adapters:
        engine.add_adapter("a", engine.runner.read_adapter("a"))
    before = set(compiled)
    assert before
    mix: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.5, "top_k": 3},
        {"repetition_penalty": 2.0, "logprobs": 2},
        {"temperature": 0.0, "presence_penalty": 1.0, "min_tokens": 2},
        {"min_p": 0.1, "frequency_penalty": 1.0},
        {"temperature": 2.0},
    ]
    for number in range(3 * len(mix)):
        params = SamplingParams(seed=1, max_tokens=3, **mix[number % len(mix)])
        adapter = "a" if has_adapters and number % 2 else ""
        engine.submit(Submit(number, prompt(1 + 11 * number, seed=number), params, adapter=adapter))
    with Crossings():
        while engine.has_work:
            engine.step()
    assert compiled == before
    assert engine.stats().blocks_free == engine.stats().blocks_total
