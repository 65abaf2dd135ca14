"""Tenants that keep an engine process busy, without Triton, and what each of them gets. For the parts of tenancy.py."""

from __future__ import annotations

import contextlib
import os
import queue
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from tidewright.bench.workloads import token_ids
from tidewright.bridge.engine_client import EngineClient, EngineEvents
from tidewright.config import Settings
from tidewright.engine.messages import Abort, EngineStats, Ready, SequenceOutput, Submit
from tidewright.schema import SamplingParams


@dataclass
class Tenant:
    """`name` is what the engine knows it by. It sends `burst` requests at once when fewer than `least` are left."""

    name: str
    weight: int
    prompt: int  # tokens of a request
    output: int
    least: int
    burst: int = 1
    cost: float = 0.0  # a token of a prompt counts 1, one of an output 2
    firsts: list[float] = field(default_factory=list)  # seconds from each request to its first token
    left: int = 0


@dataclass
class _Sent:
    tenant: Tenant
    at: float
    begun: bool = False


class Load:
    """An engine and its tenants. One thread calls it; the engine's messages wait in a queue meanwhile."""

    def __init__(self, folder: Path, **options: object) -> None:
        self.stats = EngineStats(0, 0, 0, 0, 0, 0, 0, 0)
        self._arrived: queue.SimpleQueue[tuple[float, list[SequenceOutput]]] = queue.SimpleQueue()
        self._ids, self._random = token_ids(folder), random.Random(0)
        self._sent: dict[int, _Sent] = {}
        self._last = 0
        config = Settings(kv_cache_memory="512MiB").engine_config(folder)
        config = msgspec.structs.replace(config, standby=False, heartbeat_interval=0.1, **options)
        events = EngineEvents(outputs=self._put, stats=self._note, up=_ignore, lost=_lost, out_of_memory=_lost)
        self._client = EngineClient(config, events, start_timeout=300, heartbeat_timeout=300)
        self._client.start()

    def _put(self, outputs: list[SequenceOutput]) -> None:
        self._arrived.put((time.perf_counter(), outputs))

    def _note(self, stats: EngineStats) -> None:
        self.stats = stats

    def send(self, tenant: Tenant) -> int:
        number = self._last = self._last + 1
        sampling = SamplingParams(
            temperature=0,
            max_tokens=tenant.output,
            ignore_eos=True,
            seed=0,
            tenant=tenant.name,
            tenant_weight=tenant.weight,
        )
        prompt = self._random.choices(self._ids, k=tenant.prompt)  # in no cache
        self._sent[number] = _Sent(tenant, time.perf_counter())
        tenant.left += 1
        self._client.send(Submit(number, prompt, sampling))
        return number

    def run(self, tenants: list[Tenant], seconds: float, until: int | None = None) -> None:
        """They keep it busy for so long; or until number `until` has its first token."""
        end = time.perf_counter() + seconds
        while (left := end - time.perf_counter()) > 0:
            for tenant in tenants:
                if tenant.left < tenant.least:
                    for _ in range(tenant.burst):
                        self.send(tenant)
            with contextlib.suppress(queue.Empty):
                self._take(*self._arrived.get(timeout=min(left, 0.1)))
            if until is not None and (until not in self._sent or self._sent[until].begun):
                return

    def _take(self, at: float, outputs: list[SequenceOutput]) -> None:
        for output in outputs:
            sent = self._sent.get(output.request_id)
            if sent is None:
                continue
            tenant = sent.tenant
            if output.finish_reason not in (None, "length"):
                raise SystemExit(f"a request of {tenant.name} failed: {output.message}")
            if not sent.begun:
                sent.begun = True
                tenant.firsts.append(at - sent.at)
                tenant.cost += tenant.prompt
            tenant.cost += 2 * len(output.token_ids)
            if output.finish_reason:
                tenant.left -= 1
                del self._sent[output.request_id]

    def drop(self) -> None:
        """All that is left."""
        for number, sent in self._sent.items():
            sent.tenant.left -= 1
            self._client.send(Abort(number))
        self._sent.clear()
        time.sleep(1.0)  # the step in flight

    def close(self) -> None:
        self._client.stop()


@contextlib.contextmanager
def loaded(folder: Path, **options: object) -> Iterator[Load]:
    load = Load(folder, **options)
    try:
        yield load
    finally:
        load.close()


def _ignore(_: Ready) -> None:
    pass


def _lost(cause: str) -> None:
    print(f"the engine died: {cause}", file=sys.stderr)
    os._exit(1)
