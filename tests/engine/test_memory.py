"""Bounded memory: the largest step is measured, sizes that do not fit are refused, a step that does not is redone."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from helpers.checkpoints import SIZES, VOCAB, engine_config, prompt, save
from helpers.counted_memory import CountedMemory
from helpers.one_engine import tokens_of_engine
from tidewright.attention.reference import ReferenceAttention
from tidewright.devices.base import Device, DeviceError
from tidewright.distributed.rank_messages import Input, Resize
from tidewright.engine import model_runner
from tidewright.engine.engine import Engine
from tidewright.engine.largest_step import largest_step
from tidewright.engine.memory_manager import GrowthError
from tidewright.engine.messages import EngineConfig, Submit
from tidewright.engine.model_runner import ModelRunner
from tidewright.engine.plan import StepPlan
from tidewright.engine.runner import EngineConfigError, LaunchedStep
from tidewright.engine.step_budget import StepMemoryError
from tidewright.kv_cache.storage import KVCacheMemoryError
from tidewright.schema import SamplingParams
from tidewright.step.buffers import StepLimits

CPU = torch.device("cpu")
BLOCK_BYTES = 2 * 3 * 2 * 8 * 4 * 4  # keys and values, layers, KV heads, head size, tokens, float32
MIB = 1 << 20


def test_the_largest_step_has_guesses_as_real_steps_have_them() -> None:
    for planned in largest_step(StepLimits(64, 2048, 4096, 16), 3, embeds=False).sequences:
        assert [len(draw.history.drafts) for draw in planned.draws] == [0, 1, 2, 3]
        assert all(draw.history.length + len(draw.history.drafts) == draw.position for draw in planned.draws)


def test_the_largest_step_has_adapters_in_all_rows() -> None:
    """What their ranks take beside the products counts."""
    plan = largest_step(StepLimits(6, 2048, 4096, 16, adapter_slots=4))
    assert {planned.adapter for planned in plan.sequences} == {0, 1, 2, 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    save(path, transformers.LlamaConfig(**SIZES))
    return path


def on(memory: CountedMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next runners get a device with that memory."""
    device = Device(CPU, ReferenceAttention(4, CPU), memory)
    monkeypatch.setattr(model_runner, "make_device", lambda *_, **__: device)


def config(folder: Path, **changes: Any) -> EngineConfig:
    return engine_config(folder, **{"kv_cache_memory": "auto", "max_running": 6, **changes})


def mixed(count: int = 9, **params: Any) -> list[Submit]:
    kinds: list[dict[str, Any]] = [{"temperature": 0}, {"top_p": 0.9, "logprobs": 1}, {"frequency_penalty": 0.5}]
    values = {"max_tokens": 20, "ignore_eos": True, "seed": 4, **params}
    return [Submit(n, prompt(60 - 5 * n, seed=n % 4), SamplingParams(**(values | kinds[n % 3]))) for n in range(count)]


def tokens(engine: Engine, requests: list[Submit]) -> dict[int, list[int]]:
    return tokens_of_engine(engine, requests, ends=("length",))


@pytest.mark.parametrize("changes", [{}, {"speculative_tokens": 2}], ids=str)
def test_the_kv_cache_gets_what_the_largest_step_leaves(
    folder: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    memory = CountedMemory(8 * MIB)
    on(memory, monkeypatch)
    engine = Engine(config(folder, **changes))
    (step_bytes,) = memory.peaks
    assert 64 * VOCAB * 4 < step_bytes < 4 * MIB
    assert engine.runner.num_blocks == (int(0.9 * 8 * MIB) - step_bytes) // BLOCK_BYTES
    # No step of real work takes more, beside the buffers that stay, which the measurement counts too.
    with memory.counting() as counter:
        tokens(engine, mixed())
    assert 0 < counter.peak <= step_bytes


def test_what_a_device_gave_the_cache_is_its_own_used_or_not(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its memory is taken when it is made: none of it is only promised, as on a CPU."""
    memory = CountedMemory(8 * MIB)
    on(memory, monkeypatch)
    engine = Engine(config(folder))
    before, memory.total = engine.num_blocks, 100_000  # that is left
    engine.memory.look(1e9)
    assert engine.num_blocks == before


def test_an_amount_has_to_fit_beside_the_largest_step(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = CountedMemory(2 * MIB)
    on(memory, monkeypatch)
    with pytest.raises(KVCacheMemoryError, match=r"wants 2\.0 MiB, but cpu has 2\.0 MiB free, of which a step"):
        ModelRunner(config(folder, kv_cache_memory="2MiB"))
    assert ModelRunner(config(folder, kv_cache_memory="1MiB")).num_blocks == MIB // BLOCK_BYTES
    memory.total = 400_000
    with pytest.raises(KVCacheMemoryError, match=r"KV cache of 0\.\d MiB holds \d+ tokens, .* of which a step takes"):
        ModelRunner(config(folder))


def test_a_device_that_is_too_small_says_the_sizes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_runner, "PATIENCE", 0.0)
    memory = CountedMemory(100_000)
    on(memory, monkeypatch)
    # Two embeddings and three layers of float32.
    layer = 48 * (6 + 2 * 2 + 6) * 8 + 3 * 48 * 80 + 2 * 48
    size = 4 * (2 * VOCAB * 48 + 3 * layer + 48) / MIB
    with pytest.raises(DeviceError, match=rf"the weights take {size:.1f} MiB, but cpu has 0\.1 MiB free: end what"):
        ModelRunner(config(folder))
    memory.total = 4 * MIB

    def measure_peak(run: Any) -> int:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(memory, "measure_peak", measure_peak)
    with pytest.raises(EngineConfigError, match=r"a step of 64 tokens in 6 sequences does not fit into the 4\.0 MiB"):
        ModelRunner(config(folder))


class Failing:
    """Lets large steps and those of some numbers run out of memory: in the forward, or as `results` are awaited."""

    def __init__(
        self,
        runner: ModelRunner,
        monkeypatch: pytest.MonkeyPatch,
        most: int,
        steps: tuple[int, ...] = (),
        results: tuple[int, ...] = (),
    ) -> None:
        self.most, self.steps, self.results, self.runs, self.failures = most, steps, results, 0, 0
        self._launch = runner.launch
        monkeypatch.setattr(runner, "launch", self.launch)
        monkeypatch.setattr(runner.device, "forward", self.forward)
        self._forward = type(runner.device).forward.__get__(runner.device)

    def launch(self, plan: StepPlan) -> LaunchedStep:
        self.runs += 1
        launched = self._launch(plan)
        return LaunchedStep(lambda: self.fail() if self.runs in self.results else launched.result())

    def forward(self, model: Any, batch: Any, kv_cache: Any) -> Any:
        hidden_TE = self._forward(model, batch, kv_cache)
        if len(batch.token_ids_T) > self.most or self.runs in self.steps:
            self.fail()  # the step's keys are written
        return hidden_TE

    def fail(self) -> Any:
        self.failures += 1
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")


@pytest.mark.parametrize(
    "changes", [{}, {"prefix_caching": False, "async_scheduling": "on"}, {"speculative_tokens": 2}], ids=str
)
def test_a_step_that_runs_out_of_memory_is_computed_in_smaller_ones(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, changes: dict[str, Any]
) -> None:
    config = engine_config(folder, max_running=6, **changes)
    wanted = tokens(Engine(config), mixed())
    engine = Engine(config)
    assert isinstance(engine.runner, ModelRunner)
    failing = Failing(engine.runner, monkeypatch, most=40, steps=(7, 8, 20), results=(25, 30))
    assert tokens(engine, mixed()) == wanted
    stats = engine.stats()
    assert stats.steps_out_of_memory == failing.failures >= 4
    assert 1 <= stats.step_tokens <= 40
    assert stats.blocks_free == stats.blocks_total
    (first, *_) = [record.getMessage() for record in caplog.records if "ran out of memory" in record.getMessage()]
    assert "a step of 64 tokens in " in first
    assert "Tried to allocate 20.00 MiB" in first
    assert "going on with steps of up to 32 tokens" in first


def test_a_step_of_one_token_that_does_not_fit_ends_the_engine(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(engine_config(folder))
    assert isinstance(engine.runner, ModelRunner)
    Failing(engine.runner, monkeypatch, most=0)
    with pytest.raises(StepMemoryError, match=r"a step of 1 tokens .* there is no smaller one: lower kv_cache_memory"):
        tokens(engine, mixed(1))
    assert engine.scheduler.step_tokens == 1


def test_ranks_begin_anew_with_smaller_steps(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the others wait for this one amid the step."""
    engine = Engine(engine_config(folder))
    assert isinstance(engine.runner, ModelRunner)
    Failing(engine.runner, monkeypatch, most=0, steps=set())
    monkeypatch.setattr(engine, "_ranks", SimpleNamespace(send=lambda *_: None))
    assert engine.submit(mixed(1)[0]) is None
    with pytest.raises(StepMemoryError) as error:
        engine.step()
    assert (engine.stats().steps_out_of_memory, error.value.step_tokens) == (0, 30)


def test_other_ranks_have_done_what_came_before_a_growth_when_they_get_its_memory(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else one that shrinks meanwhile would lose blocks that it is to move, and one that grows twice half of it."""
    engine = Engine(engine_config(folder))
    heard: list[Input | int] = []
    ranks = SimpleNamespace(
        send=lambda plan, inputs, pace: heard.extend(inputs),
        tell=heard.extend,
        reserve=lambda num_blocks: "rank 1 (no memory)" if heard.append(num_blocks) or num_blocks == 400 else "",
    )
    monkeypatch.setattr(engine, "_ranks", ranks)
    assert engine.submit(mixed(1)[0]) is None
    engine.step()
    heard.clear()
    for num_blocks in (100, 200, 300, 150):
        assert engine.resize(num_blocks)
    with pytest.raises(GrowthError, match="rank 1"):
        engine.resize(400)
    engine.step()
    wanted = [Resize(100), 200, Resize(200), 300, Resize(300), Resize(150), 400, 150]
    assert [entry for entry in heard if isinstance(entry, Resize | int)] == wanted


def test_errors_of_another_kind_are_no_lack_of_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(engine_config(folder))

    def launch(plan: StepPlan) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(engine.runner, "launch", launch)
    with pytest.raises(RuntimeError, match="illegal"):
        tokens(engine, mixed(1))
