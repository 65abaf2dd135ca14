"""When the fallback answers and when it does not, with scripted replicas."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import msgspec
import pytest

from helpers.scripted_replicas import WELL, ScriptedClient, error, generate, has_begun, named, run, until
from tidewright.resilience.deadline import Deadline
from tidewright.resilience.degradation import Route
from tidewright.resilience.errors import ModelError
from tidewright.resilience.outcome import Outcome
from tidewright.schema import AdapterStatus, SamplingParams
from tidewright_gateway.replicas.failover import Failover, Generation


def test_a_fallback_asked_first_is_one_then_another_then_the_decoder(client: type[ScriptedClient]) -> None:
    failed = error(Outcome.OVERLOADED)
    client.scripts = {"b:1/fallback": [[failed], [failed]], "a:1/fallback": [[4, 5], [failed]], "a:1": [[6]]}

    async def body(failover: Failover) -> None:
        text, generation = await generate(failover, fall_back=True)
        assert (text, generation.model) == ("<4><5>", "fallback")
        assert sorted(generation.served_by) == ["a:1", "b:1"]
        client.status["b:1"] = error(Outcome.UNAVAILABLE)
        await until(lambda: not named(failover, "b:1").takes_requests)
        text, generation = await generate(failover, fall_back=True)
        assert (text, generation.model, generation.served_by[-1]) == ("<6>", "decoder", "a:1")
        assert sum(replica.breaker.snapshot(0).window_calls for replica in failover.replicas) <= 1

    run(body)
    assert [request.resume_ids for _, request in client.requests] == [[]] * len(client.requests)


@pytest.mark.parametrize(("script", "outcome"), [([7], None), ([7, error(Outcome.UNAVAILABLE)], Outcome.UNAVAILABLE)])
def test_a_stream_of_the_fallback_that_has_begun_does_not_go_on_elsewhere(
    client: type[ScriptedClient], script: list[int | ModelError | None], outcome: Outcome | None
) -> None:
    client.scripts = {f"{name}/fallback": [script] for name in ("a:1", "b:1")}
    if outcome is None:
        assert run(lambda failover: generate(failover, fall_back=True))[0] == "<7>"
    else:
        with pytest.raises(ModelError) as caught:
            run(lambda failover: generate(failover, fall_back=True))
        assert caught.value.outcome is outcome
    assert len(client.requests) == 1


def test_no_more_than_two_fallbacks_are_asked(client: type[ScriptedClient]) -> None:
    client.scripts = {f"{name}:1/fallback": [[error(Outcome.OVERLOADED)]] for name in "abc"}
    client.scripts["a:1"] = [[error(Outcome.INVALID)]]
    client.status = {name: error(Outcome.UNAVAILABLE) for name in ("b:1", "c:1")}
    with pytest.raises(ModelError, match="scripted") as caught:
        run(lambda failover: generate(failover, fall_back=True), replicas="a:1,b:1,c:1")
    assert caught.value.outcome is Outcome.INVALID
    assert len(client.requests) == 3


def test_what_the_fallback_can_t_do_the_decoder_is_asked(client: type[ScriptedClient]) -> None:
    client.scripts = {f"{name}/fallback": [[error(Outcome.INVALID)]] for name in ("a:1", "b:1")}
    client.scripts |= {"a:1": [[9]], "b:1": [[9]]}
    text, generation = run(lambda failover: generate(failover, fall_back=True))
    assert (text, generation.model, len(client.requests)) == ("<9>", "decoder", 2)


@pytest.mark.parametrize("outcome", [Outcome.UNAVAILABLE, Outcome.STUB_DIED, Outcome.ENGINE_KILLED])
@pytest.mark.parametrize("begun", [False, True])
def test_the_fallback_goes_on_where_the_only_decoder_is_gone(
    client: type[ScriptedClient], outcome: Outcome, begun: bool
) -> None:
    client.scripts = {"b:1": [[7, 8, error(outcome)] if begun else [error(outcome)]] * 3, "b:1/fallback": [[4, 5]]}

    async def body(failover: Failover) -> tuple[str, Generation]:
        asking = asyncio.ensure_future(generate(failover))
        await has_begun(client)
        client.status["b:1"] = error(Outcome.STUB_DIED)
        return await asking

    text, generation = run(body, replicas="b:1", patience=0.1)
    assert text.endswith("<4><5>")
    assert generation.model == "fallback"
    assert client.requests[-1][1].resume_ids == generation.delivered[:-2]


@pytest.mark.parametrize("wait", [0, 600])
def test_the_fallback_answers_where_no_decoder_is_there(client: type[ScriptedClient], wait: float) -> None:
    client.scripts = {"b:1/fallback": [[4, 5]]}
    client.status["b:1"] = error(Outcome.UNAVAILABLE)
    text, generation = run(generate, replicas="b:1", patience=0.05, wait_for_replica=wait)
    assert (text, generation.model) == ("<4><5>", "fallback")


def test_the_fallback_never_answers_for_an_adapter(client: type[ScriptedClient]) -> None:
    client.scripts = {"b:1": [[error(Outcome.ENGINE_KILLED)]], "b:1/fallback": [[4]]}
    client.status["b:1"] = msgspec.structs.replace(WELL, adapters=[AdapterStatus("sql", "p", True)])

    async def body(failover: Failover) -> None:
        generation = Generation("r", [1], SamplingParams(lora_name="sql"), Deadline())
        async with aclosing(failover.generate(generation, Route.FALLBACK)) as replies:  # as under load
            async for _ in replies:
                pass

    with pytest.raises(ModelError, match="scripted"):
        run(body, replicas="b:1")
    assert [address for address, _ in client.requests] == ["b:1"]


def test_what_the_fallback_could_not_go_on_with_ends(client: type[ScriptedClient]) -> None:
    client.scripts = {"b:1": [[7, error(Outcome.ENGINE_KILLED)]], "b:1/fallback": [[4]]}

    async def body(failover: Failover) -> None:
        sampling = SamplingParams(guided_regex="a+")
        async with aclosing(failover.generate(Generation("r", [1], sampling, Deadline()))) as replies:
            async for _ in replies:
                pass

    with pytest.raises(ModelError) as caught:
        run(body, replicas="b:1")
    assert caught.value.outcome is Outcome.ENGINE_KILLED


def test_a_fallback_with_other_token_ids_is_not_asked(client: type[ScriptedClient]) -> None:
    client.scripts = {"b:1": [[error(Outcome.ENGINE_KILLED)]], "b:1/fallback": [[4]]}
    client.status["b:1/fallback"] = msgspec.structs.replace(WELL, tokenizer="another")
    with pytest.raises(ModelError, match="scripted"):
        run(generate, replicas="b:1")


def test_the_fallback_answers_where_the_decoder_is_silent(client: type[ScriptedClient]) -> None:
    client.scripts = {"b:1/fallback": [[4, None]]}

    async def body(failover: Failover) -> None:
        client.status["b:1"] = msgspec.structs.replace(WELL, silence=3.0)
        await until(lambda: failover.trouble)
        asking = asyncio.ensure_future(generate(failover, fall_back=True))
        await until(lambda: failover.load().in_flight)
        await asyncio.sleep(0.1)  # several answers that say that the engine is silent
        assert not asking.done()
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        assert named(failover, "b:1").in_flight == 0

    run(body, replicas="b:1")
