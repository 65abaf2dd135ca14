"""What the bridge counts, and what it says of itself and its engine."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest
from msgspec.structs import replace

from helpers.scripted import World
from tidewright.engine.messages import (
    EngineStats,
    SequenceOutput,
)
from tidewright.errors import (
    EngineUnavailableError,
)
from tidewright.memory.reclaim import STAGES
from tidewright.schema import DRAINING, PROTOCOL, DecoderStatus, FinishReason

EOS = 2


def test_latencies_are_counted_once_for_each_request_and_each_further_token(world: World) -> None:
    caller = world.submit(n=2, stream=True)
    world.engine.says(SequenceOutput(1, [5], queued_seconds=0.25))
    caller.wait(lambda caller: len(caller.responses) == 1)
    world.engine.says(SequenceOutput(1, [5, 6, 7], "length"), SequenceOutput(2, [5, 6], None, queued_seconds=0.5))
    caller.wait(lambda caller: len(caller.responses) == 2)
    world.engine.says(SequenceOutput(2, [], "timeout"))
    caller.end()
    refused = world.submit()
    world.engine.says(SequenceOutput(3, [], "invalid"))
    refused.end()
    world.wait_idle()
    histograms = world.bridge.request_stats.read_histograms()
    assert {name: sum(histogram.counts) for name, histogram in histograms.items()} == {
        "request_queue_seconds": 1,
        "time_to_first_token_seconds": 1,
        "inter_token_latency_seconds": 3 + 1,
        "request_latency_seconds": 1,
    }
    assert histograms["request_queue_seconds"].total == 0.25
    first, whole = histograms["time_to_first_token_seconds"].total, histograms["request_latency_seconds"].total
    assert 0 < first < whole
    assert 0 < histograms["inter_token_latency_seconds"].total < whole


def test_a_request_that_ended_by_itself_is_held_to_its_targets(world: World) -> None:
    met, missed = 3600.0, 1e-9

    def run(reason: FinishReason = "length", **targets: float) -> dict[str, int]:
        before = world.bridge.request_stats.read_within()
        caller = world.submit(stream=True, **targets)
        number = world.engine.submitted()[-1].request_id
        world.engine.says(SequenceOutput(number, [5]))
        caller.wait(lambda caller: len(caller.responses) == 1)
        world.engine.says(SequenceOutput(number, [6], reason))
        caller.end()
        world.wait_idle()
        return {name: n - before[name] for name, n in world.bridge.request_stats.read_within().items()}

    assert run() == {"ttft": 1, "tpot": 1, "both": 1}  # the server has no targets
    assert run(ttft_target=met, tpot_target=met) == {"ttft": 1, "tpot": 1, "both": 1}
    assert run(ttft_target=missed, tpot_target=met) == {"ttft": 0, "tpot": 1, "both": 0}
    assert run(ttft_target=met, tpot_target=missed) == {"ttft": 1, "tpot": 0, "both": 0}
    assert run(priority=1000) == {"ttft": 1, "tpot": 0, "both": 0}  # its class has one
    assert run(priority=1000, tpot_target=met) == {"ttft": 1, "tpot": 1, "both": 1}
    assert run("timeout", ttft_target=met) == {"ttft": 0, "tpot": 0, "both": 0}


def test_counters_of_a_lost_engine_stay_and_its_gauges_go(world: World) -> None:
    events = world.engine.events
    events.stats(EngineStats(1, 2, 30, 4, 50, 600, 700, 8, tokens_drafted=9, send_seconds=1.5))
    events.stats(EngineStats(1, 2, 30, 4, 60, 600, 700, 8, tokens_drafted=9, send_seconds=1.5))
    assert world.bridge.engine_stats.steps == 60
    events.lost("killed")
    none = dict.fromkeys(STAGES, 0)
    sums = EngineStats(0, 0, 0, 0, 60, 600, 700, 8, tokens_drafted=9, send_seconds=1.5, reclaimed=none)
    assert world.bridge.engine_stats == sums
    events.stats(EngineStats(5, 0, 30, 30, 100, 1, 2, 3, send_seconds=0.5))  # more steps than the old one already
    after = world.bridge.engine_stats
    assert (after.running, after.blocks_free, after.steps, after.prompt_tokens) == (5, 30, 160, 601)
    assert (after.tokens_drafted, after.send_seconds) == (9, 2.0)


def test_a_draining_bridge_finishes_what_it_has_and_then_says_why_it_stops(world: World) -> None:
    assert world.bridge.trouble == ""
    quick, slow = world.submit(), world.submit()
    for _ in range(2):
        world.bridge.drain()
    assert world.bridge.trouble == DRAINING
    with pytest.raises(EngineUnavailableError, match="shutting down; send the request to another"):
        world.submit()
    tokens = [*world.ids(" done"), EOS]
    world.engine.says(SequenceOutput(1, tokens, "stop"))
    assert quick.end()[0].text == " done"
    slow.end()
    assert isinstance(slow.error, EngineUnavailableError)
    assert str(slow.error) == "the server is shutting down, and 1 s (shutdown_grace) were not enough to finish"
    world.wait_idle()
    assert (quick.ends, slow.ends, world.engine.aborted()) == (1, 1, [2])


def test_trouble_is_what_the_engine_died_of(world: World) -> None:
    world.engine.available, world.engine.cause = False, "rank 1 died (signal 9)"
    assert world.bridge.trouble == "the engine is not available (rank 1 died (signal 9))"


def test_status_tells_what_is_wrong_and_how_full_it_is(world: World) -> None:
    longest = 1000  # of the scripted engine
    well = world.bridge.status
    assert well == DecoderStatus(
        "",
        False,
        0.0,
        0.0,
        0.0,
        0.0,
        0,
        longest,
        os.getpid(),
        "smollm2-135m",
        well.tokenizer,
        3,
        tells_details=True,
        tells_timings=True,
        knows_tenants=True,
        knows_targets=True,
        protocol=PROTOCOL,
    )
    assert len(well.tokenizer) == 64
    world.engine.silent_for = 0.75
    world.engine.events.stats(EngineStats(3, 1, 40, 10, 0, 0, 0, 0))
    room = 40 * world.bridge.engine.block_size
    assert world.bridge.status == replace(well, silence=0.75, waiting=0.5, kv_usage=0.75, kv_tokens=room)
    world.engine.available, world.engine.cause, world.engine.silent_for = False, "killed by SIGKILL", 0.0
    world.engine.dies()
    assert world.bridge.status == replace(well, trouble="the engine is not available (killed by SIGKILL)")
    world.bridge.drain()
    assert world.bridge.status == replace(well, trouble=DRAINING, draining=True)


def test_status_tells_how_long_the_oldest_request_is_queued(world: World) -> None:
    def waits(since: tuple[float, float]) -> bool:
        asked = time.monotonic()
        wait = world.bridge.status.wait
        return asked - since[1] <= wait <= time.monotonic() - since[0]

    def submit(**request: Any) -> tuple[float, float]:
        before = time.monotonic()
        world.submit(stream=True, **request)
        after = time.monotonic()
        time.sleep(0.05)
        return before, after

    def queued(number: int) -> None:
        world.engine.events.stats(EngineStats(1, number, 40, 10, 0, 0, 0, 0))

    oldest, resumed, youngest = submit(n=2), submit(resume_ids=[5, 6]), submit()
    assert world.bridge.status.active == 3
    assert world.bridge.status.wait == 0  # all are computed, however long their prompts take
    queued(3)
    assert waits(oldest)
    queued(2)
    assert waits(resumed)
    world.engine.says(SequenceOutput(2, [5]))  # of the second sequence of the oldest
    queued(1)
    assert waits(youngest)
    queued(5)  # preempted ones, which have tokens, are queued as well
    assert waits(resumed)
    queued(0)
    assert world.bridge.status.wait == 0
