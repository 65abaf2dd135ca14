"""engine/engine.py with LoRA adapters on a small random model: sharing steps and slots changes no token."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
import torch

from helpers.adapters import save_adapter
from helpers.checkpoints import expected, prompt, save
from helpers.families import FAMILIES
from helpers.one_engine import outputs_of_engine
from tidewright.distributed.rank_messages import AddAdapter, DropAdapter, Input
from tidewright.distributed.ranks import Ranks
from tidewright.engine.engine import Engine
from tidewright.engine.messages import Abort, EngineConfig, SequenceOutput, Submit
from tidewright.engine.pace import StepPace
from tidewright.engine.plan import StepPlan
from tidewright.schema import NO_ADAPTER, SamplingParams

NAMES = ("one", "two", "three", "")
SHARED = prompt(21, seed=1)
BYTES_PER_TOKEN = 2 * 3 * 2 * 8 * 4  # k and v, layers, KV heads, head size, float32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def oracles(folder: Path) -> dict[str, Any]:
    """PEFT's model for each adapter; and the base."""
    base = save(folder / "model", FAMILIES["llama, tied"])
    made = {name: save_adapter(base, folder / name, seed=number) for number, name in enumerate(NAMES) if name}
    return {**made, "": base}


def engine_of(folder: Path, adapters: tuple[str, ...] = NAMES[:3], **changes: Any) -> Engine:
    values = {"dtype": "float32", "block_size": 4, "kv_cache_memory": "1MiB", "adapter_folder": str(folder)}
    engine = Engine(EngineConfig(model_dir=str(folder / "model"), **(values | changes)))
    for name in adapters:
        engine.add_adapter(name, engine.runner.read_adapter(name))
    return engine


def requests(**params: Any) -> list[Submit]:
    """Equal prompts with different adapters, and prompts of one token to several chunks."""
    values = {"max_tokens": 12, "ignore_eos": True, "temperature": 0, "seed": 0} | params
    made = []
    for number in range(12):
        ids = SHARED if number < 8 else prompt([1, 30, 5, 9][number - 8], seed=number)
        made.append(Submit(number, ids, SamplingParams(**values), adapter=NAMES[number % 4]))
    return made


def tokens(outputs: dict[int, list[SequenceOutput]]) -> dict[int, list[int]]:
    return {number: [token for output in own for token in output.token_ids] for number, own in outputs.items()}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"max_batched_tokens": 9, "max_adapters": 1},
        {"max_adapters": 2, "max_running": 3, "speculative_tokens": 3},
        {
            "max_adapters": 2,
            "async_scheduling": "on",
            "kv_cache_memory": str(100 * BYTES_PER_TOKEN),
            "max_model_len": 64,
        },
    ],
    ids=["plain", "chunks, one slot", "two slots, guesses", "two slots, async, preemption"],
)
def test_each_request_gets_its_adapter_s_tokens(folder: Path, oracles: dict[str, Any], changes: dict[str, Any]) -> None:
    engine, wanted = engine_of(folder, **changes), requests()
    found = tokens(outputs_of_engine(engine, wanted))
    for request in wanted:
        assert found[request.request_id] == expected(oracles[request.adapter], request.prompt_token_ids, 12)
    if "kv_cache_memory" in changes:
        assert engine.stats().preemptions > 0


@pytest.mark.usefixtures("oracles")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_in_one_batch_as_alone_to_the_bit(folder: Path, dtype: str) -> None:
    engine = engine_of(folder, dtype=dtype, prefix_caching=False)
    wanted = requests(logprobs=3, prompt_logprobs=1)
    together = outputs_of_engine(engine, wanted)
    for request in wanted:
        alone = outputs_of_engine(engine, [request])[request.request_id]
        assert [msgspec.structs.replace(output, times=None, queued_seconds=0) for output in alone] == [
            msgspec.structs.replace(output, times=None, queued_seconds=0) for output in together[request.request_id]
        ]


@pytest.mark.usefixtures("oracles")
def test_adapters_share_no_prefix_and_one_that_changed_finds_none_of_its_own(folder: Path) -> None:
    engine = engine_of(folder, ())
    shutil.copytree(folder / "one", folder / "copy")

    def cached(number: int, adapter: str) -> int:
        params = SamplingParams(max_tokens=1, temperature=0, seed=0)
        (output,) = outputs_of_engine(engine, [Submit(number, SHARED, params, adapter=adapter)])[number]
        return output.cached_tokens

    engine.add_adapter("a", engine.runner.read_adapter("one"))
    assert [cached(1, "a"), cached(2, "a"), cached(3, ""), cached(4, "")] == [0, 20, 0, 20]
    engine.drop_adapter("a")
    engine.add_adapter("a", engine.runner.read_adapter("two"))
    assert cached(5, "a") == 0
    # The same content under another name is the same.
    engine.add_adapter("b", engine.runner.read_adapter("copy"))
    assert cached(6, "b") == 20


@pytest.mark.usefixtures("oracles")
def test_loads_and_unloads_beside_sixteen_streams_change_nothing(folder: Path) -> None:
    engine = engine_of(folder, ("one",), max_adapters=2, dtype="bfloat16")
    params = SamplingParams(max_tokens=60, ignore_eos=True, seed=0)
    wanted = [Submit(number, prompt(7, number), params, adapter=("one", "")[number % 2]) for number in range(16)]
    undisturbed = tokens(outputs_of_engine(engine, wanted))
    for request in wanted:
        assert engine.submit(request) is None
    found: dict[int, list[int]] = {number: [] for number in range(16)}
    short = SamplingParams(max_tokens=2, ignore_eos=True, temperature=0, seed=0)
    for number in range(100, 120):
        name = NAMES[1 + number % 2]
        engine.add_adapter(name, engine.runner.read_adapter(name))
        assert engine.submit(Submit(number, SHARED, short, adapter=name)) is None
        while engine.scheduler.adapters.requests(name):
            for output in engine.step():
                found.setdefault(output.request_id, []).extend(output.token_ids)
        engine.drop_adapter(name)
    while engine.has_work:
        for output in engine.step():
            found[output.request_id] += output.token_ids
    assert {number: found[number] for number in range(16)} == undisturbed
    assert found[100] == found[102] != found[101] == found[103]
    engine.scheduler.check_integrity()


class ToldRanks:
    def __init__(self) -> None:
        self.told: list[Input] = []

    def tell(self, inputs: list[Input]) -> None:
        self.told += inputs

    def send(self, plan: StepPlan, inputs: list[Input], pace: StepPace) -> None:
        self.told += inputs


@pytest.mark.usefixtures("oracles")
def test_what_an_idle_engine_is_told_reaches_the_other_ranks_at_once(folder: Path) -> None:
    engine, ranks = engine_of(folder, ()), ToldRanks()
    engine._ranks = cast(Ranks, ranks)
    adapter = engine.runner.read_adapter("one")
    for number in range(3):
        engine.add_adapter("one", adapter, number)
        assert ranks.told.pop() == AddAdapter("one", number, adapter.digest)
        engine.drop_adapter("one")
        assert ranks.told.pop() == DropAdapter("one")
    # With work, all goes with the step, in order.
    engine.add_adapter("one", adapter, 3)
    ranks.told.clear()
    request = Submit(1, SHARED, SamplingParams(max_tokens=9, temperature=0, seed=0), adapter="one")
    assert engine.submit(request) is None
    engine.add_adapter("two", adapter, 4)
    assert not ranks.told
    engine.step()
    assert ranks.told[:2] == [request, AddAdapter("two", 4, adapter.digest)]
    # Its abort leaves no work, so that it is told with all that waits.
    engine.abort(1)
    while engine.has_work:
        engine.step()
    assert Abort(1) in ranks.told
    assert not engine._inputs


def test_without_an_adapter_folder_or_an_adapter_requests_are_refused(folder: Path, oracles: dict[str, Any]) -> None:
    params = SamplingParams(max_tokens=1, seed=0)
    for engine in (engine_of(folder, ()), engine_of(folder, (), adapter_folder="")):
        refusal = engine.submit(Submit(1, [5], params, adapter="one"))
        assert refusal
        assert (refusal.finish_reason, refusal.message) == ("invalid", f"{NO_ADAPTER}'one' is loaded")


@pytest.mark.usefixtures("oracles")
def test_a_step_that_ran_out_of_memory_fills_its_slots_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, wanted = engine_of(folder), requests()
    undisturbed = tokens(outputs_of_engine(engine, wanted))
    engine = engine_of(folder)
    launch, launched = engine.runner.launch, []

    def fail_once(plan: Any) -> Any:
        launched.append(plan)
        if len(launched) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return launch(plan)

    monkeypatch.setattr(engine.runner, "launch", fail_once)
    assert tokens(outputs_of_engine(engine, wanted)) == undisturbed
    assert launched[0].adapters
