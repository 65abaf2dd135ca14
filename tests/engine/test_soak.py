"""A long run of short requests through the real engine process: nothing grows, nothing is lost."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import transformers

from engine.test_engine_process import Bridge, bridge
from tidewright.engine.messages import Abort, EngineConfig, Heartbeat, Ready, StepOutputs, Submit
from tidewright.schema import SamplingParams

REQUESTS, AT_ONCE, VOCAB = 10_000, 40, 64


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        eos_token_id=2,
    )
    torch.manual_seed(0)  # whether guesses come true is a matter of the weights
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def request(request_id: int, rng: random.Random) -> Submit:
    shared = [5, 6, 7, 8, 9, 10, 11, 12] * rng.randint(0, 2)
    params: dict[str, Any] = {
        "seed": rng.getrandbits(32),
        "max_tokens": rng.randint(1, 8),
        "temperature": rng.choice([0.0, 1.0]),
        "top_p": rng.choice([1.0, 0.9]),
        "presence_penalty": rng.choice([0.0, 0.0, 0.5]),
        "priority": rng.randint(0, 2),
        "cache_salt": rng.choice([None, "a"]),
    }
    prompt = shared + rng.choices(range(3, VOCAB), k=rng.randint(1, 12))
    return Submit(request_id, prompt, SamplingParams(**params))


def footprint(process: psutil.Process) -> tuple[float, int, int]:
    return process.memory_info().rss / 2**20, process.num_fds(), process.num_threads()


def idle_stats(engine: Bridge) -> Heartbeat:
    while True:
        message = engine.hear()
        if isinstance(message, Heartbeat) and message.stats.running + message.stats.waiting == 0:
            return message


@pytest.mark.heavy
def test_ten_thousand_requests_with_cancels(model: Path) -> None:
    rng = random.Random(1)
    # 60 blocks of 4 tokens for up to 16 sequences of up to 36: preemptions and evictions all the time.
    config = EngineConfig(
        model_dir=str(model),
        dtype="float32",
        threads=1,
        block_size=4,
        kv_cache_memory=str(2 * 8 * 4 * 4 * 70),
        max_model_len=48,
        max_running=16,
        max_batched_tokens=32,
        speculative_tokens=2,
        heartbeat_interval=0.05,
    )
    with bridge() as engine:
        engine.begin(config)
        ready = engine.hear()
        assert isinstance(ready, Ready)
        process = psutil.Process(engine.process.pid)
        live: set[int] = set()
        aborted: set[int] = set()
        ends: Counter[int] = Counter()
        early = (0.0, 0, 0)
        sent = 0
        while sent < REQUESTS or live:
            while sent < REQUESTS and len(live) < AT_ONCE:
                engine.say(request(sent, rng))
                live.add(sent)
                sent += 1
                if sent == REQUESTS // 5:
                    early = footprint(process)
            message = engine.hear()
            if not isinstance(message, StepOutputs):
                continue
            for output in message.outputs:
                assert not ends[output.request_id]
                if output.finish_reason:
                    assert output.finish_reason in ("stop", "length")
                    ends[output.request_id] += 1
                    live.discard(output.request_id)
            if live and rng.random() < 0.1:
                victim = rng.choice(sorted(live))
                engine.say(Abort(victim))
                aborted.add(victim)
                live.remove(victim)
        stats = idle_stats(engine).stats
        late = footprint(process)
        assert stats.blocks_free == stats.blocks_total == ready.num_blocks
        assert (stats.slots_unused, stats.running) == (0, 0)
        assert min(stats.preemptions, stats.prefix_hits, stats.prefix_evictions, stats.tokens_accepted) > 100
        assert all(ends[request_id] == 1 for request_id in range(REQUESTS) if request_id not in aborted)
        assert len(aborted) > REQUESTS / 100
        assert late[1] <= early[1]
        assert late[2] <= early[2]
        assert late[0] < early[0] + 16
