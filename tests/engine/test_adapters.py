"""engine/adapters.py: what a host with a small budget is told to read, add and drop, and who waits meanwhile."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tidewright.distributed.rank_messages import AdapterRead
from tidewright.engine.adapters import READ_AHEAD, Adapters
from tidewright.engine.messages import AdapterChanged, LoadAdapter, Submit, UnloadAdapter
from tidewright.schema import NO_ADAPTER, SamplingParams


class Host:
    """Two ranks whose readings the test ends."""

    def __init__(self, budget: int) -> None:
        self.told: list[str] = []
        self.resident: set[str] = set()
        self.paths: dict[int, str] = {}
        self.requests: Counter[str] = Counter()
        self.wanted, self.is_full, self.budget = 0, False, budget
        self.shared = 10**9  # bytes that adapters may have of the memory that they share with others
        self.adapters = Adapters(self, ranks=2, budget=budget)

    def read_adapter(self, number: int, path: str) -> None:
        self.paths[number] = path

    def forget_adapter(self, number: int) -> None:
        self.told.append(f"forget {number}")

    def add_adapter(self, name: str, number: int) -> None:
        self.told.append(f"add {name}")
        self.resident.add(name)

    def drop_adapter(self, name: str) -> None:
        self.told.append(f"drop {name}")
        self.resident.remove(name)

    def adapter_requests(self, name: str) -> int:
        return self.requests[name]

    def lack(self, size: int) -> int:
        self.wanted = size
        return size if self.is_full else max(self.adapters.used() + size - self.shared - self.adapters.idle(), 0)

    def make_room(self, size: int) -> bool:
        if (lack := self.adapters.used() + size - self.shared) > 0:
            self.adapters.evict(lack)
        return not self.is_full and self.adapters.used() + size <= self.shared

    def load(self, name: str, **result: object) -> AdapterChanged:
        assert self.adapters.load(LoadAdapter(name, name)) is None
        changed = self.read(**result)[0]
        assert changed
        return changed

    def read(self, size: int = 50, digest: str = "", error: str = "") -> tuple[Any, list[int], list[str]]:
        """Ends the latest reading: the change, and the requests that go on or are refused."""
        number, path = max(self.paths.items())
        assert self.adapters.was_read(AdapterRead(number, digest or path, 4, size // 2)) is None
        outcome = self.adapters.was_read(AdapterRead(number, digest or path, 4, size // 2, error))
        assert outcome
        refused = [output.message for output in outcome.refused]
        return outcome.changed, [request.request_id for request in outcome.requests], refused

    def end_reading(self, number: int, size: int = 50, error: str = "") -> None:
        for _ in range(2):
            self.adapters.was_read(AdapterRead(number, self.paths[number], 4, size // 2, error))

    def hold(self, request_id: int, adapter: str, tenant: str = "", priority: int = 0) -> bool:
        return self.adapters.hold(self.request(request_id, adapter, tenant, priority))

    @staticmethod
    def request(request_id: int, adapter: str, tenant: str = "", priority: int = 0) -> Submit:
        return Submit(request_id, [1], SamplingParams(tenant=tenant, priority=priority), adapter=adapter)


def test_one_that_all_ranks_have_read_is_added() -> None:
    host = Host(budget=100)
    assert host.load("a") == AdapterChanged("a", True, "", 4, 50, "a")
    assert host.told == ["add a"]
    assert not host.hold(1, "a")
    assert not host.hold(2, "unknown")  # the engine refuses it


def test_one_that_a_rank_can_t_read_is_added_nowhere() -> None:
    host = Host(budget=100)
    assert host.load("a", error="rank 1: no such file") == AdapterChanged("a", False, "rank 1: no such file")
    assert host.told == ["forget 0"]
    assert host.load("a").loaded


def test_requests_that_come_before_it_is_read_wait() -> None:
    host = Host(budget=100)
    host.adapters.load(LoadAdapter("a", "a"))
    assert [host.hold(number, "a") for number in (1, 2, 3)] == [True, True, True]
    assert host.adapters.drop(2)
    assert not host.adapters.drop(2)
    assert host.read()[1:] == ([1, 3], [])
    host.adapters.load(LoadAdapter("b", "b"))
    assert host.hold(4, "b")
    assert host.read(error="it is damaged")[1:] == ([], [f"{NO_ADAPTER}'b' is loaded now: it is damaged"])


def test_the_least_recently_used_without_requests_leave_memory_and_are_read_again() -> None:
    host = Host(budget=100)
    host.load("a")
    host.load("b")
    assert not host.hold(1, "a")
    host.told.clear()
    assert host.load("c").loaded
    assert host.told == ["drop b", "add c"]
    assert host.hold(2, "b")
    assert host.read() == (AdapterChanged("b", True, "", 4, 50, "b"), [2], [])
    assert host.told[2:] == ["drop c" if host.requests["a"] else "drop a", "add b"]


def test_what_requests_have_stays_and_a_load_beyond_is_refused() -> None:
    host = Host(budget=100)
    host.load("a")
    host.load("b")
    host.requests.update(["a", "b"])
    changed = host.load("c")
    assert not changed.loaded
    assert "no room beside those that requests have" in changed.error
    assert not host.load("large", size=102).loaded
    assert [line for line in host.told if line.startswith("drop")] == []


def test_files_that_changed_since_are_not_taken() -> None:
    host = Host(budget=50)
    host.load("a")
    host.load("b")
    assert host.hold(1, "a")
    changed, goes_on, refused = host.read(digest="other")
    assert "changed since it was loaded" in changed.error
    assert goes_on == []
    assert len(refused) == 1


def test_unloaded_once_the_last_request_has_ended() -> None:
    host = Host(budget=100)
    host.load("a")
    host.requests["a"] = 1
    assert host.adapters.unload(UnloadAdapter("a")) is None
    assert host.adapters.settle() == []
    assert not host.hold(1, "a")
    host.requests["a"] = 0
    assert host.adapters.settle() == [AdapterChanged("a", False)]
    assert host.told == ["add a", "drop a"]
    assert host.adapters.unload(UnloadAdapter("a")) == AdapterChanged("a", False)
    assert host.load("a").loaded


def test_those_that_no_request_has_can_be_evicted_by_others() -> None:
    host = Host(budget=200)
    for name in "abc":
        assert host.load(name).loaded
    host.requests["b"] = 1
    assert (host.adapters.used(), host.adapters.idle()) == (150, 100)
    assert host.adapters.evict(1) == 50
    assert host.told[-1] == "drop a"
    assert host.adapters.evict(1000) == 50
    assert host.told[-1] == "drop c"
    assert (host.adapters.used(), host.adapters.idle()) == (50, 0)


def test_one_that_does_not_fit_beside_what_else_has_the_memory_is_refused() -> None:
    host = Host(budget=200)
    host.is_full = True
    assert "there is no room" in host.load("a").error
    assert host.wanted == 50
    assert host.adapters.used() == 0


def test_a_request_for_one_that_was_evicted_waits_until_there_is_room() -> None:
    host = Host(budget=100)
    for name in "abc":
        assert host.load(name).loaded  # "a" leaves memory
    host.requests.update(["b", "c"])
    readings = len(host.paths)
    assert [host.hold(1, "a"), host.hold(2, "a")] == [True, True]
    host.adapters.read_again()
    assert len(host.paths) == readings  # no need to read what has no room
    host.requests["c"] = 0
    host.adapters.read_again()
    assert host.read() == (AdapterChanged("a", True, "", 4, 50, "a"), [1, 2], [])
    assert host.told[-2:] == ["drop c", "add a"]


def test_those_that_wait_for_room_come_in_order_and_ahead_of_new_requests_for_idle_ones() -> None:
    host = Host(budget=50)
    for name in "abc":
        assert host.load(name).loaded
    host.requests["c"] = 1
    assert [host.hold(1, "b"), host.hold(2, "a")] == [True, True]
    host.requests["c"] = 0
    assert host.hold(3, "c")  # it gives way
    assert host.read()[1] == [1]
    host.requests["b"] = 1
    host.adapters.read_again()
    host.requests["b"] = 0
    assert host.adapters.drop(2)
    host.adapters.read_again()  # nobody wants "a" any longer
    assert host.read()[1] == [3]


def test_one_that_finds_its_room_taken_when_it_was_read_waits_for_it_again() -> None:
    """Also by others than adapters, and in an engine that has never had it: for the bridge it is loaded."""
    host = Host(budget=100)
    host.adapters.load(LoadAdapter("a", "a", "a"))
    assert host.hold(1, "a")
    host.is_full = True
    assert host.read() == (AdapterChanged("a", True, "", 4, 50, "a"), [], [])
    assert host.told == ["forget 0"]
    host.adapters.read_again()
    host.is_full = False
    host.adapters.read_again()
    host.is_full = True
    assert host.read() == (None, [], [])  # told before
    host.is_full = False
    host.adapters.read_again()
    assert host.read()[1:] == ([1], [])


def test_files_that_changed_between_two_engines_are_not_taken() -> None:
    host = Host(budget=100)
    host.adapters.load(LoadAdapter("a", "a", digest="as it was"))
    assert host.hold(1, "a")
    changed, goes_on, refused = host.read(digest="other")
    assert "changed since it was loaded" in changed.error
    assert (goes_on, len(refused)) == ([], 1)


def test_few_are_read_at_a_time_whatever_comes_of_each_and_those_with_requests_first() -> None:
    host = Host(budget=100)
    for name in "abcdefgh":
        assert host.adapters.load(LoadAdapter(name, name, digest=name if name in "dg" else "")) is None
    assert host.hold(1, "h")
    ends: dict[str, dict[str, Any]] = {"b": {"error": "damaged"}, "c": {"size": 1000}, "d": {"size": 1000}}
    done = 0
    while done < len(host.paths):
        assert len(host.paths) <= done + READ_AHEAD
        host.end_reading(done, **ends.get(host.paths[done], {}))
        done += 1
    assert [*host.paths.values()] == [*"abhcdefg"]
    assert [line for line in host.told if line.startswith("add")] == [f"add {name}" for name in "ahefg"]
    assert host.adapters.used() == 100


def test_one_rank_s_word_lets_no_further_one_be_read() -> None:
    """The others still have it in the making."""
    host = Host(budget=100)
    for name in "abc":
        host.adapters.load(LoadAdapter(name, name))
    host.adapters.was_read(AdapterRead(0, "a", 4, 25))
    assert [*host.paths.values()] == [*"ab"]
    host.adapters.was_read(AdapterRead(0, "a", 4, 25))
    assert [*host.paths.values()] == [*"abc"]


class Crowd:
    """Tenants that ask for more adapters than have room; each request runs for a few rounds once it is taken."""

    def __init__(self, room: int, names: list[str], sizes: dict[str, int] | None = None) -> None:
        self.host = Host(budget=50 * room)
        self._sizes = dict.fromkeys(names, 50) | (sizes or {})
        for name in names:
            assert self.host.load(name, size=self._sizes[name]).loaded
        self._ends: dict[int, tuple[int, str]] = {}
        self._now, self._done = 0, len(self.host.paths)
        self._rounds: dict[int, int] = {}
        self.taken: set[int] = set()

    def send(self, request_id: int, adapter: str, tenant: str, rounds: int, priority: int = 0) -> None:
        self._rounds[request_id] = rounds
        self._give(self.host.request(request_id, adapter, tenant, priority))

    def round(self) -> None:
        """Some requests end, what is being read is read, and the engine's heart beats."""
        self._now += 1
        for request_id, (end, adapter) in list(self._ends.items()):
            if end <= self._now:
                del self._ends[request_id]
                self.host.requests[adapter] -= 1
        for number in range(self._done, len(self.host.paths)):
            path = self.host.paths[number]
            for _ in range(2):
                outcome = self.host.adapters.was_read(AdapterRead(number, path, 4, self._sizes[path] // 2))
            assert outcome
            for request in outcome.requests:
                self._take(request)
            self._done += 1
        self.host.adapters.read_again()
        for request in self.host.adapters.take_ready():
            self._take(request)
        assert self.host.adapters.used() <= self.host.budget

    def _give(self, request: Submit) -> None:
        if not self.host.adapters.hold(request):
            self._take(request)

    def _take(self, request: Submit) -> None:
        assert request.request_id not in self.taken
        assert request.adapter in self.host.resident
        self.taken.add(request.request_id)
        self.host.requests[request.adapter] += 1
        self._ends[request.request_id] = self._now + self._rounds[request.request_id], request.adapter


CROWD = [f"flood{number}" for number in range(6)]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 4),
    st.integers(1, 8),
    st.lists(st.lists(st.sampled_from(CROWD), max_size=4), min_size=1, max_size=12),
    st.integers(0, 30),
)
def test_a_flood_for_many_adapters_does_not_keep_another_tenant_s_out_of_memory(
    room: int, rounds: int, flood: list[list[str]], before: int
) -> None:
    """It waits for those that were taken before, and for a reading or two; never for those that come after it."""
    crowd = Crowd(room, [*CROWD, "quiet"])
    for now in range(before + rounds + 5):
        if now == before:
            crowd.send(10**6, "quiet", "quiet", 1)
        for place, name in enumerate(flood[now % len(flood)]):
            crowd.send(100 * now + place, name, "flood", rounds)
        crowd.round()
        if 10**6 in crowd.taken:
            return
    raise AssertionError("it waits still")


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3), st.integers(1, 5), st.lists(st.sampled_from(CROWD), min_size=1, max_size=8))
def test_all_of_one_tenant_s_adapters_get_their_turn(room: int, rounds: int, often: list[str]) -> None:
    """Also those that are asked for once, beside others that are asked for in each round."""
    crowd = Crowd(room, [*CROWD, "rare"])
    for now in range(10 + (len(CROWD) + 1) * (rounds + 4)):
        if now == 10:
            crowd.send(10**6, "rare", "", 1)
        for place, name in enumerate(often):
            crowd.send(100 * now + place, name, "", rounds)
        crowd.round()
    assert 10**6 in crowd.taken


def test_a_tenant_whose_one_is_small_gets_the_room_of_a_large_one_in_its_turn() -> None:
    """Sharing by number alone would give it nothing: each has one, and its own does not make room enough."""
    crowd = Crowd(2, ["small", "wanted", "large"], {"small": 10, "wanted": 60, "large": 90})
    for now in range(40):
        crowd.send(100 * now, "large", "other", 3)
        crowd.send(100 * now + 1, "small", "own", 3)
        if now == 10:
            crowd.send(10**6, "wanted", "own", 1)
        crowd.round()
    assert 10**6 in crowd.taken
    assert {2000, 2001} <= crowd.taken  # and those go on in theirs


@pytest.mark.parametrize("of_one_tenant", [False, True])
def test_one_that_needs_the_room_of_several_gets_it_though_they_are_never_idle_together(of_one_tenant: bool) -> None:
    """One that has made room was taken again while the other still had requests, and so on for ever."""
    crowd = Crowd(2, ["one", "two", "large"], {"large": 100})
    for now in range(60):
        if now % 6 == 0:
            crowd.send(now, "one", "first", 4)
        elif now % 6 == 3:
            crowd.send(now, "two", "first" if of_one_tenant else "second", 4)
        if now == 10:
            crowd.send(10**6, "large", "third", 1)
        crowd.round()
    assert 10**6 in crowd.taken
    assert {30, 33} <= crowd.taken  # and those go on in their turn


def test_one_that_no_longer_fits_holds_up_nobody() -> None:
    """What adapters share with the KV cache may be less than when it was loaded."""
    host = Host(budget=200)
    for name, size in {"large": 100, "a": 50, "b": 50}.items():
        assert host.load(name, size=size).loaded
    host.adapters.evict(150)
    host.shared = 60
    assert [host.hold(1, "large"), host.hold(2, "b")] == [True, False]
    host.requests["b"] = 1
    assert [host.hold(3, "a"), host.hold(4, "a")] == [True, True]
    host.requests["b"] = 0
    host.adapters.read_again()
    assert host.read()[1] == [3, 4]
    host.requests["a"] = 1
    host.shared = 160
    host.adapters.read_again()
    assert host.read(size=100)[1] == [1]


def test_two_are_not_read_for_the_same_room() -> None:
    """The one that came second found it taken, and had to begin behind all others."""
    host = Host(budget=400)
    for name in "ab":
        assert host.load(name, size=60).loaded
    host.adapters.evict(120)
    host.shared, readings = 100, len(host.paths)
    assert [host.hold(1, "a"), host.hold(2, "b")] == [True, True]
    assert len(host.paths) == readings + 1
    assert host.read(size=60)[1] == [1]


def test_what_others_than_adapters_have_of_the_memory_makes_it_no_less_shared() -> None:
    """The budget for adapters is larger than what the KV cache leaves."""
    crowd = Crowd(4, ["flood0", "flood1", "quiet"])
    crowd.host.adapters.evict(50)
    crowd.host.shared = 100
    for now in range(20):
        for place, name in enumerate(("flood0", "flood1")):
            crowd.send(100 * now + place, name, "flood", 3)
        if now == 10:
            crowd.send(10**6, "quiet", "quiet", 1)
        crowd.round()
        assert crowd.host.adapters.used() <= 100
    assert 10**6 in crowd.taken


def test_the_more_urgent_comes_first_and_what_it_asks_for_makes_no_room() -> None:
    host = Host(budget=50)
    for name in "abc":
        assert host.load(name).loaded
    host.requests["c"] = 1
    assert host.hold(1, "a", priority=5)
    assert host.hold(2, "b")
    assert host.hold(3, "c", priority=5)  # it is to make room
    host.adapters.read_again()
    assert host.adapters.take_ready() == []
    assert host.hold(4, "c", priority=-1)
    host.adapters.read_again()
    assert [request.request_id for request in host.adapters.take_ready()] == [3, 4]
    host.requests["c"] = 0
    host.adapters.read_again()
    assert host.read()[1] == [2]


def test_of_idle_ones_those_of_the_tenant_that_has_most_leave_memory_first() -> None:
    host = Host(budget=150)
    for name in "abc":
        assert host.load(name).loaded
    assert not host.hold(1, "a", "quiet")
    assert not host.hold(2, "b", "busy")
    assert not host.hold(3, "c", "busy")
    host.load("d")
    assert host.told[-2:] == ["drop b", "add d"]
