"""Marks each test with what it needs (a server, a Redis, …), found in its code; nothing may be used without its mark.

A helper that starts something says so with `@needs("server")`. A test has the mark if its own code, a fixture of it, or
anything of tests/ that these call mentions that helper.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any, TypeVar

import pytest

T = TypeVar("T")

MARKS = {
    "server": "starts a tritonserver",
    "cluster": "runs pods on the small kubelet of tests/deployment",
    "chaos": "kills or stops processes of a server, or looks for them to do so",
    "gateway": "starts a gateway process",
    "redis": "starts a redis-server",
    "browser": "starts a Chromium",
    "rsyslog": "starts an rsyslogd",
    "hosts": "makes network namespaces",
    "clients": "runs a client of other people",
    "image": "runs the steps of docker/Dockerfile in namespaces",
    "heavy": "takes ten seconds of a core and more, or starts several engines; `make check` leaves it out",
    "slow": "takes a minute or more to make its environment; `make test-clients`, `test-image`, `test-rust` run it",
}
_TESTS = str(Path(__file__).parent.parent)
_running: pytest.Item | None = None


def needs(mark: str) -> Callable[[T], T]:
    """For a class or a function. It can be used only while a test that has the mark runs."""
    assert mark in MARKS

    def decorate(what: T) -> T:
        target: Any = what.__init__ if isinstance(what, type) else what  # type: ignore[misc]

        @functools.wraps(target)
        def checked(*args: Any, **kwargs: Any) -> Any:
            if _running is not None and not _running.get_closest_marker(mark):
                raise RuntimeError(f"{_running.nodeid} {MARKS[mark]}; mark it with @pytest.mark.{mark}")
            return target(*args, **kwargs)

        if isinstance(what, type):
            what.__init__ = checked  # type: ignore[misc]
            made: Any = what
        else:
            made = checked
        made.needs = mark
        return made

    return decorate


def add_marks(item: pytest.Item) -> None:
    """Adds those that are found in the code of a test and of its fixtures."""
    if isinstance(item, pytest.Function):
        fixtures = [fixture[-1].func for fixture in item._fixtureinfo.name2fixturedefs.values()]
        for mark in sorted(set().union(*map(_marks_of, (item.function, *fixtures)))):
            item.add_marker(mark)


def begin(item: pytest.Item | None) -> None:
    """From here on it is this test that runs."""
    global _running
    _running = item


@functools.cache
def _marks_of(what: Any) -> frozenset[str]:
    found: set[str] = set()
    seen: set[int] = set()
    left = [what]
    while left:
        one = left.pop()
        if id(one) in seen or not callable(one):  # other objects may do anything when asked for an attribute
            continue
        seen.add(id(one))
        if isinstance(getattr(one, "needs", None), str):
            found.add(one.needs)
        one = getattr(one, "__wrapped__", one)
        if isinstance(one, type) and one.__module__ != "builtins":
            left += [value for value in vars(one).values() if isinstance(value, FunctionType)]
            left += one.__bases__
        elif isinstance(one, FunctionType) and one.__code__.co_filename.startswith(_TESTS):
            left += [one.__globals__[name] for name in _names(one.__code__) if name in one.__globals__]
    return frozenset(found)


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
