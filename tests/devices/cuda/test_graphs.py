"""devices/cuda/graphs.py: decodes that are padded to a size and replayed are the decodes that run eagerly."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from ctypes import c_int64
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from helpers.adapters import save_adapter
from helpers.checkpoints import SIZES, engine_config, expected, prompt, save
from helpers.interpreted import interpreted
from helpers.recorded import RecorderOnCpu, recording
from tidewright.devices.base import Device
from tidewright.devices.cpu.memory import CpuMemory
from tidewright.distributed.group import ALONE
from tidewright.engine import model_runner
from tidewright.engine.engine import Engine
from tidewright.engine.messages import Submit
from tidewright.engine.plan import ScheduledSequence, StepPlan
from tidewright.schema import SamplingParams
from tidewright.step.batch import StepBatch
from tidewright.step.buffers import StepBuffers, StepLimits

with interpreted():
    from tidewright.devices.cuda import activations, lora, norms, paged_attention, rope_and_cache, sampling
    from tidewright.devices.cuda.device import CudaDevice
    from tidewright.devices.cuda.graphs import CudaRecorder, sizes_of

CPU = torch.device("cpu")


@pytest.mark.parametrize("most", [1, 3, 7, 64, 100, 256])
def test_sizes_reach_up_to_the_most_and_waste_little(most: int) -> None:
    sizes = sizes_of(most)
    assert sizes == tuple(sorted({*sizes}))
    assert (sizes[0], sizes[-1]) == (1, most)
    assert all(after <= 2 * before for before, after in pairwise(sizes))
    assert all(after - before <= 32 for before, after in pairwise(sizes))


def test_an_engine_that_replays_says_what_transformers_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With prompts read while others are answered, and steps planned ahead: inputs that only the device has.

    And a cache that is resized meanwhile, for which graphs are recorded anew.
    """
    model = save(tmp_path, transformers.LlamaConfig(**SIZES | {"num_hidden_layers": 1}))
    recorder = recording(monkeypatch, [activations, norms, paged_attention, rope_and_cache, sampling])
    memory = CpuMemory()
    monkeypatch.setattr(memory, "reserves", False)  # as a GPU's
    device = CudaDevice(CPU, memory, recorder)
    monkeypatch.setattr(model_runner, "make_device", lambda *_, **__: device)
    config = engine_config(tmp_path, block_size=16, max_running=4, async_scheduling="on", kv_cache_memory="1MiB")
    engine = Engine(config)
    assert recorder.replays == [0, 0, 0]
    prompts = [prompt(length, seed=length) for length in (5, 20, 7)]
    tokens: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for number, ids in enumerate(prompts):
        count = (2, 3, 4)[number]
        engine.submit(Submit(number, ids, SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, seed=0)))
    old: list[int] = []
    while engine.has_work:
        for output in engine.step():
            tokens[output.request_id] += output.token_ids
        if not old:
            old = recorder.replays[:]
            engine.resize(16)  # layers are elsewhere then
            assert recorder.replays[3:] == [0, 0, 0]
    assert list(tokens.values()) == [expected(model, prompts[i], len(tokens[i])) for i in range(3)]
    assert [len(got) for got in tokens.values()] == [2, 3, 4]
    assert recorder.replays[:3] == old
    assert any(recorder.replays[3:])
    assert all(map(sum, zip(old, recorder.replays[3:], strict=True)))


def test_steps_with_adapters_are_replayed_as_those_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save(tmp_path / "model", transformers.LlamaConfig(**SIZES | {"num_hidden_layers": 1}))
    says: dict[str, transformers.PreTrainedModel] = {"": model}
    for seed, name in enumerate("ab"):
        says[name] = save_adapter(model, tmp_path / "adapters" / name, seed, scale=0.3)
    recorder = recording(monkeypatch, [activations, lora, norms, paged_attention, rope_and_cache, sampling])
    device = CudaDevice(CPU, CpuMemory(), recorder)
    monkeypatch.setattr(model_runner, "make_device", lambda *_, **__: device)
    adapters = {"adapter_folder": str(tmp_path / "adapters"), "max_adapters": 2, "max_lora_rank": 4}
    engine = Engine(engine_config(tmp_path / "model", block_size=16, max_running=2, **adapters))
    assert recorder.replays == [0] * 4  # two sequences with adapters, two without, one with, one without
    for name in "ab":
        engine.add_adapter(name, engine.runner.read_adapter(name))
    ids, tokens = prompt(6, seed=1), {number: [] for number in range(4)}
    for number, (name, count) in enumerate((("a", 2), ("", 3), ("b", 3), ("", 2))):
        params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, seed=0)
        engine.submit(Submit(number, ids, params, adapter=name))
        while engine.has_work and number > 1:  # the first three come at once, the last one alone
            for output in engine.step():
                tokens[output.request_id] += output.token_ids
    assert [*tokens.values()] == [
        expected(says[name], ids, count) for name, count in (("a", 2), ("", 3), ("b", 3), ("", 2))
    ]
    assert recorder.replays == [1, 0, 2, 1]


def test_without_memory_for_graphs_decodes_run_eagerly(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Full(RecorderOnCpu):
        def record(self, compute: Callable[[], None]) -> Callable[[], None]:
            raise torch.OutOfMemoryError("tried to allocate 5 GiB")

    limits = StepLimits(max_running=4, max_batched_tokens=8, max_model_len=16, block_size=4)
    device, buffers = CudaDevice(CPU, CpuMemory(), Full()), StepBuffers(limits, CPU, sizes=(1, 2))
    monkeypatch.setattr(Device, "forward", lambda self, model, batch, kv_cache: batch.positions_T)
    model: Any = SimpleNamespace(group=ALONE)
    device.prepare(model, model, buffers)
    assert "no CUDA graphs for decodes of 1, 2 sequences, which are slower: tried to allocate 5 GiB" in caplog.text
    batch = buffers.fill(StepPlan((ScheduledSequence(1, 9, (5,), (0, 1, 2)),)))
    assert batch.padded_to == 1
    assert device.forward(model, batch, model).tolist() == [9]


def test_only_sizes_without_memory_for_their_graph_run_eagerly(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Short(RecorderOnCpu):
        tries = 0

        def record(self, compute: Callable[[], None]) -> Callable[[], None]:
            self.tries += 1
            if self.tries == 2:
                raise torch.OutOfMemoryError("tried to allocate 5 GiB")
            return super().record(compute)

    limits = StepLimits(max_running=4, max_batched_tokens=8, max_model_len=16, block_size=4)
    recorder = Short()
    device, buffers = CudaDevice(CPU, CpuMemory(), recorder), StepBuffers(limits, CPU, sizes=(1, 2, 4))
    monkeypatch.setattr(Device, "forward", lambda self, model, batch, kv_cache: batch.positions_T + 0)
    model: Any = SimpleNamespace(group=ALONE, layers=(), layers_computed=c_int64())
    device.prepare(model, model, buffers)
    assert "no CUDA graphs for decodes of 2 sequences, which are slower: tried" in caplog.text
    for count, replays in ((4, [1, 0]), (2, [1, 0]), (1, [1, 1])):
        planned = [
            ScheduledSequence(count * 10 + row, 9 + row, (5,), (3 * row, 3 * row + 1, 3 * row + 2))
            for row in range(count)
        ]
        batch = buffers.fill(StepPlan(tuple(planned), tuple(range(100))))
        assert batch.padded_to == count
        with torch.inference_mode():
            assert device.forward(model, batch, model).tolist() == [*range(9, 9 + count)]
        assert recorder.replays == replays


class Cuda:
    """Of torch what graphs need, with its rules: aten/src/ATen/cuda/CUDAGraph.cpp, torch/cuda/graphs.py."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.current, self.underway, self.uses = "main", list[object](), Counter[object]()
        self.gives_up = False  # CUDA gives a recording up that had an error, so that its end has one, too
        of_cuda: dict[str, Any] = {
            "device": lambda _: contextlib.nullcontext(),
            "current_device": lambda: 0,
            "stream": self.stream,
            "Stream": lambda: SimpleNamespace(wait_stream=lambda other: None),
            "current_stream": lambda: SimpleNamespace(name=self.current, wait_stream=lambda other: None),
            "graph_pool_handle": object,
            "CUDAGraph": lambda: Graph(self),
            "graph": self.graph,
        }
        for name, value in of_cuda.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", self.end_allocate, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_releasePool", self.release, raising=False)

    @contextlib.contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        before, self.current = self.current, getattr(stream, "name", "side")
        try:
            yield
        finally:
            self.current = before

    @contextlib.contextmanager
    def graph(self, graph: Graph, pool: object, capture_error_mode: str) -> Iterator[None]:
        before, self.current = self.current, "capture"
        assert pool not in self.uses or self.uses[pool], "INTERNAL ASSERT FAILED: use_count > 0"
        self.uses[pool] += 1
        self.underway.append(pool)
        graph.memory = pool
        try:
            yield
        except RuntimeError:
            if self.gives_up:
                raise RuntimeError("CUDA error: operation failed due to a previous error during capture") from None
            self._end(graph, before)
            raise
        self._end(graph, before)

    def _end(self, graph: Graph, stream: str) -> None:
        self.end_allocate(0, graph.memory)
        graph.ended, self.current = True, stream

    def end_allocate(self, device: int, pool: object) -> None:
        if pool not in self.underway:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.underway.remove(pool)

    def release(self, device: int, pool: object) -> None:
        self.uses[pool] -= 1
        assert self.uses[pool] >= 0


class Graph:
    def __init__(self, cuda: Cuda) -> None:
        self._cuda, self.ended, self.memory = cuda, False, object()

    def replay(self) -> None:
        pass

    def reset(self) -> None:
        if self.ended:
            self._cuda.release(0, self.memory)
        self.ended = False

    def __del__(self) -> None:
        self.reset()


def test_graphs_share_memory_with_those_beside_them_but_not_with_those_that_are_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As when they are recorded anew for a cache of another size."""
    cuda = Cuda(monkeypatch)
    limits = StepLimits(max_running=4, max_batched_tokens=8, max_model_len=16, block_size=4)
    device, buffers = CudaDevice(CPU, CpuMemory(), CudaRecorder(CPU)), StepBuffers(limits, CPU, sizes=(1, 2, 4))
    monkeypatch.setattr(Device, "forward", lambda self, model, batch, kv_cache: batch.positions_T)
    model: Any = SimpleNamespace(group=ALONE)
    for number in range(1, 3):
        device.prepare(model, model, buffers)
        assert sorted(cuda.uses.values()) == [0] * (number - 1) + [3]
    assert (cuda.underway, cuda.current) == ([], "main")


@pytest.mark.parametrize("gives_up", [False, True])
@pytest.mark.parametrize("failing", [4, 2])
def test_a_recording_that_ran_out_of_memory_is_ended(
    gives_up: bool, failing: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Or torch's allocator would give no memory back any more, and what follows would run on the recording's stream."""
    cuda = Cuda(monkeypatch)
    cuda.gives_up = gives_up

    def forward(self: Device, model: Any, batch: StepBatch, kv_cache: Any) -> torch.Tensor:
        if cuda.underway and len(batch.positions_T) == failing:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return batch.positions_T

    limits = StepLimits(max_running=4, max_batched_tokens=8, max_model_len=16, block_size=4)
    device, buffers = CudaDevice(CPU, CpuMemory(), CudaRecorder(CPU)), StepBuffers(limits, CPU, sizes=(1, 2, 4))
    monkeypatch.setattr(Device, "forward", forward)
    model: Any = SimpleNamespace(group=ALONE)
    for _ in range(2):
        caplog.clear()
        device.prepare(model, model, buffers)
        assert f"no CUDA graphs for decodes of {failing} sequences, which are slower: CUDA out of memory" in caplog.text
        assert (cuda.underway, cuda.current) == ([], "main")
        assert sum(cuda.uses.values()) == max(cuda.uses.values()) == 2  # of the others, which share theirs
