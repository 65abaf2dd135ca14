"""devices/cpu/huge_pages.py: parameters move into one mapping that Linux is asked to back with huge pages."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from tidewright.devices.cpu.huge_pages import huge_empty, move_to_huge_pages


def flags_of(address: int) -> set[str]:
    """What the kernel says of the mapping that holds `address`."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= address < int(found[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return set(line.split()[1:])
    raise AssertionError("not mapped")


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="this kernel has no transparent huge pages"
)
def test_the_kernel_is_asked_for_huge_pages() -> None:
    memory = huge_empty(8 << 20)
    assert "hg" in flags_of(memory.data_ptr())
    assert not memory.any()


def test_parameters_lie_side_by_side_and_keep_their_types_and_ties() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Parameter(torch.empty(3, 5, dtype=torch.bfloat16), requires_grad=False)
            self.two = nn.Parameter(torch.empty(7), requires_grad=False)
            self.tied = self.one

    model = Model()
    move_to_huge_pages(model)
    assert model.tied is model.one
    assert (model.one.shape, model.one.dtype) == ((3, 5), torch.bfloat16)
    assert (model.two.shape, model.two.dtype) == ((7,), torch.float32)
    assert model.two.data_ptr() - model.one.data_ptr() == 64  # 30 bytes, and the next line of the cache
    model.one.fill_(1)
    assert not model.two.any()


def test_a_module_without_parameters_stays_as_it_is() -> None:
    move_to_huge_pages(nn.Identity())
