"""failsafe/failsafe.py between scripted models: degradation, shedding, and the limit of requests in flight."""

from __future__ import annotations

import msgspec

from helpers.two_models import HANG, STUB_DIED, UNLOADED, WELL, Last, end, until, world


def test_short_answers() -> None:
    with world(degradation=True, degrade_max_tokens=10) as it:
        it.says(msgspec.structs.replace(WELL, waiting=0.3))
        for _ in range(2):
            it.submit(max_tokens=100, min_tokens=50).end()
            it.models.scripts["decoder"] = [[UNLOADED]]
        assert [call.model for call in it.models.calls] == ["decoder", "decoder", "fallback"]
        for call in it.models.calls:
            assert (call.order.sampling.max_tokens, call.order.sampling.min_tokens) == (10, 10)
        assert it.sample("degradation_level") == 1


def test_only_the_fallback() -> None:
    with world(degradation=True, degrade_max_tokens=10) as it:
        it.says(msgspec.structs.replace(WELL, kv_usage=0.99))
        caller = it.submit(max_tokens=100)
        assert end(caller.end()) == ("fallback", "degraded")
        [call] = it.models.calls
        assert call.order.sampling.max_tokens == 10
        it.says(it.models.status, fallback="the engine is starting")
        assert end(it.submit().end()) == ("decoder", "")


def test_shed() -> None:
    with world(degradation=True) as it:
        it.says(msgspec.structs.replace(WELL, wait=31.0))
        caller = it.submit()
        assert caller.end() is None
        assert caller.reason == "overloaded"
        assert not it.models.calls
        assert it.sample("requests_failed_total", "overloaded") == 1


def test_it_is_off_by_default() -> None:
    with world(degrade_max_tokens=10) as it:
        it.says(msgspec.structs.replace(WELL, wait=31.0))
        assert end(it.submit(max_tokens=100).end()) == ("decoder", "")
        assert it.models.calls[0].order.sampling.max_tokens == 100
        assert it.sample("degradation_level") == 3


def test_a_dead_decoder_has_no_queue() -> None:
    """What it said last must not keep requests from the fallback for ever."""
    with world(degradation=True, degrade_dwell=10, failsafe_patience=0.5) as it:
        it.says(msgspec.structs.replace(WELL, wait=31.0))
        assert it.submit().end() is None
        it.says(STUB_DIED)
        for _ in range(3):
            it.look()
            it.passes(11)
        it.look()
        assert it.sample("degradation_level") == 0
        assert end(it.submit().end()) == ("fallback", "stub_died")


def test_too_many_at_once() -> None:
    with world(max_running=1, max_waiting=0) as it:
        it.models.scripts["decoder"] = [[HANG]]
        for number in range(2):
            it.submit(str(number))
        caller = it.submit("one too many")
        assert caller.end() is None
        assert caller.reason == "overloaded"
        assert caller.error == "2 requests are in flight already; try again later"
        until(lambda: len(it.models.calls) == 2)
        it.failsafe.cancel("0")
        it.models.scripts["decoder"] = [[Last()]]
        assert end(it.submit("again").end()) == ("decoder", "")
        it.failsafe.cancel("1")
