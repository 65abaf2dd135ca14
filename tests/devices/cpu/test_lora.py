"""devices/cpu/lora.py against numpy in float64, whatever the ranks, sizes and rows; and each row is its own."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from helpers.adapter_rows import adapter_rows
from helpers.low_rank import DEPTH, FEATURES, MOST_RANK, SLOTS, TOLERANCE, expected, fill, updates
from tidewright.devices.cpu.lora import CpuLora
from tidewright.lora.layer import LoraLayer


def layer(kind: str, dtype: torch.dtype) -> LoraLayer:
    if kind == "plain":
        return LoraLayer(FEATURES, SLOTS)
    return CpuLora(FEATURES, DEPTH, SLOTS, MOST_RANK, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", ["kernel", "plain"])
@pytest.mark.parametrize("slots", [[1], [-1, 0, 2, 0, -1, 1, 2], [2] * 37 + [-1] + [0] * 18], ids=len)
def test_each_row_gets_what_its_adapter_adds(kind: str, dtype: torch.dtype, slots: list[int]) -> None:
    made, lora = updates(dtype), layer(kind, dtype)
    fill(lora, made)
    x, y = torch.randn(len(slots), DEPTH).to(dtype), torch.randn(len(slots), sum(FEATURES)).to(dtype)
    wanted, before = expected(x, y, slots, made), y.clone()
    lora.add(x, y, adapter_rows(slots))
    np.testing.assert_allclose(y.double().numpy(), wanted, rtol=TOLERANCE[dtype], atol=10 * TOLERANCE[dtype])
    base = [row for row, slot in enumerate(slots) if slot < 0]
    assert torch.equal(y[base], before[base])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_row_does_not_depend_on_the_others(dtype: torch.dtype) -> None:
    made, lora = updates(dtype), layer("kernel", dtype)
    fill(lora, made)
    slots = [row % 4 - 1 for row in range(43)]
    x, y = torch.randn(43, DEPTH).to(dtype), torch.randn(43, sum(FEATURES)).to(dtype)
    alone = y.clone()
    lora.add(x, y, adapter_rows(slots))
    for row, slot in enumerate(slots):
        if slot >= 0:
            lora.add(x[row : row + 1], alone[row : row + 1], adapter_rows([slot]))
    assert torch.equal(y, alone)


def test_a_cleared_slot_adds_nothing() -> None:
    lora = layer("kernel", torch.float32)
    lora.put(1, [part and lora.arranged(part) for part in updates(torch.float32)[0]])
    lora.clear(1)
    y = torch.ones(1, sum(FEATURES))
    lora.add(torch.ones(1, DEPTH), y, adapter_rows([1]))
    assert bool((y == 1).all())
