"""What replicas should have, by what each says that it was told."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tidewright.schema import MAX_ADAPTERS_KNOWN, AdapterStatus
from tidewright_gateway.replicas.adapter_book import AdapterBook

statuses = st.builds(
    AdapterStatus, st.sampled_from("ab"), st.sampled_from("pq"), st.booleans(), st.sampled_from([0.0, 1.0, 2.0, 3.0])
)


def book_of(*found: AdapterStatus) -> AdapterBook:
    book = AdapterBook()
    book.note(found)
    return book


def loaded(name: str, at: float, path: str = "p") -> AdapterStatus:
    return AdapterStatus(name, path, True, at)


def gone(name: str, at: float, path: str = "p") -> AdapterStatus:
    return AdapterStatus(name, path, False, at)


def has(*found: AdapterStatus) -> dict[str, AdapterStatus]:
    return {status.name: status for status in found}


def test_a_replica_is_told_what_it_missed_and_nothing_else() -> None:
    book = book_of(loaded("new", 5), gone("old", 5), loaded("moved", 5, "q"))
    assert book.due(has()) == [loaded("new", 5), loaded("moved", 5, "q")]  # what it never had, it need not unload
    assert book.due(has(loaded("old", 3), loaded("moved", 3))) == [
        loaded("new", 5),
        gone("old", 5),
        loaded("moved", 5, "q"),
    ]
    assert book.due(has(loaded("new", 3), gone("old", 3), loaded("moved", 6))) == []  # the same folder, and newer ones
    assert book.due(has(loaded("new", 0), gone("old", 0), loaded("moved", 5, "q"))) == []


def test_a_replica_s_own_configuration_is_no_command_for_others() -> None:
    assert book_of(loaded("own", 0)).due(has()) == []


def test_what_is_loaded_is_forgotten_last() -> None:
    book = book_of(*(loaded(f"l{number}", 1) for number in range(MAX_ADAPTERS_KNOWN)))
    book.note(gone(f"g{number}", 2 + number) for number in range(3))
    assert len(book.due(has())) == MAX_ADAPTERS_KNOWN
    assert book.newest("g2") is None


@given(st.lists(statuses, max_size=6), st.lists(statuses, max_size=6))
def test_gateways_that_hear_the_same_in_any_order_want_the_same(first: list[AdapterStatus], last: list) -> None:
    """Where two commands have the same time, only when they are the same: no two users act in one microsecond."""
    found = {(status.name, status.at): status for status in [*first, *last]}
    one, other = book_of(*found.values()), book_of(*reversed(list(found.values())))
    for name in "ab":
        assert one.newest(name) == other.newest(name)
