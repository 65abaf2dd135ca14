"""step/transfers.py: whatever crosses to the host together arrives as it left, and in order."""

from __future__ import annotations

import pytest
import torch

from tidewright.step.transfers import Download, Pending


@pytest.mark.parametrize("staged", [False, True])
def test_parts_of_any_type_and_shape_arrive(staged: bool) -> None:
    """Narrow ones before wide ones, odd lengths, none at all."""
    parts = [
        torch.tensor([1, 2, 3], dtype=torch.int8),
        torch.tensor([[0.5, -2.0, 7.0]]).T,
        torch.tensor([2**40, -1]),
        torch.zeros((2, 0), dtype=torch.int64),
        torch.tensor([1.5], dtype=torch.bfloat16),
        torch.tensor(2.5),
    ]
    pending = [Pending(parts[:3], list), Pending((), lambda got: ("nothing", got)), Pending(parts[3:], list)]
    first, nothing, second = Download(pending, staged).wait()
    assert nothing == ("nothing", [])
    for got, sent in zip(first + second, parts, strict=True):
        assert (got.dtype, got.shape) == (sent.dtype, sent.shape)
        assert torch.equal(got, sent)
    assert Download([Pending((), len)], staged).wait() == [0]
