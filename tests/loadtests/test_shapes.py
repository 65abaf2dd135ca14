"""How many users there are when."""

from __future__ import annotations

import itertools

import pytest

from loadtests.shapes import SHAPES, STEPS, tenant_at, users_at


def over_time(name: str, users: int, duration: int = 120) -> list[int]:
    return [users_at(name, second, duration, users) for second in range(duration)]


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("users", [1, 3, 40])
def test_there_is_always_someone_until_the_end_and_all_at_some_time(name: str, users: int) -> None:
    counts = over_time(name, users)
    assert min(counts) >= 1
    assert max(counts) == users
    assert users_at(name, 120, 120, users) == users_at(name, 1e9, 120, users) == 0


@pytest.mark.parametrize("name", ["steady", "soak"])
def test_steady_is_steady(name: str) -> None:
    assert set(over_time(name, 40)) == {40}


def test_a_ramp_rises_in_equal_steps() -> None:
    counts = over_time("ramp", 40)
    assert counts == sorted(counts)
    assert {counts.count(level) for level in set(counts)} == {120 // STEPS}
    assert sorted(set(counts)) == list(range(5, 41, 5))


def test_bursts_come_four_times() -> None:
    counts = over_time("burst", 40)
    assert set(counts) == {8, 40}
    starts = sum(before < after for before, after in itertools.pairwise(counts))
    assert starts == 4
    assert counts.count(40) == 120 * 0.3


@pytest.mark.parametrize("name", ["spike", "multi-tenant"])
def test_a_spike_fills_the_middle_third(name: str) -> None:
    assert over_time(name, 40) == [8] * 40 + [40] * 40 + [8] * 40


def test_the_first_tenant_floods() -> None:
    tenants = [tenant_at("multi-tenant", rank, 20, 3) for rank in range(20)]
    assert tenants[:4] == [0, 1, 2, 0]  # a fifth, shared
    assert set(tenants[4:]) == {0}
    assert [tenant_at("steady", rank, 20, 3) for rank in range(6)] == [0, 1, 2, 0, 1, 2]
