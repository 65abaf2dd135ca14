"""Who is asked next when a replica fails, with scripted replicas: what real Tritons would need minutes or luck for."""

from __future__ import annotations

import asyncio
import time

import msgspec
import pytest

from helpers.scripted_replicas import WELL, ScriptedClient, error, generate, named, run, until
from tidewright.resilience.breaker import State
from tidewright.resilience.deadline import Deadline
from tidewright.resilience.errors import ModelError
from tidewright.resilience.outcome import Outcome
from tidewright_gateway.replicas.failover import Failover, Generation


@pytest.mark.parametrize("outcome", [Outcome.UNAVAILABLE, Outcome.STUB_DIED, Outcome.ENGINE_FAILED, Outcome.OVERLOADED])
def test_another_replica_goes_on_behind_what_was_handed_on(client: type[ScriptedClient], outcome: Outcome) -> None:
    client.scripts = {"b:1": [[7, 8, error(outcome)]], "a:1": [[9, 10]]}
    text, task = run(generate)
    assert text == "<7><8><9><10>"
    assert task.served_by == ["b:1", "a:1"]
    assert [order.resume_ids for _, order in client.orders] == [[], [7, 8]]
    assert len({order.sampling for _, order in client.orders}) == 1


@pytest.mark.parametrize("outcome", [Outcome.INVALID, Outcome.REQUEST_TIMEOUT])
def test_what_is_the_request_s_own_doing_is_not_tried_again(client: type[ScriptedClient], outcome: Outcome) -> None:
    client.scripts = {"b:1": [[error(outcome)]]}
    with pytest.raises(ModelError) as caught:
        run(generate)
    assert caught.value.outcome is outcome
    assert len(client.orders) == 1


def test_attempts_without_a_token_come_to_an_end(client: type[ScriptedClient]) -> None:
    client.scripts = {name: [[error(Outcome.UNAVAILABLE)] for _ in range(9)] for name in ("a:1", "b:1")}
    with pytest.raises(ModelError, match="scripted"):
        run(generate, retry_max_attempts=3)
    assert len(client.orders) == 3


def test_retries_of_what_still_computes_are_paid_for_and_moves_are_not(client: type[ScriptedClient]) -> None:
    async def ask_often(cluster: Failover) -> int:
        failed = 0
        for _ in range(20):
            try:
                await generate(cluster)
            except ModelError:
                failed += 1
        return failed

    options = {"retry_budget_burst": 5, "retry_budget_floor": 0, "retry_budget_share": 0.01, "breaker_failure_rate": 1}
    client.scripts = {"b:1": [[error(Outcome.OVERLOADED)]] * 20, "a:1": [[5]] * 20}
    overloaded = run(ask_often, **options)
    assert overloaded == sum(1 for address, _ in client.orders if address == "b:1") - 5
    client.scripts = {"b:1": [[error(Outcome.UNAVAILABLE)]] * 20, "a:1": [[5]] * 20}
    assert run(ask_often, **options, breaker_consecutive_failures=100) == 0


def test_a_stream_that_stalls_and_one_that_never_begins_go_on_elsewhere(client: type[ScriptedClient]) -> None:
    client.scripts = {"b:1": [[7, None]], "a:1": [[8]]}
    text, task = run(generate, stall_timeout=0.2)
    assert (text, task.served_by) == ("<7><8>", ["b:1", "a:1"])
    client.scripts, client.orders = {"b:1": [[None]], "a:1": [[8]]}, []
    text, task = run(generate, first_token_timeout=0.2)
    assert (text, task.served_by) == ("<8>", ["b:1", "a:1"])


async def has_begun(client: type[ScriptedClient]) -> None:
    """A generation was asked for, and what its script has at once has arrived."""
    await until(lambda: client.orders)
    for _ in range(50):
        await asyncio.sleep(0)


def test_streams_leave_a_replica_whose_engine_gives_no_sign_of_life(client: type[ScriptedClient]) -> None:
    client.scripts = {"b:1": [[7, None]], "a:1": [[8]]}

    async def body(cluster: Failover) -> tuple[str, Generation]:
        asking = asyncio.ensure_future(generate(cluster))
        await has_begun(client)
        client.status["b:1"] = msgspec.structs.replace(WELL, silence=3.0)
        got = await asking
        assert [replica.takes_requests for replica in cluster.replicas] == [False, True]
        return got

    text, task = run(body)
    assert (text, task.served_by) == ("<7><8>", ["b:1", "a:1"])


def test_one_whose_engine_restarts_keeps_its_streams_and_gets_nothing_new(client: type[ScriptedClient]) -> None:
    client.scripts = {"b:1": [[7, None]], "a:1": [[8], [8]]}

    async def body(cluster: Failover) -> None:
        asking = asyncio.ensure_future(generate(cluster))
        await has_begun(client)
        client.status["b:1"] = msgspec.structs.replace(WELL, trouble="the engine is not available")
        await until(lambda: not named(cluster, "b:1").takes_requests)
        for _ in range(2):
            assert (await generate(cluster))[1].served_by == ["a:1"]
        assert not asking.done()
        asking.cancel()

    run(body)


def test_all_that_fail_are_used_all_the_same(client: type[ScriptedClient]) -> None:
    client.scripts = {name: [[error(Outcome.ENGINE_FAILED)]] * 5 + [[6]] for name in ("a:1", "b:1")}

    async def body(cluster: Failover) -> str:
        for _ in range(10):
            with pytest.raises(ModelError):
                await generate(cluster)
        assert [replica.breaker.state for replica in cluster.replicas] == [State.OPEN, State.OPEN]
        return (await generate(cluster))[0]

    assert run(body, retry_max_attempts=1, breaker_cool_down=30, wait_for_replica=0) == "<6>"


def test_the_one_that_failed_is_not_asked_again_though_it_has_the_least_load(client: type[ScriptedClient]) -> None:
    client.status["a:1"] = msgspec.structs.replace(WELL, kv_usage=0.9)
    client.scripts = {"b:1": [[7, error(Outcome.UNAVAILABLE)]], "a:1": [[8]]}
    text, task = run(generate, routing="least_load")
    assert (text, task.served_by) == ("<7><8>", ["b:1", "a:1"])


def test_nobody_waits_beyond_its_deadline_for_a_replica(client: type[ScriptedClient]) -> None:
    client.status = {name: error(Outcome.UNAVAILABLE) for name in ("a:1", "b:1")}

    async def body(cluster: Failover) -> None:
        assert cluster.trouble == "b:1: scripted; a:1: scripted"
        with pytest.raises(ModelError, match="no replica can take requests") as caught:
            await generate(cluster, Deadline(time.monotonic() + 0.1))
        assert caught.value.outcome is Outcome.REQUEST_TIMEOUT

    run(body, wait_for_replica=600)
    assert client.orders == []


def test_who_waits_in_vain_but_in_time_is_told_that_nobody_is_there(client: type[ScriptedClient]) -> None:
    client.status = {name: error(Outcome.UNAVAILABLE) for name in ("a:1", "b:1")}
    with pytest.raises(ModelError) as caught:
        run(lambda cluster: generate(cluster, Deadline(time.monotonic() + 60)), wait_for_replica=0.05)
    assert caught.value.outcome is Outcome.UNAVAILABLE


def test_a_deadline_that_passes_at_a_replica_that_fails_is_a_timeout(client: type[ScriptedClient]) -> None:
    client.scripts = {"b:1": [[7, None]], "a:1": []}
    with pytest.raises(ModelError, match="no further token") as caught:
        run(lambda cluster: generate(cluster, Deadline(time.monotonic() + 0.1)), stall_timeout=0.3)
    assert caught.value.outcome is Outcome.REQUEST_TIMEOUT


def test_a_client_that_leaves_counts_against_nobody_and_leaves_nothing(client: type[ScriptedClient]) -> None:
    client.scripts = {"b:1": [[7, None]] * 20}

    async def body(cluster: Failover) -> None:
        for _ in range(6):
            asking = asyncio.ensure_future(generate(cluster))
            await asyncio.sleep(0.01)
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking
        (replica,) = cluster.replicas
        assert (replica.attempts, replica.breaker.state) == (set(), State.CLOSED)

    run(body, replicas="b:1")


def test_its_status_says_how_long_a_sequence_can_be(client: type[ScriptedClient]) -> None:
    client.status["b:1"] = msgspec.structs.replace(WELL, max_model_len=50)

    async def body(cluster: Failover) -> int:
        return cluster.max_model_len

    assert run(body) == 50


def test_the_fallback_of_one_replica_then_of_another_can_be_asked_instead(client: type[ScriptedClient]) -> None:
    failed = error(Outcome.UNAVAILABLE)
    client.scripts = {"b:1/fallback": [[failed], [failed]], "a:1/fallback": [[4, 5], [failed]]}

    async def body(cluster: Failover) -> None:
        text, task = await generate(cluster, fall_back=True)
        assert (text, task.model) == ("<4><5>", "fallback")
        assert sorted(task.served_by) == ["a:1", "b:1"]
        with pytest.raises(ModelError, match="scripted"):
            await generate(cluster, fall_back=True)
        assert [replica.breaker.snapshot(0).window_calls for replica in cluster.replicas] == [0, 0]

    run(body)
    assert [order.resume_ids for _, order in client.orders] == [[]] * len(client.orders)


@pytest.mark.parametrize(("script", "outcome"), [([7], None), ([7, error(Outcome.UNAVAILABLE)], Outcome.UNAVAILABLE)])
def test_a_stream_of_the_fallback_that_has_begun_does_not_go_on_elsewhere(
    client: type[ScriptedClient], script: list[int | ModelError | None], outcome: Outcome | None
) -> None:
    client.scripts = {f"{name}/fallback": [script] for name in ("a:1", "b:1")}
    if outcome is None:
        assert run(lambda cluster: generate(cluster, fall_back=True))[0] == "<7>"
    else:
        with pytest.raises(ModelError) as caught:
            run(lambda cluster: generate(cluster, fall_back=True))
        assert caught.value.outcome is outcome
    assert len(client.orders) == 1


def test_a_fallback_that_failed_is_not_asked_again(client: type[ScriptedClient]) -> None:
    client.scripts["b:1/fallback"] = [[error(Outcome.UNAVAILABLE)], [7]]
    with pytest.raises(ModelError, match="scripted"):
        run(lambda cluster: generate(cluster, fall_back=True), replicas="b:1")


def test_what_the_fallback_can_t_do_is_not_the_request_s_fault(client: type[ScriptedClient]) -> None:
    client.scripts = {f"{name}/fallback": [[error(Outcome.INVALID)]] for name in ("a:1", "b:1")}
    with pytest.raises(ModelError, match="the fallback can't answer") as caught:
        run(lambda cluster: generate(cluster, fall_back=True))
    assert (caught.value.outcome, len(client.orders)) == (Outcome.ENGINE_FAILED, 1)


def test_the_fallback_answers_where_the_decoder_is_silent(client: type[ScriptedClient]) -> None:
    client.scripts = {"b:1/fallback": [[4, None]]}

    async def body(cluster: Failover) -> None:
        client.status["b:1"] = msgspec.structs.replace(WELL, silence=3.0)
        await until(lambda: cluster.trouble)
        asking = asyncio.ensure_future(generate(cluster, fall_back=True))
        await until(lambda: cluster.load().in_flight)
        await asyncio.sleep(0.1)  # several answers that say that the engine is silent
        assert not asking.done()
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        assert named(cluster, "b:1").in_flight == 0

    run(body, replicas="b:1")


@pytest.mark.parametrize("routing", ["round_robin", "least_load", "prefix"])
def test_equal_replicas_get_equal_shares_of_an_even_load(client: type[ScriptedClient], routing: str) -> None:
    """Within 5 %: 16 at a time, of 1 to 6 tokens each."""
    addresses = ["a:1", "b:1", "c:1"]
    client.scripts = {address: [[1] * (1 + number % 6) for number in range(600)] for address in addresses}

    async def body(cluster: Failover) -> None:
        async def one_after_the_other() -> None:
            for _ in range(45):
                await generate(cluster)

        await asyncio.gather(*(one_after_the_other() for _ in range(16)))

    run(body, routing=routing, replicas=",".join(addresses), probe_interval=1)
    counts = [sum(1 for asked, _ in client.orders if asked == address) for address in addresses]
    assert sum(counts) == 720
    assert max(counts) <= 1.05 * 240
