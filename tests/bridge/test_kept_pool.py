"""The whole bridge with a real engine that is killed while something else takes memory: streams go on as they were."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import transformers

from helpers.checkpoints import SIZES, save
from helpers.engine_process import PATIENCE
from helpers.scripted import Caller
from tidewright.bridge import engine_process
from tidewright.bridge.bridge import Bridge
from tidewright.bridge.request import GenerationRequest, OutputOptions
from tidewright.config import Settings
from tidewright.errors import InvalidRequestError
from tidewright.schema import SamplingParams
from tidewright.tokenization import Tokenizer

BYTES_PER_TOKEN = 2 * 3 * 2 * 8 * 4  # keys and values, layers, KV heads, head size, float32

# The machine has as much free memory as the file says.
_PYTHON = """#!{python}
import sys
from pathlib import Path
from types import SimpleNamespace
from tidewright.devices.cpu import memory
memory.machine_memory = lambda: SimpleNamespace(free=int(Path({file!r}).read_text()), total=1 << 40)
from tidewright.kv_cache import storage
storage.PATIENCE = 0.1
sys.argv[1:3] = []
from tidewright.engine.__main__ import main
main()
"""


def wait_for(what: Callable[[], Any]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_an_engine_that_takes_anothers_place_has_the_size_that_was_set_since(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    save(tmp_path, transformers.LlamaConfig(**SIZES))
    settings = Settings(dtype="float32", kv_cache_memory=str(640 * BYTES_PER_TOKEN), max_model_len=64, threads=1)
    bridge = Bridge(settings, msgspec.structs.replace(settings.engine_config(tmp_path), standby=False), tokenizer)
    bridge.start()
    try:
        wait_for(lambda: bridge.engine_stats.blocks_total == 40)
        for refused in ("1", str(641 * BYTES_PER_TOKEN), "9" * 5000, "1e9", "-5", ""):
            with pytest.raises(InvalidRequestError, match=rf"can have {64 * BYTES_PER_TOKEN} to"):
                bridge.resize_cache(refused)
        bridge.resize_cache(str(170 * BYTES_PER_TOKEN))
        wait_for(lambda: bridge.engine_stats.blocks_total == 10)
        assert bridge.engine
        os.kill(bridge.engine.pid, signal.SIGKILL)
        wait_for(lambda: bridge.engine_restarts and bridge.engine_stats.blocks_total)
        assert bridge.engine_stats.blocks_total == 10
        assert bridge.engine_stats.cache_resizes == 1  # over all engines
        bridge.resize_cache(str(640 * BYTES_PER_TOKEN))
        wait_for(lambda: bridge.engine_stats.blocks_total == 40)
    finally:
        bridge.stop()


@pytest.mark.heavy
def test_what_the_first_engine_and_an_operator_decided_outlasts_it(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """One of two models, without a max_model_len: what a request may have is what the first pool held."""
    save(tmp_path, transformers.LlamaConfig(**SIZES | {"max_position_embeddings": 2048}))
    settings = Settings(dtype="float32", kv_cache_memory=str(1280 * BYTES_PER_TOKEN), kv_cache_share=0.5, threads=1)
    config = msgspec.structs.replace(settings.engine_config(tmp_path), kv_cache_share=0.5, standby=False)
    bridge = Bridge(settings, config, tokenizer)
    bridge.start()

    def restart() -> None:
        assert bridge.engine
        restarts = bridge.engine_restarts
        os.kill(bridge.engine.pid, signal.SIGKILL)
        wait_for(lambda: bridge.engine_restarts > restarts and bridge.engine_stats.blocks_total)

    try:
        wait_for(lambda: bridge.engine_stats.blocks_total == 40)
        assert bridge.engine
        assert bridge.engine.max_model_len == 640
        bridge.limit_cache(str(1280 * BYTES_PER_TOKEN))
        wait_for(lambda: bridge.engine_stats.blocks_total == 80)
        bridge.resize_cache(str(960 * BYTES_PER_TOKEN))
        wait_for(lambda: bridge.engine_stats.blocks_total == 60)
        bridge.limit_cache(str(800 * BYTES_PER_TOKEN))
        wait_for(lambda: bridge.engine_stats.blocks_total == 50)
        restart()
        assert bridge.engine.max_model_len == 640
        assert bridge.engine_stats.memory.kv_least == 640 * BYTES_PER_TOKEN
        assert bridge.engine_stats.blocks_total == 50
        assert bridge.engine_stats.memory.kv_room == 960 * BYTES_PER_TOKEN
        bridge.limit_cache(str(960 * BYTES_PER_TOKEN))
        wait_for(lambda: bridge.engine_stats.blocks_total == 60)
        bridge.limit_cache(str(640 * BYTES_PER_TOKEN))
        wait_for(lambda: bridge.engine_stats.blocks_total == 40)
    finally:
        bridge.stop()


@pytest.mark.heavy
def test_a_stream_survives_engine_and_memory(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, free, python = tmp_path / "model", tmp_path / "free", tmp_path / "python3"
    save(model, transformers.LlamaConfig(**SIZES | {"max_position_embeddings": 2048}))
    python.write_text(_PYTHON.format(python=sys.executable, file=str(free)))
    python.chmod(0o755)
    monkeypatch.setattr(engine_process, "_python", lambda: str(python))
    free.write_text(str(620 * BYTES_PER_TOKEN))
    settings = Settings(dtype="float32", kv_cache_memory="80%", block_size=16, threads=1)
    config = msgspec.structs.replace(settings.engine_config(model), standby=False)
    bridge = Bridge(settings, config, tokenizer)
    bridge.start()

    def stream() -> Caller:
        caller = Caller()
        params = SamplingParams(max_tokens=400, ignore_eos=True, seed=5, temperature=2.0)
        bridge.submit(GenerationRequest([5, 6, 7], "", True, params, OutputOptions()), caller, "")
        return caller

    def tokens(caller: Caller) -> list[int]:
        return [token for response in caller.responses for token in response.deltas[0].token_ids]

    try:
        assert bridge.engine
        assert bridge.engine.num_blocks == 31  # 80 %
        caller = stream()
        wait_for(lambda: caller.ends)
        wanted = tokens(caller)
        assert len(wanted) == 400

        caller = stream()
        wait_for(lambda: len(tokens(caller)) >= 5)
        free.write_text(str(480 * BYTES_PER_TOKEN))  # the stream needs more
        os.kill(bridge.engine.pid, signal.SIGKILL)
        wait_for(lambda: "a request in flight needs 403 tokens where this holds 384" in bridge.trouble)
        free.write_text(str(500 * BYTES_PER_TOKEN))  # of which 80 % would be too little, too
        wait_for(lambda: caller.ends)
        assert caller.error is None
        assert tokens(caller) == wanted
        assert bridge.engine.num_blocks == 31
    finally:
        bridge.stop()
