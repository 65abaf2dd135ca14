"""The bridge's list of adapters against a scripted engine: each call is answered once, and adapters survive deaths."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tidewright.bridge.adapters import TRIES, Adapter, Adapters
from tidewright.engine.messages import AdapterChanged, LoadAdapter, ToEngine, UnloadAdapter
from tidewright.errors import RequestError
from tidewright.schema import MAX_ADAPTERS_KNOWN


class Bridge:
    def __init__(self) -> None:
        self.sent: list[ToEngine] = []
        self.answers: list[str] = []
        self.in_use: set[str] = set()
        self.adapters = Adapters(self.sent.append, self.in_use.__contains__)
        self.adapters.engine_up()

    def done(self, name: str) -> Callable[[Adapter | RequestError], None]:
        return lambda answer: self.answers.append(f"{name}: {answer if isinstance(answer, RequestError) else 'ok'}")

    def load(self, name: str, path: str = "folder") -> None:
        self.adapters.load(name, path, self.done(name))

    def loaded(self, name: str) -> None:
        self.load(name)
        self.adapters.changed(AdapterChanged(name, True, rank=8, bytes=100, digest=f"files of {name}"))
        self.sent.clear()
        self.answers.clear()

    def unload(self, name: str) -> None:
        self.adapters.unload(name, self.done(name))

    def restart(self, to_blame: bool = True) -> None:
        self.adapters.engine_lost(to_blame)
        self.sent.clear()
        self.adapters.engine_up()
        self.adapters.settle()

    @property
    def states(self) -> dict[str, str]:
        return {name: adapter.state for name, adapter in self.adapters.by_name.items()}


def test_a_load_and_an_unload_are_answered_when_the_engine_has_done_it() -> None:
    bridge = Bridge()
    bridge.load("one")
    assert bridge.sent == [LoadAdapter("one", "folder")]
    assert bridge.answers == []
    bridge.adapters.changed(AdapterChanged("one", True, rank=8, bytes=100, digest="files"))
    assert bridge.adapters.by_name == {"one": Adapter("one", "folder", "loaded", 8, 100, "files")}
    bridge.unload("one")
    assert bridge.sent[1:] == [UnloadAdapter("one")]
    assert bridge.states == {"one": "unloading"}
    bridge.adapters.changed(AdapterChanged("one", False))
    assert bridge.answers == ["one: ok", "one: ok"]
    assert bridge.states == {}


def test_a_refusal_is_told_and_leaves_nothing() -> None:
    bridge = Bridge()
    bridge.load("bad")
    bridge.adapters.changed(AdapterChanged("bad", False, "its rank is 512"))
    assert bridge.answers == ["bad: its rank is 512"]
    assert bridge.states == {}


@pytest.mark.parametrize("name", ["", "a\nb", "x" * 257, "one"])
def test_a_name_that_can_t_be_is_refused_at_once(name: str) -> None:
    bridge = Bridge()
    bridge.loaded("one")
    bridge.load(name)
    assert bridge.sent == []
    assert len(bridge.answers) == 1
    assert bridge.states == {"one": "loaded"}


def test_the_list_is_bounded() -> None:
    bridge = Bridge()
    for number in range(MAX_ADAPTERS_KNOWN):
        bridge.load(str(number))
    bridge.load("one more")
    assert bridge.answers == ["one more: 256 adapters are loaded, which is the limit; unload one first"]


def test_the_next_engine_gets_what_the_one_before_had() -> None:
    bridge = Bridge()
    for name in ("one", "two", "going"):
        bridge.loaded(name)
    bridge.in_use.add("going")
    bridge.unload("going")
    bridge.load("new")
    bridge.restart()
    # What was never loaded may be what killed the engine.
    assert bridge.answers == ["new: the engine ended while it loaded the adapter; try again"]
    loads = [LoadAdapter(name, "folder", f"files of {name}") for name in ("one", "two", "going")]
    assert bridge.sent == loads
    bridge.in_use.clear()
    bridge.adapters.settle()
    assert bridge.sent[len(loads) :] == [UnloadAdapter("going")]
    for name in ("one", "two", "going"):
        bridge.adapters.changed(AdapterChanged(name, True))
    bridge.adapters.changed(AdapterChanged("going", False))
    assert bridge.answers[1:] == ["going: ok"]
    assert bridge.states == {"one": "loaded", "two": "loaded"}


def test_one_that_engines_die_of_is_dropped_and_no_other() -> None:
    bridge = Bridge()
    for name in ("one", "two", "three"):
        bridge.loaded(name)
    bridge.restart()
    for _ in range(TRIES):
        assert set(bridge.states.values()) == {"loaded"}
        bridge.adapters.changed(AdapterChanged("one", True))
        bridge.restart()  # it was reading "two"
        bridge.restart(to_blame=False)
    assert bridge.states == {"one": "loaded", "three": "loaded"}
    assert [message.name for message in bridge.sent] == ["one", "three"]


def test_the_first_of_those_that_are_loaded_again_is_to_blame_whatever_was_pending_before() -> None:
    bridge = Bridge()
    for name in ("one", "two"):
        bridge.loaded(name)
    bridge.restart()
    bridge.adapters.changed(AdapterChanged("one", True))
    bridge.restart()
    bridge.restart()  # it was reading "one"
    assert bridge.states == {"one": "loaded", "two": "loaded"}


def test_engines_that_may_have_died_of_something_else_cost_no_adapter_that_was_loaded() -> None:
    bridge = Bridge()
    bridge.loaded("one")
    bridge.in_use.add("one")
    bridge.unload("one")
    bridge.loaded("two")
    for _ in range(3 * TRIES):
        bridge.restart(to_blame=False)
    assert bridge.states == {"one": "unloading", "two": "loaded"}
    assert bridge.answers == []


def test_one_that_can_t_be_loaded_again_is_dropped() -> None:
    bridge = Bridge()
    bridge.loaded("one")
    bridge.restart()
    bridge.adapters.changed(AdapterChanged("one", False, "there is no such folder"))
    assert bridge.states == {}


def test_asked_for_without_an_engine_it_comes_with_the_next() -> None:
    bridge = Bridge()
    bridge.adapters.engine_lost(to_blame=True)
    bridge.load("one")
    assert bridge.sent == []
    bridge.adapters.engine_up()
    assert bridge.sent == [LoadAdapter("one", "folder")]


def test_nobody_waits_for_an_engine_that_does_not_come() -> None:
    bridge = Bridge()
    bridge.loaded("one")
    bridge.load("two")
    bridge.unload("one")
    bridge.adapters.fail("the server is shutting down")
    assert sorted(bridge.answers) == ["one: the server is shutting down", "two: the server is shutting down"]
