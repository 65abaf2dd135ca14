"""Who is asked next when a replica fails, with scripted replicas: what real Tritons would need minutes or luck for."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

import msgspec
import pytest

from tidewright.failsafe.models import ModelError
from tidewright.resilience.breaker import State
from tidewright.resilience.deadline import Deadline
from tidewright.resilience.outcome import Outcome
from tidewright.schema import DecoderStatus, SamplingParams
from tidewright_gateway import replica as replica_module
from tidewright_gateway.cluster import Cluster, Task
from tidewright_gateway.config import GatewaySettings
from tidewright_gateway.metrics import Metrics
from tidewright_gateway.triton import Order, Reply

WELL = DecoderStatus(trouble="", draining=False, silence=0.0, waiting=0.0, wait=0.0, kv_usage=0.0, max_model_len=99)
Script = list[int | ModelError | None]  # token ids, then how it ends; None: nothing comes any more


class ScriptedGeneration:
    def __init__(self, script: Script) -> None:
        self._script = script
        self._abandoned: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.closed = False

    def abandon(self, error: ModelError) -> None:
        if not self._abandoned.done():
            self._abandoned.set_exception(error)

    async def replies(self) -> AsyncGenerator[Reply, None]:
        try:
            for number, step in enumerate(self._script):
                await asyncio.sleep(0)
                if isinstance(step, ModelError):
                    raise step
                if step is None:
                    await self._abandoned
                else:
                    is_last = number == len(self._script) - 1
                    yield Reply(f"<{step}>", [step], "stop" if is_last else None, None)
        finally:
            self.closed = True


class ScriptedClient:
    """Each generation follows the next script of its address."""

    scripts: dict[str, list[Script]]
    orders: list[tuple[str, Order]]
    status: dict[str, DecoderStatus | ModelError]

    def __init__(self, address: str, channels: int) -> None:
        self._address = address

    async def close(self) -> None:
        pass

    def generate(self, model: str, order: Order) -> ScriptedGeneration:
        self.orders.append((self._address, order))
        return ScriptedGeneration(self.scripts[self._address].pop(0))

    async def control(self, word: str, timeout: float) -> str:
        status = self.status.get(self._address, WELL)
        if isinstance(status, ModelError):
            raise status
        return msgspec.json.encode(status).decode()


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> type[ScriptedClient]:
    ScriptedClient.scripts, ScriptedClient.orders, ScriptedClient.status = {}, [], {}
    monkeypatch.setattr(replica_module, "TritonClient", ScriptedClient)
    return ScriptedClient


def run(body: Callable[[Cluster], Any], **options: Any) -> Any:
    async def main() -> Any:
        settings = GatewaySettings(
            **{
                "replicas": "a:1,b:1",
                "routing": "round_robin",
                "probe_interval": 0.02,
                "retry_base_delay": 0.01,
                **options,
            }
        )
        cluster = Cluster(settings, Metrics(), 99)
        await cluster.start()
        try:
            return await body(cluster)
        finally:
            await cluster.stop()

    return asyncio.run(main())


async def generate(cluster: Cluster, deadline: Deadline = Deadline()) -> tuple[str, Task]:  # noqa: B008 - frozen
    task = Task("r", [1, 2], SamplingParams(seed=3), deadline)
    text = ""
    async with aclosing(cluster.generate(task)) as replies:
        async for reply in replies:
            text += reply.text
    return text, task


def error(outcome: Outcome) -> ModelError:
    return ModelError("scripted", outcome)


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
    async def ask_often(cluster: Cluster) -> int:
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


def test_streams_leave_a_replica_whose_engine_gives_no_sign_of_life(client: type[ScriptedClient]) -> None:
    client.scripts = {"b:1": [[7, None]], "a:1": [[8]]}

    async def body(cluster: Cluster) -> tuple[str, Task]:
        asking = asyncio.ensure_future(generate(cluster))
        await asyncio.sleep(0.1)
        client.status["b:1"] = msgspec.structs.replace(WELL, silence=3.0)
        got = await asking
        assert [replica.takes_requests for replica in cluster.replicas] == [True, False]
        return got

    text, task = run(body)
    assert (text, task.served_by) == ("<7><8>", ["b:1", "a:1"])


def test_one_whose_engine_restarts_keeps_its_streams_and_gets_nothing_new(client: type[ScriptedClient]) -> None:
    client.scripts = {"b:1": [[7, None]], "a:1": [[8], [8]]}

    async def body(cluster: Cluster) -> None:
        asking = asyncio.ensure_future(generate(cluster))
        await asyncio.sleep(0.1)
        client.status["b:1"] = msgspec.structs.replace(WELL, trouble="the engine is not available")
        await asyncio.sleep(0.1)
        for _ in range(2):
            assert (await generate(cluster))[1].served_by == ["a:1"]
        assert not asking.done()
        asking.cancel()

    run(body)


def test_all_that_fail_are_used_all_the_same(client: type[ScriptedClient]) -> None:
    client.scripts = {name: [[error(Outcome.ENGINE_FAILED)]] * 5 + [[6]] for name in ("a:1", "b:1")}

    async def body(cluster: Cluster) -> str:
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

    async def body(cluster: Cluster) -> None:
        assert cluster.trouble == "a:1: scripted; b:1: scripted"
        with pytest.raises(ModelError, match="no replica can take requests"):
            await generate(cluster, Deadline(time.monotonic() + 0.1))

    run(body, wait_for_replica=600)
    assert client.orders == []


def test_a_client_that_leaves_counts_against_nobody_and_leaves_nothing(client: type[ScriptedClient]) -> None:
    client.scripts = {"b:1": [[7, None]] * 20}

    async def body(cluster: Cluster) -> None:
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

    async def body(cluster: Cluster) -> int:
        return cluster.max_model_len

    assert run(body) == 50
