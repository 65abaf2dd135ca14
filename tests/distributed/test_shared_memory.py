"""distributed/shared_memory.py: random collectives of several ranks, here threads, against plain sums and joins."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tidewright.distributed.shared_memory import SLOT_BYTES, CollectiveError, SharedMemory


@pytest.fixture
def file() -> Iterator[int]:
    descriptor = os.memfd_create("test", 0)
    yield descriptor
    os.close(descriptor)


def attach(file: int, rank: int, size: int, timeout: float = 60.0) -> SharedMemory:
    shared = SharedMemory.attach(file, rank, size, timeout)
    assert shared, "the kernels can't be compiled here"
    return shared


def together(size: int, work: Callable[[int], object]) -> list[object]:
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(work, range(size)))


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_collectives_in_a_row(file: int, size: int, dtype: torch.dtype) -> None:
    """Also larger than a slot, and with ranks that come late: a slot must not be written before all have read it."""
    rng = random.Random(size)
    limit = SLOT_BYTES // dtype.itemsize
    widths = [rng.choice([1, 7, 64, 1000, limit - 1, limit, limit + 1, 3 * limit + 5]) for _ in range(60)]
    kinds = [rng.choice(["sum", "join", "join"]) for _ in widths]
    inputs = [
        [
            torch.randn(2, width, generator=torch.Generator().manual_seed(i * size + rank)).to(dtype)
            for rank in range(size)
        ]
        for i, width in enumerate(widths)
    ]

    def work(rank: int) -> list[torch.Tensor | None]:
        shared, results = attach(file, rank, size), []
        late = random.Random(rank)
        for kind, parts in zip(kinds, inputs, strict=True):
            if late.random() < 0.2:
                time.sleep(0.002)
            if kind == "join":
                results.append(shared.gather(parts[rank]))
            else:
                x = parts[rank].clone()
                shared.all_reduce(x)
                results.append(x)
        return results

    by_rank = together(size, work)
    for i, (kind, parts) in enumerate(zip(kinds, inputs, strict=True)):
        found = [results[i] for results in by_rank]  # type: ignore[index]
        if kind == "join":
            assert torch.equal(found[0], torch.cat(parts, dim=-1))
            assert found[1:] == [None] * (size - 1)
        else:
            expected = torch.stack(parts).double().sum(0)
            for one in found:
                assert torch.equal(one, found[0])
            torch.testing.assert_close(found[0].double(), expected, rtol=dtype_precision(dtype), atol=1e-5)


def dtype_precision(dtype: torch.dtype) -> float:
    """Half a unit in the last place, and a little for the sums in float32."""
    return torch.finfo(dtype).eps / 2 + 1e-5


def test_a_rank_that_does_not_come_is_an_error(file: int) -> None:
    shared = attach(file, 0, 2, timeout=0.1)
    with pytest.raises(CollectiveError, match=r"within 0\.1 s"):
        shared.all_reduce(torch.ones(3))


def test_only_what_the_kernels_know_is_taken(file: int) -> None:
    shared = attach(file, 0, 2)
    assert shared.takes(torch.ones(1))
    assert shared.takes(torch.ones(1).bfloat16())
    assert not shared.takes(torch.ones(1).half())
