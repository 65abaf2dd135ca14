"""attention/base.py: the rotation of q and k against its formula."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tidewright.attention.base import Rotation


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rotation_turns_pairs_of_the_two_halves(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    x_THD = torch.randn(4, 3, 10, generator=generator, dtype=dtype)
    angles_PF = torch.randn(7, 5, generator=generator).numpy()
    positions = [6, 0, 3, 3]
    cos, sin = (table(angles_PF[positions])[:, None] for table in (np.cos, np.sin))
    first, second = x_THD[..., :5].numpy(), x_THD[..., 5:].numpy()
    wanted = np.concatenate((first * cos - second * sin, second * cos + first * sin), -1)
    cos_PD = torch.from_numpy(np.concatenate((np.cos(angles_PF), np.cos(angles_PF)), -1))
    sin_PD = torch.from_numpy(np.concatenate((-np.sin(angles_PF), np.sin(angles_PF)), -1))
    rotation = Rotation(cos_PD, sin_PD, torch.tensor(positions))
    for _ in range(2):  # the second layer takes what the first one made
        torch.testing.assert_close(rotation.apply(x_THD), torch.from_numpy(wanted).to(dtype))
