"""lora/slots.py: whose turn it is, and which slot holds what."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from tidewright.lora.slots import AdapterSlots


@dataclass
class Request:
    adapter: str


def turn(slots: AdapterSlots, *names: str) -> int | None:
    """The number of the request whose turn it is."""
    requests = [Request(name) for name in names]
    found = slots.first_admissible(requests)
    return None if found is None else next(number for number, request in enumerate(requests) if request is found)


def slots_of(count: int, *names: str) -> AdapterSlots:
    slots = AdapterSlots(count)
    for name in names:
        slots.add(name, f"digest of {name}")
    return slots


def test_the_least_recently_used_idle_one_gives_way() -> None:
    slots = slots_of(2, "a", "b", "c")
    assert [slots.acquire(name) for name in ("a", "b")] == [0, 1]
    assert slots.take_moves() == ((0, "a"), (1, "b"))
    for name in ("b", "a"):
        slots.release(name)
    assert slots.acquire("b") == 1
    assert slots.acquire("c") == 0
    assert slots.take_moves() == ((0, "c"),)
    assert slots.take_moves() == ()


def test_who_needs_a_slot_blocks_nobody_else() -> None:
    slots = slots_of(2, "a", "b", "c")
    for name in ("a", "b"):
        slots.acquire(name)
    assert turn(slots, "c", "b", "a") == 1
    assert turn(slots, "c", "", "b") == 1
    # The adapter that is to give way is given to nobody behind.
    assert turn(slots, "c", "a") is None
    assert turn(slots, "a", "c") == 0
    slots.release("a")
    assert turn(slots, "c", "a") == 0
    assert turn(slots) is None


def test_each_that_waits_gets_a_slot_of_its_own() -> None:
    slots = slots_of(2, "a", "b", "c", "d")
    for name in ("a", "b"):
        slots.acquire(name)
    assert turn(slots, "c", "c", "b") == 2
    assert turn(slots, "c", "d", "b", "a", "") == 4


def test_a_removed_one_leaves_its_slot_and_no_move() -> None:
    slots = slots_of(1, "a", "b")
    slots.acquire("a")
    slots.release("a")
    slots.remove("a")
    assert slots.take_moves() == ()
    assert slots.digest("a") is None
    assert slots.acquire("b") == 0


def test_a_move_that_was_not_made_comes_again_if_it_is_still_true() -> None:
    slots = slots_of(1, "a", "b")
    slots.acquire("a")
    moves = slots.take_moves()
    slots.move_again(moves)
    assert slots.take_moves() == moves
    slots.release("a")
    slots.acquire("b")
    slots.move_again(moves)
    assert slots.take_moves() == ((0, "b"),)


@given(st.integers(1, 3), st.lists(st.tuples(st.sampled_from("abcde"), st.integers(1, 4)), min_size=1, max_size=30))
def test_all_that_wait_run_in_the_end_each_in_its_adapter_s_slot(count: int, work: list[tuple[str, int]]) -> None:
    slots = slots_of(count, *"abcde")
    waiting, running, held = list(work), [], {}  # type: ignore[var-annotated]
    for _ in range(5 * len(work) + 5):
        while (number := turn(slots, *(name for name, _ in waiting))) is not None and len(running) < 4:
            name, steps = waiting.pop(number)
            running.append((name, slots.acquire(name), steps))
        held |= dict(slots.take_moves())
        assert all(held[slot] == name for name, slot, _ in running)
        for name, _, steps in running:
            if steps == 1:
                slots.release(name)
        running = [(name, slot, steps - 1) for name, slot, steps in running if steps > 1]
        if not waiting and not running:
            return
    raise AssertionError(f"these never ran: {waiting}")
