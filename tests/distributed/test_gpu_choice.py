"""distributed/gpu_choice.py: `device` as the GPUs of a host's ranks."""

from __future__ import annotations

import re

import pytest

from tidewright.distributed.gpu_choice import DEVICE_PATTERN, GpuChoiceError, gpus_of


@pytest.mark.parametrize(
    ("device", "ranks", "gpus"),
    [
        ("cuda", 1, (0,)),
        ("cuda", 3, (0, 1, 2)),
        ("cuda:4", 1, (4,)),
        ("cuda:4", 2, (4, 5)),
        ("cuda:6,4", 2, (6, 4)),
    ],
)
def test_each_rank_has_its_gpu(device: str, ranks: int, gpus: tuple[int, ...]) -> None:
    assert re.fullmatch(DEVICE_PATTERN, device)
    assert gpus_of(device, ranks) == gpus


@pytest.mark.parametrize(("device", "ranks", "how_many"), [("cuda:1,2", 1, 2), ("cuda:1,2", 3, 2), ("cuda:1,1", 2, 1)])
def test_another_number_of_gpus_than_of_ranks_is_refused(device: str, ranks: int, how_many: int) -> None:
    with pytest.raises(GpuChoiceError, match=f"'{device}' names {how_many} different GPUs, but each host has {ranks} "):
        gpus_of(device, ranks)


@pytest.mark.parametrize("device", ["cuda:", "cuda:1,", "cuda:,1", "cuda:-1", "cuda:1000", "cpu:0", "gpu"])
def test_what_is_no_device(device: str) -> None:
    assert not re.fullmatch(DEVICE_PATTERN, device)
