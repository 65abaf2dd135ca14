"""LoRA adapters of all replicas: loads and unloads them on command, and on replicas that come later."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec

from tidewright.logs import event
from tidewright.resilience.errors import ModelError
from tidewright.resilience.outcome import Outcome
from tidewright.schema import LOAD_LORA, NO_ADAPTER, UNLOAD_LORA, AdapterOrder, AdapterStatus
from tidewright_gateway.openai.errors import ApiError, invalid
from tidewright_gateway.replicas.adapter_book import AdapterBook
from tidewright_gateway.replicas.replica import Replica

log = logging.getLogger(__name__)

COMMAND_TIMEOUT = 60.0  # seconds; reading a large adapter from a slow disk takes some
RETRY = 10.0  # seconds until a replica is told again what it has refused
LOOK_INTERVAL = 0.25  # seconds between two looks for names that nobody seems to have


class Replicas(Protocol):
    """What is needed of the set of replicas."""

    @property
    def own(self) -> Sequence[Replica]:
        """Those of this gateway's model that stay."""

    async def ask(self, replica: Replica) -> None:
        """Its status, now."""


@dataclass(frozen=True)
class _Result:
    replica: Replica
    error: ModelError | None


class Adapters:
    def __init__(self, replicas: Replicas, changed: Callable[[], None]) -> None:
        """`changed` is called when a replica has an adapter that it did not have."""
        self._replicas, self._changed = replicas, changed
        self._book = AdapterBook()
        self._catching_up: dict[Replica, asyncio.Task[None]] = {}
        self._looked_at = 0.0
        self._next_look: asyncio.Task[None] | None = None
        self._lock = asyncio.Lock()  # one operator's command after the other

    async def stop(self) -> None:
        jobs = [*self._catching_up.values(), *([self._next_look] if self._next_look else [])]
        for job in jobs:
            job.cancel()
        await asyncio.gather(*jobs, return_exceptions=True)

    @property
    def loaded(self) -> dict[str, AdapterStatus]:
        """By name, those that a replica has, or should have: it may be starting again."""
        found = self._book.wanted
        for replica in self._replicas.own:
            for status in replica.adapters.values():
                known = self._book.newest(status.name)
                if status.loaded and not (known and not known.loaded):
                    found[status.name] = known or status
        return found

    async def find(self, name: str) -> AdapterStatus | None:
        """None: no replica has it. Another worker or gateway may have loaded it a moment ago, so all are asked."""
        if (found := self.loaded.get(name)) or not self._any_support:
            return found
        if not self._next_look:
            self._next_look = asyncio.create_task(self._look_soon())
        await asyncio.shield(self._next_look)  # others may wait for it
        return self.loaded.get(name)

    async def _look_soon(self) -> None:
        """Who comes while it waits is content with it; once it asks, somebody else's load may be too late for it."""
        await asyncio.sleep(max(self._looked_at + LOOK_INTERVAL - time.monotonic(), 0))
        self._looked_at, self._next_look = time.monotonic(), None
        await self._look_at_all()

    async def is_missed(self, replica: Replica, name: str | None, error: ModelError) -> bool:
        """Whether a request failed because the replica lacks an adapter that it should have, as after a restart.

        Its status is asked for: it gets no requests for the adapter until it has it again.
        """
        if name is None or not str(error).startswith(NO_ADAPTER):
            return False
        replica.adapters = {other: status for other, status in replica.adapters.items() if other != name}
        await self._replicas.ask(replica)
        return name in self.loaded

    @property
    def _any_support(self) -> bool:
        return any(replica.serves_adapters for replica in self._replicas.own)

    def heard(self, replica: Replica) -> None:
        """Call it after each status: the replica may have missed a command."""
        if replica.misfit:  # what another model has is nothing to this one
            return
        self._book.note(replica.adapters.values())
        if replica in self._catching_up or not (replica.is_up and replica.serves_adapters):
            return
        if self._due(replica) and time.monotonic() >= replica.adapters_retry_at:
            job = self._catching_up[replica] = asyncio.create_task(self._catch_up(replica))
            job.add_done_callback(lambda _: self._catching_up.pop(replica, None))

    def _due(self, replica: Replica) -> list[AdapterStatus]:
        return self._book.due(replica.adapters)

    async def _catch_up(self, replica: Replica) -> None:
        for wanted in self._due(replica):
            had = replica.adapters.get(wanted.name)
            error = None
            if wanted.loaded and had and had.loaded:  # the same name from another folder
                error = await self._tell(replica, msgspec.structs.replace(wanted, loaded=False))
            error = error or await self._tell(replica, wanted)
            if error:
                replica.adapters_retry_at = time.monotonic() + RETRY
        await self._replicas.ask(replica)

    async def _tell(self, replica: Replica, wanted: AdapterStatus) -> ModelError | None:
        """The error of one command at one replica."""
        word = LOAD_LORA if wanted.loaded else UNLOAD_LORA
        order = AdapterOrder(wanted.name, wanted.path if wanted.loaded else "", wanted.at)
        try:
            await replica.client.control(word + msgspec.json.encode(order).decode(), COMMAND_TIMEOUT, replica.decoder)
        except ModelError as error:
            if replica.adapter_troubles.get(wanted.name) != str(error):
                extra = event("adapter_refused", replica=replica.address)
                log.warning("adapter %s: %s: %s", wanted.name, replica.address, error, extra=extra)
            replica.adapter_troubles[wanted.name] = str(error)
            return error
        replica.adapter_troubles.pop(wanted.name, None)
        name = "adapter_loaded" if wanted.loaded else "adapter_unloaded"
        log.info("adapter %s: %s", wanted.name, replica.address, extra=event(name, replica=replica.address))
        self._changed()
        return None

    # Commands of operators.

    async def load(self, name: str, path: str) -> None:
        """On all replicas.

        Raises:
            ApiError: it is loaded already, or not all of them have it now; the message says which, and why.
        """
        async with self._lock:
            await self._look_at_all()
            if known := self.loaded.get(name):
                raise invalid(
                    f"the LoRA adapter {name!r} is loaded already, from {known.path}; unload it first, or choose "
                    "another lora_name",
                    "lora_name",
                    "adapter_exists",
                )
            wanted = AdapterStatus(name, path, True, self._now(name))
            results = await self._command(wanted)
        failed = [result for result in results if result.error]
        if not failed:
            return
        if len(failed) == len(results):
            raise _refused(failed)
        raise _partial("loaded", "those that refused are told again every few seconds", results)

    async def unload(self, name: str) -> None:
        """On all replicas; one that is away now is told when it is back.

        Raises:
            ApiError: no replica has it, or not all could unload it.
        """
        async with self._lock:
            await self._look_at_all()
            known = self.loaded.get(name)
            if not known:
                raise unknown_adapter(name)
            results = await self._command(AdapterStatus(name, known.path, False, self._now(name)))
        if any(result.error for result in results):
            raise _partial("unloaded", "requests for it are refused, and the others are told again", results)

    def _now(self, name: str) -> float:
        """The time of a command: after all that is known of the name, should another gateway's clock be ahead."""
        newest = self._book.newest(name)
        return max(time.time(), newest.at + 1e-3) if newest else time.time()

    async def _look_at_all(self) -> None:
        await asyncio.gather(*(self._replicas.ask(replica) for replica in self._replicas.own))

    async def _command(self, wanted: AdapterStatus) -> list[_Result]:
        """With the lock held. Raises ApiError: there is nobody to tell."""
        able = [replica for replica in self._replicas.own if replica.status and replica.serves_adapters]
        if not able:
            raise _nobody(self._replicas.own)
        if not wanted.loaded:
            able = [replica for replica in able if replica.has_adapter(wanted.name)]

        async def tell(replica: Replica) -> _Result:
            return _Result(replica, await self._tell(replica, wanted))

        results = await asyncio.gather(*map(tell, able))
        if not wanted.loaded or any(result.error is None for result in results):
            self._book.note([wanted])
        else:  # wanted nowhere
            for result in results:
                result.replica.adapter_troubles.pop(wanted.name, None)
        for result in results:
            if result.error:
                result.replica.adapters_retry_at = time.monotonic() + RETRY
        await self._look_at_all()
        return list(results)


def choices(names: Mapping[str, object], most: int = 10) -> str:
    """For messages: the first names."""
    shown = ", ".join(sorted(names)[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown


def unknown_adapter(name: str) -> ApiError:
    message = f"there is no LoRA adapter {name[:128]!r} here; /v1/models lists those that are loaded"
    return ApiError(404, message, code="adapter_not_found", param="lora_name")


def _nobody(own: Sequence[Replica]) -> ApiError:
    if any(replica.status and not replica.serves_adapters for replica in own):
        return ApiError(
            400, "the replicas serve no LoRA adapters; start them with --adapter-folder", code="adapters_off"
        )
    return ApiError(503, "no replica can be told now; try again later", code="not_ready", retry_after=1)


def _refused(failed: Sequence[_Result]) -> ApiError:
    reasons = "; ".join(f"{result.replica.address}: {result.error}" for result in failed)
    is_invalid = all(result.error and result.error.outcome is Outcome.INVALID for result in failed)
    if is_invalid:
        return invalid(reasons, "lora_path", "adapter_refused")
    return ApiError(503, reasons, code="adapter_not_loaded", retry_after=1)


def _partial(done: str, rest: str, results: Sequence[_Result]) -> ApiError:
    good = [result.replica.address for result in results if not result.error]
    bad = [f"{result.replica.address}: {result.error}" for result in results if result.error]
    message = f"{done} at {', '.join(good) or 'no replica'}; not at {'; '.join(bad)}; {rest}"
    return ApiError(409, message, code="adapter_partly", may_retry=False)
