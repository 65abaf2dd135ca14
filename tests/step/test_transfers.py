"""step/transfers.py: whatever crosses to the host together arrives as it left, and in order."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tidewright.step.transfers import Download, Pending, upload


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


@pytest.mark.parametrize("staged", [False, True])
def test_arrays_of_any_type_arrive(staged: bool) -> None:
    arrays = {
        "narrow": np.array([1, 2, 3], np.uint8),
        "wide": np.array([2**40, -1]),
        "none": np.empty(0, np.int64),
        "real": np.array([0.5], np.float32),
    }
    sent = upload(arrays, torch.device("cpu"), staged)
    assert {name: (got.numpy().dtype, got.tolist()) for name, got in sent.items()} == {
        name: (array.dtype, array.tolist()) for name, array in arrays.items()
    }
    assert upload({}, torch.device("cpu"), staged) == {}
