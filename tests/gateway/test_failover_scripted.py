"""Who is asked next when a replica fails, with scripted replicas: what real Tritons would need minutes or luck for."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing

import msgspec
import pytest

from helpers.scripted_replicas import WELL, ScriptedClient, error, generate, has_begun, named, run, until
from tidewright.resilience.breaker import State
from tidewright.resilience.deadline import Deadline
from tidewright.resilience.errors import ModelError
from tidewright.resilience.outcome import Outcome
from tidewright.schema import AdapterStatus, SamplingParams
from tidewright_gateway.openai.errors import of_model
from tidewright_gateway.replicas.failover import Failover, Generation


@pytest.mark.parametrize("outcome", [Outcome.UNAVAILABLE, Outcome.STUB_DIED, Outcome.ENGINE_FAILED, Outcome.OVERLOADED])
def test_another_replica_goes_on_behind_what_was_handed_on(client: type[ScriptedClient], outcome: Outcome) -> None:
    client.scripts = {"b:1": [[7, 8, error(outcome)]], "a:1": [[9, 10]]}
    text, generation = run(generate)
    assert text == "<7><8><9><10>"
    assert generation.served_by == ["b:1", "a:1"]
    assert [request.resume_ids for _, request in client.requests] == [[], [7, 8]]
    assert len({request.sampling for _, request in client.requests}) == 1


@pytest.mark.parametrize("outcome", [Outcome.INVALID, Outcome.REQUEST_TIMEOUT])
def test_what_is_the_request_s_own_doing_is_not_tried_again(client: type[ScriptedClient], outcome: Outcome) -> None:
    client.scripts = {"b:1": [[error(outcome)]]}
    with pytest.raises(ModelError) as caught:
        run(generate)
    assert caught.value.outcome is outcome
    assert len(client.requests) == 1


def test_attempts_without_a_token_come_to_an_end(client: type[ScriptedClient]) -> None:
    client.scripts = {name: [[error(Outcome.UNAVAILABLE)] for _ in range(9)] for name in ("a:1", "b:1")}
    with pytest.raises(ModelError, match="scripted"):
        run(generate, retry_max_attempts=3)
    assert len(client.requests) == 3


def test_retries_of_what_still_computes_are_paid_for_and_moves_are_not(client: type[ScriptedClient]) -> None:
    async def ask_often(failover: Failover) -> int:
        failed = 0
        for _ in range(20):
            try:
                await generate(failover)
            except ModelError:
                failed += 1
        return failed

    options = {"retry_budget_burst": 5, "retry_budget_floor": 0, "retry_budget_share": 0.01, "breaker_failure_rate": 1}
    client.scripts = {"b:1": [[error(Outcome.OVERLOADED)]] * 20, "a:1": [[5]] * 20}
    overloaded = run(ask_often, **options)
    assert overloaded == sum(1 for address, _ in client.requests if address == "b:1") - 5
    client.scripts = {"b:1": [[error(Outcome.UNAVAILABLE)]] * 20, "a:1": [[5]] * 20}
    assert run(ask_often, **options, breaker_consecutive_failures=100) == 0


FULL = "3 requests wait, so that its first token is expected in 6.2 s, but ttft_target is 2 s; try again in 5 s"


def test_a_replica_that_has_no_room_is_not_asked_again_but_another_is(client: type[ScriptedClient]) -> None:
    full = [ModelError(f"{FULL} [overloaded]")]
    client.scripts = {"b:1": [full], "a:1": [[5]]}
    _, generation = run(generate, breaker_consecutive_failures=1)
    assert generation.served_by == ["b:1", "a:1"]
    client.requests.clear()
    client.scripts = {"a:1": [full] * 2}
    with pytest.raises(ModelError) as caught:
        run(generate, replicas="a:1", retry_max_attempts=5)
    assert len(client.requests) == 1
    error = of_model(caught.value)
    assert (error.status, error.code, error.headers["Retry-After"]) == (503, "overloaded", "5")


def test_a_stream_that_stalls_and_one_that_never_begins_go_on_elsewhere(client: type[ScriptedClient]) -> None:
    client.scripts = {"b:1": [[7, None]], "a:1": [[8]]}
    text, generation = run(generate, stall_timeout=0.2)
    assert (text, generation.served_by) == ("<7><8>", ["b:1", "a:1"])
    client.scripts, client.requests = {"b:1": [[None]], "a:1": [[8]]}, []
    text, generation = run(generate, first_token_timeout=0.2)
    assert (text, generation.served_by) == ("<8>", ["b:1", "a:1"])


def test_replicas_of_an_older_version_are_not_asked_for_what_they_do_not_know(client: type[ScriptedClient]) -> None:
    for tells_details in (False, True):
        client.scripts, client.requests = {"b:1": [[8]]}, []
        client.status = {"b:1": msgspec.structs.replace(WELL, tells_details=tells_details)}
        run(generate)
        assert [request.details for _, request in client.requests] == [tells_details]
    for knows in (False, True):
        client.scripts, client.requests = {"b:1": [[8]]}, []
        client.status = {"b:1": msgspec.structs.replace(WELL, knows_tenants=knows)}
        run(lambda failover: generate(failover, tenant="alice", tenant_weight=3))
        (request,) = [request for _, request in client.requests]
        assert (b"tenant" in request.sampling) == knows
        client.scripts, client.requests = {"b:1": [[8]]}, []
        client.status = {"b:1": msgspec.structs.replace(WELL, knows_targets=knows)}
        run(lambda failover: generate(failover, ttft_target=1.0, tpot_target=0.1))
        (request,) = [request for _, request in client.requests]
        assert (b"ttft_target" in request.sampling, b"tpot_target" in request.sampling) == (knows, knows)


def test_streams_leave_a_replica_whose_engine_gives_no_sign_of_life(client: type[ScriptedClient]) -> None:
    client.scripts = {"b:1": [[7, None]], "a:1": [[8]]}

    async def body(failover: Failover) -> tuple[str, Generation]:
        asking = asyncio.ensure_future(generate(failover))
        await has_begun(client)
        client.status["b:1"] = msgspec.structs.replace(WELL, silence=3.0)
        got = await asking
        assert [replica.takes_requests for replica in failover.replicas] == [False, True]
        return got

    text, generation = run(body)
    assert (text, generation.served_by) == ("<7><8>", ["b:1", "a:1"])


def test_one_whose_engine_restarts_keeps_its_streams_and_gets_nothing_new(client: type[ScriptedClient]) -> None:
    client.scripts = {"b:1": [[7, None]], "a:1": [[8], [8]]}

    async def body(failover: Failover) -> None:
        asking = asyncio.ensure_future(generate(failover))
        await has_begun(client)
        client.status["b:1"] = msgspec.structs.replace(WELL, trouble="the engine is not available")
        await until(lambda: not named(failover, "b:1").takes_requests)
        for _ in range(2):
            assert (await generate(failover))[1].served_by == ["a:1"]
        assert not asking.done()
        asking.cancel()

    run(body)


def test_a_model_that_is_being_unloaded_ends_its_streams_itself(client: type[ScriptedClient]) -> None:
    """Triton answers status requests with an error then; those that get no more tokens move on."""
    unloading = ModelError("unknown model: 'decoder' has no available versions", Outcome.UNAVAILABLE)

    async def begin(failover: Failover) -> asyncio.Future[tuple[str, Generation]]:
        asking = asyncio.ensure_future(generate(failover))
        await has_begun(client)
        client.status["b:1"] = unloading
        await until(lambda: not named(failover, "b:1").takes_requests)
        return asking

    async def stays(failover: Failover) -> None:
        asking = await begin(failover)
        await asyncio.sleep(0.2)
        assert named(failover, "b:1").attempts
        asking.cancel()

    async def moves(failover: Failover) -> tuple[str, Generation]:
        return await (await begin(failover))

    for body, options in (
        (stays, {"patience": 60}),
        (stays, {"patience": 0.05, "stall_timeout": 0.05, "replicas": "b:1"}),  # there is nowhere else to go
        (moves, {"patience": 0.1}),
    ):
        client.scripts, client.status, client.requests = {"b:1": [[7, None]], "a:1": [[8]]}, {}, []
        got = run(body, **options)
    text, generation = got
    assert (text, generation.served_by) == ("<7><8>", ["b:1", "a:1"])


def test_a_stream_of_a_model_that_was_loaded_again_meanwhile_does_not_hang(client: type[ScriptedClient]) -> None:
    client.scripts = {"b:1": [[7, None], [8]]}

    async def body(failover: Failover) -> str:
        asking = asyncio.ensure_future(generate(failover))
        await has_begun(client)
        client.status["b:1"] = ModelError("unknown model", Outcome.UNAVAILABLE)
        await until(lambda: not named(failover, "b:1").takes_requests)
        client.status["b:1"] = WELL
        return (await asyncio.wait_for(asking, 20))[0]

    assert run(body, replicas="b:1", stall_timeout=0.3) == "<7><8>"


def test_all_that_fail_are_used_all_the_same(client: type[ScriptedClient]) -> None:
    client.scripts = {name: [[error(Outcome.ENGINE_FAILED)]] * 5 + [[6]] for name in ("a:1", "b:1")}

    async def body(failover: Failover) -> str:
        for _ in range(10):
            with pytest.raises(ModelError):
                await generate(failover)
        assert [replica.breaker.state for replica in failover.replicas] == [State.OPEN, State.OPEN]
        return (await generate(failover))[0]

    assert run(body, retry_max_attempts=1, breaker_cool_down=30, wait_for_replica=0) == "<6>"


def test_the_one_that_failed_is_not_asked_again_though_it_has_the_least_load(client: type[ScriptedClient]) -> None:
    client.status["a:1"] = msgspec.structs.replace(WELL, kv_usage=0.9)
    client.scripts = {"b:1": [[7, error(Outcome.UNAVAILABLE)]], "a:1": [[8]]}
    text, generation = run(generate, routing="least_load")
    assert (text, generation.served_by) == ("<7><8>", ["b:1", "a:1"])


def test_nobody_waits_beyond_its_deadline_for_a_replica(client: type[ScriptedClient]) -> None:
    client.status = {name: error(Outcome.UNAVAILABLE) for name in ("a:1", "b:1")}

    async def body(failover: Failover) -> None:
        assert failover.trouble == "b:1: scripted; a:1: scripted"
        with pytest.raises(ModelError, match="no replica can take requests") as caught:
            await generate(failover, Deadline(time.monotonic() + 0.1))
        assert caught.value.outcome is Outcome.REQUEST_TIMEOUT

    run(body, wait_for_replica=600)
    assert client.requests == []


def test_who_waits_in_vain_but_in_time_is_told_that_nobody_is_there(client: type[ScriptedClient]) -> None:
    client.status = {name: error(Outcome.UNAVAILABLE) for name in ("a:1", "b:1")}
    with pytest.raises(ModelError) as caught:
        run(lambda failover: generate(failover, Deadline(time.monotonic() + 60)), wait_for_replica=0.05)
    assert caught.value.outcome is Outcome.UNAVAILABLE


def test_a_deadline_that_passes_at_a_replica_that_fails_is_a_timeout(client: type[ScriptedClient]) -> None:
    client.scripts = {"b:1": [[7, None]], "a:1": []}
    with pytest.raises(ModelError, match="no further token") as caught:
        run(lambda failover: generate(failover, Deadline(time.monotonic() + 0.1)), stall_timeout=0.3)
    assert caught.value.outcome is Outcome.REQUEST_TIMEOUT


def test_a_client_that_leaves_counts_against_nobody_and_leaves_nothing(client: type[ScriptedClient]) -> None:
    client.scripts = {"b:1": [[7, None]] * 20}

    async def body(failover: Failover) -> None:
        for _ in range(6):
            asking = asyncio.ensure_future(generate(failover))
            await asyncio.sleep(0.01)
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking
        (replica,) = failover.replicas
        assert (replica.attempts, replica.breaker.state) == (set(), State.CLOSED)

    run(body, replicas="b:1")


def test_its_status_says_how_long_a_sequence_can_be(client: type[ScriptedClient]) -> None:
    client.status["b:1"] = msgspec.structs.replace(WELL, max_model_len=50)

    async def body(failover: Failover) -> int:
        return failover.max_model_len

    assert run(body) == 50


def test_what_needs_an_adapter_goes_where_it_is_and_waits_for_it(client: type[ScriptedClient]) -> None:
    client.scripts = {"b:1": [], "a:1": [[7, error(Outcome.UNAVAILABLE)], [8, 9]]}
    client.status["a:1"] = msgspec.structs.replace(WELL, adapters=[AdapterStatus("sql", "p", True)])
    client.status["b:1"] = msgspec.structs.replace(WELL, adapters=[AdapterStatus("sql", "p", False)])

    async def body(failover: Failover) -> list[int]:
        generation = Generation("r", [1], SamplingParams(lora_name="sql"), Deadline())
        async with aclosing(failover.generate(generation)) as replies:
            return [token_id async for reply in replies for token_id in reply.token_ids]

    assert run(body) == [7, 8, 9]  # after a:1 is found well again


def test_a_replica_that_lost_an_adapter_is_left_and_an_adapter_that_is_gone_ends_the_request(
    client: type[ScriptedClient],
) -> None:
    gone = ModelError("no adapter 'sql' is loaded (loaded: none) [invalid]")
    client.scripts = {"b:1": [[gone]], "a:1": [[8, 9]]}
    for name in ("a:1", "b:1"):
        client.status[name] = msgspec.structs.replace(WELL, adapters=[AdapterStatus("sql", "p", True)])

    async def ask(failover: Failover) -> list[int]:
        generation = Generation("r", [1], SamplingParams(lora_name="sql"), Deadline())
        async with aclosing(failover.generate(generation)) as replies:
            return [token_id async for reply in replies for token_id in reply.token_ids]

    async def body(failover: Failover) -> None:
        assert await ask(failover) == [8, 9]
        assert named(failover, "b:1").takes_requests  # of others
        client.scripts = {name: [[gone]] for name in ("a:1", "b:1")}
        for name in ("a:1", "b:1"):  # unloaded through another gateway
            client.status[name] = msgspec.structs.replace(WELL, adapters=[AdapterStatus("sql", "p", False, 5.0)])
        with pytest.raises(ModelError) as caught:
            await ask(failover)
        assert caught.value.outcome is Outcome.INVALID
        with pytest.raises(ModelError, match="'sql' was unloaded"):  # as one that was queued meanwhile
            await ask(failover)

    run(body, probe_interval=60)


def test_a_replica_of_another_model_gets_nothing(client: type[ScriptedClient]) -> None:
    client.scripts = {"a:1": [[7]] * 3}
    client.status["b:1"] = msgspec.structs.replace(WELL, model="llama")

    async def body(failover: Failover) -> None:
        for _ in range(3):
            assert (await generate(failover))[1].served_by == ["a:1"]
        assert named(failover, "b:1").why_not == "serves llama, not m"
        client.status["b:1"] = msgspec.structs.replace(WELL, model="m", tokenizer="of others")
        await until(lambda: "another tokenizer" in named(failover, "b:1").why_not)
        client.status["b:1"] = msgspec.structs.replace(WELL, model="m", tokenizer="t")
        await until(lambda: named(failover, "b:1").takes_requests)

    run(body)


def test_nobody_is_taken_from_the_only_replica_for_being_slow(client: type[ScriptedClient]) -> None:
    client.scripts = {"b:1": [[None]]}

    async def body(failover: Failover) -> None:
        asking = asyncio.ensure_future(generate(failover))
        await asyncio.sleep(0.5)  # five times what is set below
        assert not asking.done()
        assert not client.requests[1:]
        asking.cancel()

    run(body, replicas="b:1", first_token_timeout=0.1, patience=0.1)


def test_the_only_replica_that_is_silent_keeps_its_streams_until_they_stall(client: type[ScriptedClient]) -> None:
    client.scripts = {"b:1": [[7, None], [8]]}

    async def body(failover: Failover) -> str:
        asking, began = asyncio.ensure_future(generate(failover)), time.monotonic()
        await has_begun(client)
        client.status["b:1"] = msgspec.structs.replace(WELL, silence=3600.0)
        replica = named(failover, "b:1")
        await until(lambda: replica.is_silent and not replica.attempts)
        assert time.monotonic() - began >= 1.0
        client.status["b:1"] = WELL
        return (await asking)[0]

    assert run(body, replicas="b:1", patience=0.05, stall_timeout=1.0) == "<7><8>"


def test_the_last_attempt_is_not_given_up_for_a_short_silence(client: type[ScriptedClient]) -> None:
    """Replicas that are silent by turns, as on a machine that is short of CPU, lose nothing."""
    client.scripts = {"b:1": [[None], [None]], "a:1": [[None]]}

    async def body(failover: Failover) -> None:
        asking = asyncio.ensure_future(generate(failover))
        for number, address in enumerate(("b:1", "a:1", "b:1"), 1):
            await until(lambda number=number: len(client.requests) == number)
            client.status = {address: msgspec.structs.replace(WELL, silence=3600.0)}
            await until(lambda address=address: named(failover, address).is_silent)
        await asyncio.sleep(0.5)  # ten times the patience
        assert not asking.done()
        assert named(failover, "b:1").attempts
        asking.cancel()

    run(body, patience=0.05, retry_max_attempts=3)


def test_a_client_that_reads_slowly_counts_against_nobody(client: type[ScriptedClient]) -> None:
    client.scripts = {name: [[1, 2, 3]] * 9 for name in ("a:1", "b:1")}

    async def body(failover: Failover) -> None:
        generation = Generation("r", [1], SamplingParams(), Deadline())
        async with aclosing(failover.generate(generation)) as replies:
            async for _ in replies:
                await asyncio.sleep(0.3)  # three times what a replica may take
        assert len(generation.served_by) == 1
        assert [replica.breaker.snapshot(0).window_failures for replica in failover.replicas] == [0, 0]

    run(body, stall_timeout=0.1, patience=0.1)


@pytest.mark.parametrize("routing", ["round_robin", "least_load", "prefix"])
def test_equal_replicas_get_equal_shares_of_an_even_load(client: type[ScriptedClient], routing: str) -> None:
    """Within 5 %: 16 at a time, of 1 to 6 tokens each."""
    addresses = ["a:1", "b:1", "c:1"]
    client.scripts = {address: [[1] * (1 + number % 6) for number in range(600)] for address in addresses}

    async def body(failover: Failover) -> None:
        async def one_after_the_other() -> None:
            for _ in range(45):
                await generate(failover)

        await asyncio.gather(*(one_after_the_other() for _ in range(16)))

    run(body, routing=routing, replicas=",".join(addresses), probe_interval=1)
    counts = [sum(1 for asked, _ in client.requests if asked == address) for address in addresses]
    assert sum(counts) == 720
    assert max(counts) <= 1.05 * 240
