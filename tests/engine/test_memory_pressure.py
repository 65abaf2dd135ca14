"""An engine process in a container that runs short of memory: a real cgroup, whose limit changes while requests run."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.checkpoints import expected, save
from helpers.engine_process import bridge, config, hear_ready, heartbeat, submit, tokens_of
from helpers.exports import save_tokenizer
from helpers.families import FAMILIES
from helpers.small_memory import small_memory

POOL = 64 * 2**20  # bytes


@pytest.mark.parametrize(("size", "share"), [("50%", 0.5), ("auto", 0.8)])
def test_the_first_size_is_what_a_container_has_room_for(tmp_path: Path, size: str, share: float) -> None:
    """Whatever the machine has. 1 GiB, as `auto` asks for, would not fit."""
    save(tmp_path, FAMILIES["llama, tied"])
    save_tokenizer(tmp_path)
    with small_memory() as cgroup, bridge() as engine:
        cgroup.take(engine.process.pid)
        cgroup.leave(2**30)
        engine.begin(config(tmp_path, kv_cache_memory=size))
        hear_ready(engine)
        assert 0.2 * share * 2**30 < heartbeat(engine, lambda stats: True).memory.kv_target < share * 2**30


def test_the_kv_cache_gives_way_to_a_container_s_limit_and_comes_back(tmp_path: Path) -> None:
    model = save(tmp_path, FAMILIES["llama, tied"])
    save_tokenizer(tmp_path)
    with small_memory() as cgroup, bridge() as engine:
        cgroup.take(engine.process.pid)
        engine.begin(config(tmp_path, kv_cache_memory=f"{POOL}B", heartbeat_interval=0.2))
        hear_ready(engine)
        whole = heartbeat(engine, lambda stats: True).memory
        assert whole.kv_pool > POOL - whole.block
        # The blocks were not used yet, so they take nothing: but what was promised to them has no room any more.
        cgroup.leave(POOL // 2)
        short = heartbeat(engine, lambda stats: stats.memory.kv_pool < whole.kv_pool)
        assert short.reclaimed["free_blocks"] >= POOL // 4
        assert short.memory.kv_target == whole.kv_pool
        request = submit(1, prompt=40, max_tokens=30, temperature=0.0)
        assert tokens_of(engine, [request])[1] == expected(model, request.prompt_token_ids, 30)
        cgroup.leave(32 * POOL)  # above the high watermark of the largest machine
        heartbeat(engine, lambda stats: stats.memory.kv_pool > short.memory.kv_pool)
