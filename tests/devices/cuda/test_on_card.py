"""helpers/on_card.py: arguments of a launch go to another memory and come back."""

from __future__ import annotations

import torch

from helpers.on_card import moved


def test_views_keep_their_places_and_what_they_share() -> None:
    whole_XY = torch.arange(24.0).reshape(4, 6)
    rows_XY, columns_XY, other_X = whole_XY[1:], whole_XY[:, 2:4], torch.zeros(2)
    with moved([rows_XY, 5, columns_XY, other_X, torch.empty(0)], torch.device("cpu")) as (
        rows,
        five,
        columns,
        other,
        _,
    ):
        assert (five, columns.stride(), columns.storage_offset()) == (5, columns_XY.stride(), 2)
        assert torch.equal(rows, rows_XY)
        rows[0, 2] = 100
        assert columns[1, 0] == 100  # they share it there, too
        columns[3] = -1
        other += 7
        assert whole_XY[1, 2] == 8  # not here yet
    assert (whole_XY[1, 2], whole_XY[3, 2], whole_XY[3, 3], whole_XY[3, 4]) == (100, -1, -1, 22)
    assert other_X.tolist() == [7, 7]
