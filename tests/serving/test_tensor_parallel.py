"""The embedded model cut over ranks, behind the real Triton; ranks are killed under load and nobody notices."""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from helpers.needs import needs
from helpers.oracle import PROMPTS, Oracle
from helpers.processes import shared_memory
from helpers.triton import Generation, RunningServer

SOME = ("english", "code", "numbers", "chinese", "emoji", "long")


@pytest.fixture(scope="module")
def two_ranks(model_dir: Path) -> Iterator[RunningServer]:
    """2 and 1 of the 3 KV heads, 6 and 3 of the 9 query heads."""
    options = {"dtype": "float32", "tensor_parallel_size": 2, "max_model_len": 4096, "heartbeat_timeout": 6}
    before = shared_memory()
    with RunningServer(model_dir, **options) as running:
        yield running
        assert running.triton.pid is not None
        triton = psutil.Process(running.triton.pid)
        family = triton.children(recursive=True)
        ports = listening() & {port for one in (triton, *family) for port in ports_of(one)}
        assert ports
    # After all the deaths in this file.
    assert not psutil.wait_procs(family, timeout=10)[1]
    assert shared_memory() <= before
    assert not listening() & ports


def listening() -> set[int]:
    return {c.laddr.port for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN}


def ports_of(process: psutil.Process) -> set[int]:
    try:
        return {c.laddr.port for c in process.net_connections("tcp")}
    except psutil.NoSuchProcess:
        return set()


@needs("chaos")
def ranks_of(server: RunningServer) -> list[psutil.Process]:
    """Rank 0, then the others."""
    assert server.triton.pid is not None
    family = psutil.Process(server.triton.pid).children(recursive=True)
    engines = [process for process in family if "tidewright.engine" in process.cmdline()]
    engine = min(engines, key=psutil.Process.create_time)  # a younger one stands by
    return [engine, *engine.children()]


def run(server: RunningServer, faults: int = 0, rng: random.Random | None = None) -> dict[str, Generation]:
    """Streams of all kinds; `faults` times a random rank is killed or stopped while they run."""
    requests = {
        **{f"greedy {i}": {"temperature": 0} for i in range(4)},
        **{f"seeded {i}": {"temperature": 1.0, "seed": i} for i in range(4)},
        "penalties": {"temperature": 0.8, "seed": 6, "frequency_penalty": 0.5, "top_p": 0.9},
        "guided": {"temperature": 0, "guided_regex": "[a-z ,.]{600,900}", "ignore_eos": False},
    }
    with server.stream() as stream:
        for i, (name, params) in enumerate(requests.items()):
            sampling = {"max_tokens": 100, "ignore_eos": True, **params}
            text = list(PROMPTS.values())[i]
            stream.send(name, text_input=text, stream=True, sampling_parameters=sampling)
        for fault in range(faults):
            assert rng
            while len(stream.generations["greedy 0"].token_ids) < 100 * (fault + 1) // (faults + 1):
                stream.next()
            rng.choice(ranks_of(server)).send_signal(rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP]))
        return stream.finish()


def test_tokens_are_those_of_transformers(two_ranks: RunningServer, oracle: Oracle) -> None:
    for name in SOME:
        ids = oracle.ids(PROMPTS[name])
        options = {"temperature": 0, "max_tokens": 24}
        found = two_ranks.generate(text_input=PROMPTS[name], sampling_parameters=options).token_ids
        assert found == oracle.greedy(ids, 24, guess=found), name


def test_any_rank_may_die_at_any_time(two_ranks: RunningServer) -> None:
    assert len(ranks_of(two_ranks)) == 2
    undisturbed = run(two_ranks)
    restarts = two_ranks.metric("engine_restarts_total")
    disturbed = run(two_ranks, faults=4, rng=random.Random(1))
    for name, generation in undisturbed.items():
        assert generation.error is None is disturbed[name].error, name
        assert disturbed[name].token_ids == generation.token_ids, name
        assert disturbed[name].text == generation.text, name
        assert disturbed[name].ended == 1
    two_ranks.wait_idle()
    assert two_ranks.metric("engine_restarts_total") == restarts + 4
    assert len(ranks_of(two_ranks)) == 2


def test_agreement_is_counted(two_ranks: RunningServer) -> None:
    assert two_ranks.metrics()["step_seconds_total", "agree"] > 0
