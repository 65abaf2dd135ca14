"""distributed/placement.py: what each rank of a host gets. Where a GPU is needed, torch is told that it sees some."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
import torch.distributed as dist

from tidewright.devices.base import DeviceError
from tidewright.distributed import follower, process_group, rank
from tidewright.distributed.placement import place, resolve
from tidewright.distributed.process_group import join_group
from tidewright.distributed.rank_messages import Join
from tidewright.engine import process
from tidewright.engine.messages import EngineConfig
from tidewright.engine.process import EngineProcess
from tidewright.kv_cache.budget import parse_memory


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Four GPUs, and which one is made the current one."""
    made: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: made.append(f"current {device}"))
    return made


@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_one_rank_on_a_cpu_is_left_alone(device: str) -> None:
    config = EngineConfig(model_dir="m", device=device, kv_cache_memory="33.3333333%")
    assert place(config, 0) == msgspec.structs.replace(config, device="cpu")


@pytest.mark.parametrize(("device", "taken"), [("auto", "cuda:1"), ("cuda:2", "cuda:3"), ("cuda:3,0", "cuda:0")])
def test_ranks_take_the_gpus_that_are_named_or_the_next_ones(calls: list[str], device: str, taken: str) -> None:
    config = EngineConfig(model_dir="m", device=device, tensor_parallel_size=2, kv_cache_memory="50%")
    placed = place(config, 1)
    assert (placed.device, placed.kv_cache_memory, placed.threads) == (taken, "50%", 0)


@pytest.mark.parametrize("local_rank", [0, 2])
@pytest.mark.parametrize(
    ("visible", "why"), [(None, ""), ("7,5,3,1", ", as CUDA_VISIBLE_DEVICES is '7,5,3,1'")], ids=["all", "some"]
)
def test_too_few_gpus_for_a_hosts_ranks_are_told_with_the_numbers_by_every_rank(
    calls: list[str], monkeypatch: pytest.MonkeyPatch, local_rank: int, visible: str | None, why: str
) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(DeviceError) as refused:
        place(EngineConfig(model_dir="m", device="cuda:2", tensor_parallel_size=6, nodes=2), local_rank)
    assert str(refused.value) == f"the 3 ranks of this host need GPUs 2, 3, 4, but torch sees 4 GPUs{why}"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(DeviceError) as refused:
        place(EngineConfig(model_dir="m", device="cuda:1"), 0)
    assert str(refused.value) == (
        "device 'cuda:1' needs GPU 1, but torch sees 0 GPUs: this torch is built without CUDA"
    )


def test_ranks_on_a_cpu_divide_its_memory() -> None:
    config = EngineConfig(model_dir="m", device="cpu", tensor_parallel_size=6, nodes=2, kv_cache_memory="60%")
    placed = place(config, 1)
    assert (placed.device, placed.kv_cache_memory) == ("cpu", "20%")


@pytest.mark.parametrize(
    ("device", "memory", "expected"),
    [
        ("cpu", "auto", "268435456B"),
        ("cuda:0", "auto", "22.5%"),
        ("cpu", "80%", "20%"),
        ("cpu", "2GiB", "536870912B"),
    ],
)
@pytest.mark.usefixtures("calls")
def test_a_model_gets_its_part_of_the_memory(device: str, memory: str, expected: str) -> None:
    placed = place(EngineConfig(model_dir="m", device=device, kv_cache_memory=memory, kv_cache_share=0.25), 0)
    assert placed.kv_cache_memory == expected
    assert parse_memory(expected, 2**30) > 0


def test_threads_and_amounts_that_were_asked_for_stay() -> None:
    config = EngineConfig(model_dir="m", device="cpu", tensor_parallel_size=2, threads=5, kv_cache_memory="1GiB")
    assert (place(config, 1).threads, place(config, 1).kv_cache_memory) == (5, "1GiB")


def test_the_fallback_stays_on_the_cpu_where_there_is_a_gpu_and_onnxruntime_alone_knows_of_gpus(
    calls: list[str],
) -> None:
    for device in ("cpu", "cuda", "auto"):
        config = EngineConfig(model_dir="m", device=device, is_onnx=True)
        assert process.take_place(resolve(config), 0) == config
    assert calls == []


def test_rank_0_takes_its_gpu_before_anything_else_and_tells_the_others_the_kind(
    calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def note(what: str) -> Any:
        return lambda *values, **_: calls.append(" ".join([what, *(str(v) for v in values if isinstance(v, str))]))

    def gather(config: EngineConfig, *_: object) -> None:
        calls.append(f"gather {config.device}, {config.num_blocks} to {config.most_blocks} blocks")

    def engine(config: EngineConfig, *_: object) -> None:
        calls.append(f"load on {config.device}")

    ranks = SimpleNamespace(host="127.0.0.1", shared_file=None, gather=gather)
    group = SimpleNamespace(wait_for_all=lambda: None)
    monkeypatch.setattr(process, "make_store", lambda *_: SimpleNamespace(port=1))
    monkeypatch.setattr(process, "join_group", lambda *values: (note("join on")(values[3]), group)[1])
    monkeypatch.setattr(process, "Engine", engine)
    kept = {"num_blocks": 5, "most_blocks": 9}  # of an engine before
    config = EngineConfig(model_dir="m", device="auto", tensor_parallel_size=2, **kept)
    EngineProcess(SimpleNamespace())._make_engine(config, ranks)  # type: ignore[arg-type]
    assert calls == ["current cuda:0", "gather cuda, 5 to 9 blocks", "join on cuda:0", "load on cuda:0"]


def test_another_rank_takes_its_gpu_before_anything_else(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def load(config: EngineConfig, *_: object) -> None:
        calls.append(f"load on {config.device}")
        raise EOFError

    monkeypatch.setattr(rank, "end_when_silent", lambda *_: None)
    monkeypatch.setattr(process_group, "join_store", lambda *_: calls.append("join the store"))
    monkeypatch.setattr(process_group, "join_group", lambda *values: calls.append(f"join on {values[3]}"))
    monkeypatch.setattr(follower, "Follower", load)
    config = EngineConfig(model_dir="m", device="cuda:3,2", tensor_parallel_size=4, nodes=2)
    one = rank.Rank(SimpleNamespace(), "127.0.0.1", "127.0.0.1", None)  # type: ignore[arg-type]
    with pytest.raises(EOFError):
        one._follow(Join(config, 1), 3, 1, Path("m"))
    assert calls == ["current cuda:2", "join the store", "join on cuda:2", "load on cuda:2"]


@pytest.mark.parametrize(("device", "backend"), [("cuda:2", "nccl"), ("cpu", "gloo")])
def test_gpus_meet_by_nccl_on_their_own_gpu_and_cpus_by_gloo(
    monkeypatch: pytest.MonkeyPatch, device: str, backend: str
) -> None:
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(variable, "lo")
    asked: dict[str, Any] = {}
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **more: asked.update(more, backend=backend))
    join_group(dist.HashStore(), 0, 1, device, "127.0.0.1", 5.0, None)
    assert asked["backend"] == backend
    assert asked["device_id"] == (torch.device(device) if backend == "nccl" else None)


def test_of_a_budget_a_model_gets_its_share_and_an_automatic_cache_stays_what_is_left() -> None:
    config = EngineConfig(model_dir="", device="cpu", kv_cache_share=0.25, memory_budget="8GiB")
    assert place(config, 0) == msgspec.structs.replace(
        config, kv_cache_share=1.0, memory_share=0.25, memory_budget=f"{2 << 30}B"
    )
    config = msgspec.structs.replace(config, kv_cache_memory="1GiB", memory_budget="80%")
    placed = place(config, 0)
    assert (placed.kv_cache_memory, placed.memory_budget) == (f"{256 << 20}B", "20%")
