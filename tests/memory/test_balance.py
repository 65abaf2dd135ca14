"""memory/balance.py: never over the whole, never below a floor, a share for each that needs it, then all is calm."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hypothesis import given, settings
from hypothesis import strategies as st

from tidewright.memory.balance import GRAIN, Claim, balance

WHOLE, STEP = 6400, 800
GRAIN_BYTES = WHOLE // GRAIN


@dataclass(frozen=True)
class Need:
    """Of one model, constant or between two values."""

    floor: int
    low: int
    high: int
    room: int = WHOLE


def needs(wobble: float = 0.0) -> st.SearchStrategy[list[Need]]:
    one = st.builds(
        lambda floor, low, room: Need(floor, low, int(low * (1 + wobble)), max(room, floor)),
        st.integers(0, WHOLE // 8),
        st.integers(0, 2 * WHOLE),
        st.one_of(st.just(WHOLE), st.integers(0, WHOLE)),
    )
    return st.lists(one, min_size=1, max_size=5)


def begin(models: list[Need]) -> dict[str, Claim]:
    """Equal shares, all of which are held."""
    share = WHOLE // len(models)
    return {
        str(number): Claim(share, share, min(need.floor, share), max(need.room, need.floor), 0, 0)
        for number, need in enumerate(models)
    }


def after(claims: dict[str, Claim], free: int = 0) -> dict[str, Claim]:
    made = balance(claims, free, STEP)
    return {name: replace(claim, held=made[name]) for name, claim in claims.items()}


def settled(claims: dict[str, Claim], rounds: int = 60) -> dict[str, Claim]:
    for _ in range(rounds):
        claims = after(claims)
    return claims


def total(claims: dict[str, Claim]) -> int:
    return sum(claim.held for claim in claims.values())


@settings(max_examples=200, deadline=None)
@given(needs())
def test_it_gets_where_nobody_lacks_what_another_can_spare_and_stays_there(models: list[Need]) -> None:
    claims = begin(models)
    claims = {
        name: replace(claim, lately=need.low, peak=need.low)
        for (name, claim), need in zip(claims.items(), models, strict=True)
    }
    whole = total(claims)
    for _ in range(60):
        before, claims = claims, after(claims)
        assert total(claims) == whole
        moved = sum(max(claims[name].held - claim.held, 0) for name, claim in before.items())
        assert moved <= STEP
        for name, claim in claims.items():
            assert claim.held >= min(claim.floor, before[name].held)
    assert after(claims) == claims
    lacking = [claim for claim in claims.values() if claim.lack(claim.held) > GRAIN_BYTES]
    if lacking:
        assert sum(claim.spare(claim.held) for claim in claims.values()) <= GRAIN_BYTES
    if any(claim.missing_share(claim.held) > GRAIN_BYTES for claim in lacking):
        assert sum(claim.surplus(claim.held) for claim in claims.values()) <= GRAIN_BYTES


@settings(max_examples=200, deadline=None)
@given(needs(wobble=0.2))
def test_needs_that_go_up_and_down_a_little_move_nothing_for_ever(models: list[Need]) -> None:
    claims = begin(models)
    for number in range(120):
        needed = [need.high if number % 2 else need.low for need in models]
        claims = {
            name: replace(claim, lately=now, peak=now)
            for (name, claim), now in zip(claims.items(), needed, strict=True)
        }
        before, claims = claims, after(claims)
        assert number < 100 or claims == before


@settings(max_examples=100, deadline=None)
@given(needs(), st.integers(0, WHOLE))
def test_what_an_unloaded_model_had_is_given_away_at_once_and_no_more(models: list[Need], free: int) -> None:
    claims = begin(models)
    claims = {
        name: replace(claim, lately=need.low, peak=need.low)
        for (name, claim), need in zip(claims.items(), models, strict=True)
    }
    given_away = total(after(claims, free)) - total(claims)
    can_use = sum(max(claim.room - claim.held, 0) for claim in claims.values())
    assert given_away <= free
    assert given_away == min(free, can_use) or free <= GRAIN_BYTES + free // GRAIN


def test_a_model_that_comes_back_has_its_share_as_soon_as_it_needs_it() -> None:
    """It was unloaded: the other has all but its floor."""
    busy = Claim(held=5600, share=3200, floor=100, room=6400, lately=5600, peak=5600)
    back = Claim(held=800, share=3200, floor=800, room=6400, lately=0, peak=0)
    claims = {"busy": busy, "back": back}
    assert after(claims) == claims  # nobody asks
    claims["back"] = replace(back, lately=4000, peak=4000)
    first = after(claims)
    assert (first["back"].held, first["busy"].held) == (1600, 4800)  # a step
    # Both lack memory now: each has its share.
    done = settled(first | {"busy": replace(first["busy"], lately=9999, peak=9999)})
    assert abs(done["back"].held - 3200) <= GRAIN_BYTES
