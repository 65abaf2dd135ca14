"""helpers/needs.py: the marks that tests get by what their code mentions, and what is refused without a mark."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

from helpers import needs
from helpers.processes import Serve, child
from helpers.redis import RunningRedis
from helpers.triton import RunningServer


def starts_one() -> None:
    with RunningServer(None):  # type: ignore[arg-type]
        pass


def calls_what_starts_one() -> None:
    [starts_one() for _ in range(1)]


@contextmanager
def kills_one() -> Iterator[None]:
    child(0, "").kill()
    yield


class Started(Serve):
    pass


def starts_a_subclass() -> None:
    Started()


def only_speaks_of_one(server: RunningServer) -> RunningServer | None:
    """RunningServer"""
    return server or None


@pytest.mark.parametrize(
    ("code", "marks"),
    [
        (starts_one, {"server"}),
        (calls_what_starts_one, {"server"}),
        (lambda: calls_what_starts_one(), {"server"}),
        (kills_one, {"chaos"}),
        (starts_a_subclass, {"server"}),
        (only_speaks_of_one, set()),
    ],
)
def test_a_test_gets_the_marks_of_what_it_mentions(code: Callable[[], None], marks: set[str]) -> None:
    assert needs._marks_of(code) == marks


@dataclass
class Item:
    """A test that runs, with these marks."""

    marks: tuple[str, ...]
    nodeid: str = "test_it.py::test_it"

    def get_closest_marker(self, name: str) -> str | None:
        return name if name in self.marks else None


def test_what_a_test_has_no_mark_for_it_can_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needs, "_running", Item(()))
    message = "^test_it.py::test_it starts a redis-server; mark it with @pytest.mark.redis$"
    with pytest.raises(RuntimeError, match=message):
        RunningRedis()
    monkeypatch.setattr(needs, "_running", Item(("server", "redis")))
    RunningRedis().client.close()
    monkeypatch.setattr(needs, "_running", None)  # at the end of a session
    RunningRedis().client.close()


def test_this_session_checks_its_tests(request: pytest.FixtureRequest) -> None:
    assert needs._running is request.node
