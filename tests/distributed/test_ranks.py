"""Tensor-parallel ranks as real processes: the tokens of one rank and of transformers; how they end.

How those of several hosts meet: test_joining.py.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import transformers

from helpers.checkpoints import SIZES, expected, prompt, save
from helpers.engine_process import (
    Bridge,
    bridge,
    config,
    hear_failed,
    hear_ready,
    heartbeat,
    submit,
    tokens_of,
)
from helpers.one_engine import tokens_of_engine
from helpers.oracle import PROMPTS, Oracle
from tidewright.distributed.placement import place
from tidewright.engine.engine import Engine
from tidewright.engine.messages import Begin, Configure, Heartbeat, Ready, ResizeCache, StepOutputs, Submit
from tidewright.schema import SamplingParams


def descendants(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


@contextmanager
def group(model: Path, size: int, **changes: Any) -> Iterator[Bridge]:
    """An engine of so many ranks; in the end none may be left."""
    with bridge() as started:
        started.begin(config(model, tensor_parallel_size=size, **changes))
        hear_ready(started)
        family = [psutil.Process(started.process.pid), *descendants(started.process)]
        assert len(family) == size
        yield started
        started.connection.close()
        _, alive = psutil.wait_procs(family, timeout=10)
        assert not alive


def a_bit_of_everything() -> list[Submit]:
    """Prefixes to share, chunks, guesses, penalties, draws; more than the pool holds at once."""
    common = prompt(20, seed=9)
    repeating = prompt(5, seed=3) * 6
    cases: list[tuple[list[int], dict[str, Any]]] = [
        (common + prompt(4, seed=1), {"temperature": 0}),
        (common + prompt(7, seed=2), {"temperature": 0, "logprobs": 2, "prompt_logprobs": 1}),
        (repeating, {"temperature": 0}),
        (repeating, {"seed": 5}),
        (prompt(90, seed=4), {"seed": 6, "top_p": 0.9, "frequency_penalty": 0.5, "min_tokens": 9}),
        (prompt(3, seed=5), {"seed": 7, "priority": -1, "bad_words": ["x"]}),
        (repeating, {"seed": 8, "allowed_token_ids": [*{*repeating[:3]}, 30]}),
    ]
    options = {"max_tokens": 24, "ignore_eos": True, "seed": 0}
    return [Submit(i, ids, SamplingParams(**(options | params))) for i, (ids, params) in enumerate(cases)]


HARD = {"block_size": 4, "max_batched_tokens": 32, "speculative_tokens": 3}


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.heavy
def test_any_number_of_ranks_gives_the_same_tokens(tmp_path: Path, size: int) -> None:
    """As one rank, and greedy ones as transformers.

    3 query and 3 KV heads for 2 ranks with uneven parts; 8 and 2 for 4, which share KV heads and run ahead. Even parts:
    the embedded model, below.
    """
    heads = {2: (3, 3), 4: (8, 2)}[size]
    sizes = {**SIZES, "num_attention_heads": heads[0], "num_key_value_heads": heads[1], "head_dim": 8}
    oracle = save(tmp_path, transformers.LlamaConfig(**sizes), shards=True)
    shared = {**HARD, "kv_cache_memory": f"{49 * heads[1]}KiB"}
    own_way = {"speculative_tokens": 0, "async_scheduling": "on"} if size == 4 else {}
    with bridge() as alone:
        alone.begin(config(tmp_path, **shared))
        hear_ready(alone)
        wanted = tokens_of(alone, a_bit_of_everything())
    # Of the KV cache each rank has its own share.
    own = max(heads[1] // size, 1) if heads[1] % size == 0 or size > heads[1] else 2
    with group(tmp_path, size, **{**shared, **own_way, "kv_cache_memory": f"{49 * own}KiB"}) as started:
        assert tokens_of(started, a_bit_of_everything()) == wanted
        for request in a_bit_of_everything():
            if request.sampling.temperature == 0:
                assert wanted[request.request_id] == expected(oracle, request.prompt_token_ids, 24)
        preemptions = 0
        while not preemptions:
            message = started.hear()
            preemptions = message.stats.preemptions if isinstance(message, Heartbeat) else 0


def test_two_ranks_with_a_quantized_cache_give_the_tokens_of_one(checkpoint: tuple[Path, Any]) -> None:
    """A scale belongs to one head, so a rank that has some of the heads stores the same codes."""
    # What steps take decides how much of a prompt comes and how many run: one rank measures it, both must agree.
    options = {**HARD, "kv_cache_dtype": "int8", "tpot_target": 0.005}
    requests = [request for request in a_bit_of_everything() if request.sampling.temperature == 0]
    wanted = tokens_of_engine(Engine(place(config(checkpoint[0], **options), 0)), requests)
    with group(checkpoint[0], 2, **options) as started:
        assert tokens_of(started, requests) == wanted


@pytest.mark.heavy
def test_two_ranks_resize_their_caches_alike(checkpoint: tuple[Path, Any]) -> None:
    """A rank compares its plans, blocks included, with rank 0's. The first resize comes while there is no step."""
    requests = [request for request in a_bit_of_everything() if request.sampling.temperature == 0]
    with group(checkpoint[0], 2, **HARD, max_model_len=96, kv_cache_memory="96KiB") as started:
        wanted = tokens_of(started, requests)
        started.say(ResizeCache(30))
        assert heartbeat(started, lambda stats: stats.cache_resizes == 1).blocks_total == 30
        resizes = [ResizeCache(num_blocks) for num_blocks in (60, 40, 24) * 4]
        assert tokens_of(started, requests, resizes) == wanted
        assert heartbeat(started, lambda stats: stats.cache_resizes > 3).blocks_free > 0


# Of rank 1, whose device has no memory for another block as long as a file is there.
_SHORT_RANK = """#!{python}
import sys
from pathlib import Path
import torch
from tidewright.devices.cpu.memory import CpuMemory
from tidewright.kv_cache import storage
resize = storage.KVCache.resize
def short(cache, num_blocks):
    if Path({file!r}).exists() and num_blocks > cache.num_blocks:
        raise torch.OutOfMemoryError("CUDA out of memory")
    return resize(cache, num_blocks)
storage.KVCache.resize, storage.PATIENCE = short, 0.1
CpuMemory.free = lambda memory: 50 * {block} if Path({file!r}).exists() else 1 << 30
sys.argv[1:3] = []
from tidewright.distributed.rank import main
main()
"""
BLOCK = 2 * 3 * 8 * 4 * 4  # bytes on each of two ranks: keys and values, layers, head size, float32, tokens


@contextmanager
def short_rank(folder: Path) -> Iterator[tuple[Bridge, Path]]:
    """A process that will be an engine, and the file that is there while rank 1's device is short of memory."""
    file, python = folder / "short", folder / "python3"
    python.write_text(_SHORT_RANK.format(python=sys.executable, file=str(file), block=BLOCK))
    python.chmod(0o755)
    begun = "import sys; from tidewright.engine import __main__; sys.executable = {!r}; __main__.main()"
    with bridge("-c", begun.format(str(python))) as started:
        yield started, file


SMALL = {**HARD, "tensor_parallel_size": 2, "max_model_len": 64, "kv_cache_memory": f"{60 * BLOCK}B"}


@pytest.mark.heavy
def test_a_growth_that_one_rank_has_no_memory_for_is_taken_back_on_all(
    checkpoint: tuple[Path, Any], tmp_path: Path
) -> None:
    requests = [submit(number, prompt=9, max_tokens=20, temperature=0.0) for number in range(4)]
    with short_rank(tmp_path) as (started, file):
        started.begin(config(checkpoint[0], **SMALL))
        hear_ready(started)
        wanted = tokens_of(started, requests)
        started.say(ResizeCache(30))
        heartbeat(started, lambda stats: stats.cache_resizes == 1)
        file.touch()
        assert tokens_of(started, requests, [ResizeCache(60)] * 3) == wanted
        started.say(ResizeCache(60))  # also while there is no step
        assert tokens_of(started, requests) == wanted
        stats = heartbeat(started, lambda stats: True)
        assert (stats.blocks_total, stats.cache_resizes, stats.memory.kv_target) == (30, 1, 30 * BLOCK)
        file.unlink()
        started.say(ResizeCache(60))
        assert tokens_of(started, requests) == wanted
        assert heartbeat(started, lambda stats: True).blocks_total == 60


@pytest.mark.heavy
def test_an_engine_that_takes_anothers_place_on_a_fuller_device_does_not_die_of_it(
    checkpoint: tuple[Path, Any], tmp_path: Path
) -> None:
    """Nor do those after it: they would try the same."""
    with short_rank(tmp_path) as (started, file):
        file.touch()
        started.say(Configure(config(checkpoint[0], **SMALL)))
        started.say(Begin(num_blocks=60, most_blocks=60))
        ready = started.hear()
        assert isinstance(ready, Ready)
        assert (ready.num_blocks, ready.memory.target_blocks) == (20, 60)  # 40 % of what rank 1 has
        stats = heartbeat(started, lambda stats: stats.memory.target_blocks < 60)
        assert (stats.blocks_total, stats.memory.target_blocks) == (20, 20)
        assert len(tokens_of(started, [submit(1)])[1]) == 4


@pytest.mark.heavy
def test_three_ranks_of_the_embedded_model(model_dir: Path, oracle: Oracle) -> None:
    """Each has one of its KV heads and three of its query heads."""
    greedy = SamplingParams(temperature=0, max_tokens=12, seed=0)
    prompts = [oracle.ids(PROMPTS[name]) for name in ("english", "numbers", "korean")]
    with group(model_dir, 3, kv_cache_memory="64MiB") as started:
        tokens = tokens_of(started, [Submit(i, ids, greedy) for i, ids in enumerate(prompts)])
    assert list(tokens.values()) == [oracle.greedy(ids, 12, guess=tokens[i]) for i, ids in enumerate(prompts)]


@pytest.mark.heavy
def test_aborts_and_deadlines_reach_every_rank(checkpoint: tuple[Path, Any]) -> None:
    """Every rank checks the plans: were a request still running anywhere, the engine would end."""
    with group(checkpoint[0], 2) as started:
        started.say(submit(1, max_tokens=200))
        started.say(Submit(2, [5, 6], SamplingParams(max_tokens=250, timeout=0.2, seed=1), time.monotonic() + 0.2))
        while not isinstance(message := started.hear(), StepOutputs) or not message.outputs:
            pass
        ended = {o.request_id for o in message.outputs if o.finish_reason}  # on a busy machine, 2 has by now
        started.say(submit(3, max_tokens=30))
        assert {o.request_id for o in started.outputs({1, 2, 3} - ended) if o.finish_reason} | ended == {1, 2, 3}
        assert len(tokens_of(started, [submit(4)])[4]) == 4


@pytest.mark.heavy
def test_two_engines_of_two_ranks_on_one_host(checkpoint: tuple[Path, Any]) -> None:
    with group(checkpoint[0], 2) as first, group(checkpoint[0], 2) as second:
        second.say(submit(1, max_tokens=30))
        tokens = tokens_of(first, [submit(1, max_tokens=30)])[1]
        assert [token for output in second.outputs({1}) for token in output.token_ids] == tokens


@pytest.mark.parametrize("busy", [False, True])
@pytest.mark.heavy
def test_a_killed_rank_ends_the_engine_with_the_cause(checkpoint: tuple[Path, Any], busy: bool) -> None:
    with group(checkpoint[0], 2) as started:
        if busy:
            started.say(submit(1, max_tokens=200))
            while not isinstance(started.hear(), StepOutputs):
                pass
        descendants(started.process)[0].kill()
        assert hear_failed(started) == "rank 1 died (signal 9)"
        assert started.exit_code() == 1


@pytest.mark.parametrize("busy", [False, True])
@pytest.mark.heavy
def test_a_stuck_rank_ends_the_engine(checkpoint: tuple[Path, Any], busy: bool) -> None:
    with group(checkpoint[0], 2, heartbeat_timeout=3.0) as started:
        if busy:
            started.say(submit(1, max_tokens=200))
            while not isinstance(started.hear(), StepOutputs):
                pass
        descendants(started.process)[0].send_signal(signal.SIGSTOP)
        message = hear_failed(started)
        assert busy or message == "rank 1 is stuck: no answer for 1.5 s"
        assert started.exit_code() == 1


@pytest.mark.heavy
def test_ranks_end_with_a_killed_rank_0(checkpoint: tuple[Path, Any]) -> None:
    with group(checkpoint[0], 2) as started:
        started.say(submit(1, max_tokens=200))
        started.process.kill()


def test_heads_that_can_t_be_shared_are_explained(checkpoint: tuple[Path, Any]) -> None:
    with bridge() as started:
        started.begin(config(checkpoint[0], tensor_parallel_size=3))
        assert "6 query heads and 2 KV heads can only be shared by 1, 2, 6 ranks" in hear_failed(started)
        family = descendants(started.process)
        assert started.exit_code() == 1
        assert not psutil.wait_procs(family, timeout=10)[1]


@pytest.mark.heavy
def test_ranks_of_one_host_prove_it_too(checkpoint: tuple[Path, Any], tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text("0123456789abcdef")
    with group(checkpoint[0], 2, rendezvous_secret_file=str(file)) as started:
        assert len(tokens_of(started, [submit(1)])[1]) == 4
