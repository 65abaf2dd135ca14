"""The whole bridge with a real engine that is killed with LoRA adapters loaded: they are back, and streams go on."""

from __future__ import annotations

import os
import queue
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from helpers.adapters import save_adapter
from helpers.checkpoints import save
from helpers.engine_process import PATIENCE
from helpers.families import FAMILIES
from helpers.scripted import Caller
from tidewright.bridge.adapters import Adapter
from tidewright.bridge.bridge import Bridge
from tidewright.bridge.request import GenerationRequest, OutputOptions
from tidewright.config import Settings
from tidewright.errors import RequestError
from tidewright.schema import SamplingParams
from tidewright.tokenization import Tokenizer

ADAPTERS = ("one", "two", "")


def wait_for(what: Callable[[], Any]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def tokens(caller: Caller) -> list[int]:
    return [token for response in caller.responses for token in response.deltas[0].token_ids]


@pytest.mark.heavy
def test_adapters_and_streams_survive_the_engine(tmp_path: Path, tokenizer: Tokenizer) -> None:
    model = save(tmp_path / "model", FAMILIES["llama, tied"])
    for number, name in enumerate(ADAPTERS[:2]):
        save_adapter(model, tmp_path / name, seed=number)
    settings = Settings(dtype="float32", block_size=16, threads=1, adapter_folder=str(tmp_path), max_adapters=1)
    bridge = Bridge(
        settings, msgspec.structs.replace(settings.engine_config(tmp_path / "model"), standby=False), tokenizer
    )
    answers: queue.SimpleQueue[Adapter | RequestError] = queue.SimpleQueue()

    def load(name: str) -> None:
        bridge.load_adapter(name, name, answers.put)
        answer = answers.get(timeout=PATIENCE)
        assert isinstance(answer, Adapter), answer

    def streams() -> list[Caller]:
        callers = []
        for name in ADAPTERS:
            callers.append(Caller())
            params = SamplingParams(max_tokens=220, ignore_eos=True, seed=5, temperature=2.0, lora_name=name or None)
            request = GenerationRequest([5, 6, 7], "", True, params, OutputOptions())
            bridge.submit(request, callers[-1], "")
        return callers

    bridge.start()
    try:
        for name in ADAPTERS[:2]:
            load(name)
        callers = streams()
        wait_for(lambda: all(caller.ends for caller in callers))
        wanted = [tokens(caller) for caller in callers]
        assert len({tuple(said) for said in wanted}) == 3

        callers = streams()
        wait_for(lambda: len(tokens(callers[0])) >= 5)
        bridge.unload_adapter("one", answers.put)  # a stream has it
        wait_for(lambda: bridge.adapters[0].state == "unloading")
        assert bridge.engine
        os.kill(bridge.engine.pid, signal.SIGKILL)
        wait_for(lambda: all(caller.ends for caller in callers))
        assert [caller.error for caller in callers] == [None] * 3
        assert [tokens(caller) for caller in callers] == wanted
        assert bridge.engine_restarts == 1
        assert isinstance(answers.get(timeout=PATIENCE), Adapter)
        assert [(adapter.name, adapter.state) for adapter in bridge.adapters] == [("two", "loaded")]
        load("one")
    finally:
        bridge.stop()
