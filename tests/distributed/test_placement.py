"""distributed/placement.py: what each rank of a host gets."""

from __future__ import annotations

import pytest

from tidewright.distributed.placement import place
from tidewright.engine.messages import EngineConfig


def test_one_rank_is_left_alone() -> None:
    config = EngineConfig(model_dir="m", device="auto", kv_cache_memory="50%")
    assert place(config, 0) is config


@pytest.mark.parametrize(("device", "taken"), [("cuda", "cuda:1"), ("cuda:4", "cuda:5")])
def test_ranks_take_gpus_in_order(device: str, taken: str) -> None:
    config = EngineConfig(model_dir="m", device=device, tensor_parallel_size=2, kv_cache_memory="50%")
    placed = place(config, 1)
    assert (placed.device, placed.kv_cache_memory, placed.threads) == (taken, "50%", 0)


def test_ranks_on_a_cpu_divide_its_memory() -> None:
    config = EngineConfig(model_dir="m", device="cpu", tensor_parallel_size=6, nodes=2, kv_cache_memory="60%")
    placed = place(config, 1)
    assert (placed.device, placed.kv_cache_memory) == ("cpu", "20%")


def test_threads_and_amounts_that_were_asked_for_stay() -> None:
    config = EngineConfig(model_dir="m", device="cpu", tensor_parallel_size=2, threads=5, kv_cache_memory="1GiB")
    assert (place(config, 1).threads, place(config, 1).kv_cache_memory) == (5, "1GiB")
