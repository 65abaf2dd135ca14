"""A failover whose replicas follow scripts: what real Tritons would need minutes or luck for."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import aclosing
from typing import Any

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tidewright.resilience.deadline import Deadline
from tidewright.resilience.degradation import Route
from tidewright.resilience.errors import ModelError
from tidewright.resilience.outcome import Outcome
from tidewright.schema import DecoderStatus, SamplingParams
from tidewright_gateway.config import GatewaySettings
from tidewright_gateway.metrics import Metrics
from tidewright_gateway.replicas import replica as replica_module
from tidewright_gateway.replicas.failover import Failover, Generation
from tidewright_gateway.replicas.health import Expected
from tidewright_gateway.replicas.replica import Replica
from tidewright_gateway.replicas.triton import CallRequest, Reply

PATIENCE = 20.0  # seconds
EXPECTED = Expected("m", "t")
WELL = DecoderStatus(trouble="", draining=False, silence=0.0, waiting=0.0, wait=0.0, kv_usage=0.0, max_model_len=99)
Script = list[int | ModelError | None]  # token ids, then how it ends; None: nothing comes any more


class ScriptedCall:
    def __init__(self, script: Script) -> None:
        self._script, self._position = script, 0
        self._abandoned: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def abandon(self, error: ModelError) -> None:
        if not self._abandoned.done():
            self._abandoned.set_exception(error)

    async def read(self) -> Reply:
        await asyncio.sleep(0)
        if self._abandoned.done():
            self._abandoned.result()
        step = self._script[self._position]
        self._position += 1
        if isinstance(step, ModelError):
            raise step
        if step is None:
            await self._abandoned
            raise AssertionError("it was not abandoned")
        return Reply(f"<{step}>", [step], "stop" if self._position == len(self._script) else None, None)

    def close(self) -> None:
        if self._abandoned.done() and not self._abandoned.cancelled():
            self._abandoned.exception()  # or asyncio says that nobody asked for it


class ScriptedClient:
    """Each generation follows the next script of its address, or of `ADDRESS/fallback`; each probe the same one."""

    scripts: dict[str, list[Script]]
    probes: dict[str, Script]
    """Where it is not one token."""
    status: dict[str, DecoderStatus | ModelError | None]
    """Where it is not WELL; None: no answer."""
    requests: list[tuple[str, CallRequest]]
    probed: list[str]
    closed: list[str]

    def __init__(self, address: str, channels: int, credentials: object) -> None:
        self._address = address

    @classmethod
    def forget_all(cls) -> None:
        cls.scripts, cls.probes, cls.status, cls.requests, cls.probed, cls.closed = {}, {}, {}, [], [], []

    async def close(self) -> None:
        self.closed.append(self._address)

    def generate(self, model: str, request: CallRequest) -> ScriptedCall:
        if request.request_id.startswith("probe"):
            self.probed.append(self._address)
            return ScriptedCall(self.probes.get(self._address, [1]))
        address = self._address if model == "decoder" else f"{self._address}/{model}"
        self.requests.append((address, request))
        return ScriptedCall(self.scripts[address].pop(0))

    async def control(self, word: str, timeout: float, model: str = "decoder") -> str:
        address, began = self._address if model == "decoder" else f"{self._address}/{model}", time.monotonic()
        if model != "decoder" and address not in {**self.scripts, **self.status}:
            raise ModelError("there is no such model", Outcome.UNAVAILABLE)
        while (status := self.status.get(address, WELL)) is None:
            if time.monotonic() - began > timeout:
                raise ModelError("no answer in time", Outcome.STALLED)
            await asyncio.sleep(0.005)
        if isinstance(status, ModelError):
            raise status
        return msgspec.json.encode(status).decode()


def script_replicas(monkeypatch: pytest.MonkeyPatch) -> type[ScriptedClient]:
    ScriptedClient.forget_all()
    monkeypatch.setattr(replica_module, "TritonClient", ScriptedClient)
    return ScriptedClient


def run(body: Callable[[Failover], Any], metrics: Metrics | None = None, **options: Any) -> Any:
    """`body` with a failover that runs; b:1 has the first turn."""

    async def main() -> Any:
        defaults = {
            "replicas": "b:1,a:1",
            "routing": "round_robin",
            "probe_interval": 0.02,
            "retry_base_delay": 0.01,
            "generation_probe_interval": 0,
        }
        failover = Failover(GatewaySettings(**{**defaults, **options}), metrics or Metrics(), EXPECTED, 99)
        await failover.start()
        try:
            return await body(failover)
        finally:
            await failover.stop()

    return asyncio.run(main())


async def generate(
    failover: Failover,
    deadline: Deadline = Deadline(),  # noqa: B008 - frozen
    fall_back: bool = False,
    **sampling: Any,
) -> tuple[str, Generation]:
    generation = Generation("r", [1, 2], SamplingParams(seed=3, **sampling), deadline)
    text, route = "", Route.FALLBACK if fall_back else Route.DECODER
    async with aclosing(failover.generate(generation, route)) as replies:
        async for reply in replies:
            text += reply.text
    return text, generation


async def until(what: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not what():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)


async def has_begun(client: type[ScriptedClient]) -> None:
    """A generation was asked for, and what its script has at once has arrived."""
    await until(lambda: client.requests)
    for _ in range(50):
        await asyncio.sleep(0)


def error(outcome: Outcome) -> ModelError:
    return ModelError("scripted", outcome)


def named(failover: Failover, address: str) -> Replica:
    (found,) = (replica for replica in failover.replicas if replica.address == address)
    return found


def samples(metrics: Metrics) -> dict[tuple[str, ...], float]:
    """By name without prefix and values of labels, which come in the order of their names."""
    found = {}
    for family in text_string_to_metric_families(metrics.text().decode()):
        for sample in family.samples:
            key = (sample.name.removeprefix("tidewright_gateway_"), *sample.labels.values())
            found[key] = sample.value
    return found
