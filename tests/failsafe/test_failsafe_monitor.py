"""failsafe/failsafe.py between scripted models: late first tokens, stalls, and models whose trouble becomes known."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from helpers.two_models import (
    FIRST_TOKEN_TIMEOUT,
    HANG,
    PATIENCE,
    RESTARTING,
    SILENT,
    STALL_TIMEOUT,
    STUB_DIED,
    UNLOADED,
    WELL,
    Gate,
    Last,
    end,
    until,
    world,
)


def test_a_first_token_that_does_not_come() -> None:
    with world() as it:
        gate = Gate()
        it.models.scripts["decoder"] = [[[], gate, HANG]]
        caller = it.submit()
        assert gate.reached.wait(PATIENCE)
        gate.open()
        it.look()
        assert not it.models.of("fallback")
        it.passes(FIRST_TOKEN_TIMEOUT)
        assert end(caller.end()) == ("fallback", "first_token_timeout")
        assert it.sample("outcomes_total", "first_token_timeout") == 1


def test_in_a_queue_the_first_token_is_late_for_the_load() -> None:
    with world() as it:
        it.says(msgspec.structs.replace(WELL, waiting=0.01))
        it.models.scripts["decoder"] = [[HANG]]
        caller = it.submit()
        it.passes(FIRST_TOKEN_TIMEOUT)
        assert end(caller.end()) == ("fallback", "overloaded")
        assert it.sample("outcomes_total", "overloaded") == 1


def test_a_stream_that_stalls_goes_on_elsewhere_and_is_cancelled() -> None:
    with world() as it:
        gate = Gate()
        it.models.scripts = {"decoder": [[[1], gate, [2], Last([3])]], "fallback": [[Last([4])]]}
        caller = it.submit()
        assert gate.reached.wait(PATIENCE)
        it.look()
        assert not it.models.of("fallback")
        it.passes(STALL_TIMEOUT)
        assert end(caller.end()) == ("fallback", "stalled")
        decoder, fallback = it.models.calls
        assert fallback.order.resume_ids == [1]
        until(lambda: it.models.cancels)
        assert it.models.cancels == [("decoder", decoder.order.request_id)]
        gate.open()
        assert decoder.over.wait(PATIENCE)
        assert caller.token_ids == [1, 4]
        assert it.sample("requests_served_total", "decoder") == 0


def test_what_was_abandoned_may_break_as_it_likes() -> None:
    def breaks() -> None:
        raise ValueError("a mistake")

    with world() as it:
        gate, other = Gate(), Gate()
        it.models.scripts = {"decoder": [[[1], gate, [9], breaks]], "fallback": [[[2], other, Last([3])]]}
        caller = it.submit()
        caller.has(1)
        it.passes(STALL_TIMEOUT)
        caller.has(1, 2)
        gate.open()
        assert it.models.of("decoder")[0].over.wait(PATIENCE)
        it.look()
        other.open()
        assert end(caller.end()) == ("fallback", "stalled")
        assert caller.token_ids == [1, 2, 3]


def test_a_mistake_ends_the_request_unless_it_has_ended() -> None:
    def breaks() -> None:
        raise ValueError("a mistake")

    with world() as it:
        it.models.scripts["decoder"] = [[[1], breaks], [Last([1]), breaks]]
        caller = it.submit()
        assert caller.end() is None
        assert (caller.error, caller.reason) == ("internal error; see the server's log", "engine_failed")
        assert end(it.submit().end()) == ("decoder", "")
        it.models.release()
        it.look()


@pytest.mark.parametrize("answer", [SILENT, STUB_DIED])
def test_a_trouble_that_gets_known_moves_who_is_there(answer: Any) -> None:
    with world() as it:
        it.models.scripts = {"decoder": [[[1], HANG], [HANG]], "fallback": [[Last([2])]]}
        streams, waits = it.submit(), it.submit(streams=False)
        streams.has(1)
        until(lambda: len(it.models.of("decoder")) == 2)
        it.says(answer)
        label = "stalled" if answer is SILENT else "stub_died"
        assert [end(caller.end()) for caller in (streams, waits)] == [("fallback", label)] * 2
        assert streams.token_ids == [1, 2]
        it.look()
        # Whom nobody answers, nobody asks to cancel.
        until(lambda: len(it.models.cancels) == (2 if answer is SILENT else 0))


def test_a_decoder_that_starts_again_keeps_the_streams_that_it_has() -> None:
    with world(failsafe_patience=0.5) as it:
        it.models.scripts["decoder"] = [[[1], HANG], [HANG], [HANG]]
        keeps = it.submit("stays")
        keeps.has(1)
        moves = it.submit()
        it.says(RESTARTING)
        it.passes(5)
        assert end(moves.end()) == ("fallback", "unavailable")
        it.look()
        assert not keeps.ends
        it.passes(STALL_TIMEOUT)
        assert end(keeps.end()) == ("fallback", "unavailable")


def test_an_unloaded_decoder_ends_what_it_has() -> None:
    with world() as it:
        gate = Gate()
        it.models.scripts["decoder"] = [[[1], gate, Last([2])]]
        caller = it.submit()
        caller.has(1)
        it.says(UNLOADED)
        gate.open()
        assert end(caller.end()) == ("decoder", "")


def test_without_a_fallback_nobody_leaves_a_decoder_that_has_the_request() -> None:
    with world(fallback="") as it:
        gate = Gate()
        it.models.scripts["decoder"] = [[[1], gate, Last([2])]]
        caller = it.submit()
        caller.has(1)
        it.says(SILENT)
        it.passes(1000)
        it.look()
        gate.open()
        assert end(caller.end()) == ("decoder", "")


def test_a_fallback_whose_stub_died_has_lost_its_requests() -> None:
    with world() as it:
        it.models.scripts = {"decoder": [[UNLOADED], [Last([2])]], "fallback": [[[1], HANG]]}
        caller = it.submit()
        caller.has(1)
        it.says(fallback="Stub process 'fallback_0_0' is not healthy.")
        assert end(caller.end()) == ("decoder", "")
        assert caller.token_ids == [1, 2]
        assert it.models.of("decoder")[1].order.resume_ids == [1]


def test_a_fallback_that_takes_nothing_new_ends_what_it_has() -> None:
    with world() as it:
        gate = Gate()
        it.models.scripts = {"decoder": [[UNLOADED]], "fallback": [[[1], gate, Last([2])]]}
        caller = it.submit()
        caller.has(1)
        it.says(fallback="draining: no new requests are taken")
        gate.open()
        assert end(caller.end()) == ("fallback", "unavailable")
