"""Moves memory between the KV caches of a server's models while it runs, by the rule of memory/balance.py.

At any moment they have together at most what their shares pay for: a model that gives has given, and said so, before
another gets anything. What each may have also stands in a file that a model reads when it is loaded (memory/ledger.py).
Nothing here blocks, as in model_watch.py.
"""

from __future__ import annotations

import json
import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tidewright.config import Settings
from tidewright.kv_cache.budget import mib
from tidewright.launch.control import TroubleError, Waiting, ask, text_of
from tidewright.launch.errors import LaunchError
from tidewright.launch.model_watch import pause
from tidewright.launch.repository import INDEX, is_unloaded
from tidewright.launch.server import TritonServer
from tidewright.logs import event
from tidewright.memory import ledger
from tidewright.memory.account import MemoryAccount
from tidewright.memory.balance import Claim, balance
from tidewright.schema import LIMIT
from tidewright.served_models import FIRST_DECODER, decoder_of

LOOK_INTERVAL = 1.0  # seconds
LATELY, PEAK = 3, 30  # looks: see memory/balance.py
STEP = 8  # the part of the whole that moves at a time
# Seconds between two moves. On a GPU each is a pause: layers are copied and graphs recorded anew.
MOVE_INTERVAL, MOVE_INTERVAL_GPU = 5.0, 60.0
PATIENCE = 5.0  # seconds for an answer, and for a change to show in a model's account
POLL_INTERVAL = 0.2  # seconds
_GPUS = Path("/dev/nvidiactl")  # where there are some

log = logging.getLogger(__name__)


@dataclass
class _Model:
    account: MemoryAccount | None = None  # None: it did not tell it at the last look
    share: int = 0  # bytes of KV cache on each rank that it had when it was first seen; 0: it was not yet
    held: int = 0  # that it has, or may be about to have
    sure_at: float = 0.0  # time.monotonic() from which on its account shows whether it took the last change
    least: int = 0  # what is kept for it while it is unloaded
    needs: deque[int] = field(default_factory=lambda: deque(maxlen=PEAK))

    def looked(self, account: MemoryAccount) -> None:
        self.account = account
        self.share = self.share or account.kv_most
        self.least = account.kv_least
        if account.kv_most + account.block > self.held or time.monotonic() > self.sure_at:
            self.held = account.kv_most
        needed = account.kv_wanted + account.adapters_in_pool
        # It could not use more where the machine has no memory for what its budget pays for.
        is_short = account.kv_pool + account.adapters_in_pool + account.block <= account.kv_target
        self.needs.append(min(needed, self.held) if is_short else needed)

    def claim(self, account: MemoryAccount) -> Claim:
        return Claim(
            held=self.held,
            share=self.share,
            floor=account.kv_least + account.adapters_in_pool,
            room=account.kv_room,
            lately=min([*self.needs][-LATELY:]) if len(self.needs) >= LATELY else 0,
            peak=max(self.needs),
        )


class MemoryBalance:
    """`step` it several times a second."""

    def __init__(self, server: TritonServer, is_down: Callable[[str], bool]) -> None:
        """`is_down`: somebody has unloaded a decoder, or it stays away."""
        self._server, self._is_down = server, is_down
        self._models = {name: _Model() for name in _on_one_device(server.settings)}
        has_gpu = server.settings.device != "cpu" and _GPUS.exists()
        self._interval = MOVE_INTERVAL_GPU if has_gpu else MOVE_INTERVAL
        self._moved = time.monotonic()
        self._task = self._run()

    def step(self) -> None:
        try:
            next(self._task)
        except BaseException:
            self._task = self._run()
            raise

    def _run(self) -> Waiting[None]:
        while True:
            yield from pause(LOOK_INTERVAL)
            if len(self._models) < 2:
                continue
            try:
                yield from self._look()
                yield from self._take_from_unloaded()
                yield from self._balance()
            except LaunchError as error:
                log.debug("memory is not balanced for now: %s", error)

    def _look(self) -> Waiting[None]:
        for name, model in self._models.items():
            model.account = None
            if not self._is_down(name):
                try:
                    account = yield from self._account(name)
                except LaunchError:
                    continue
                if account.block:
                    model.looked(account)

    def _take_from_unloaded(self) -> Waiting[None]:
        """What they need to come back stays theirs, so that a load never waits for others, nor fails for them."""
        away = {
            name: model.least
            for name, model in self._models.items()
            if model.account is None and model.held > model.least and self._is_down(name)
        }
        if not away:
            return
        # One that is loaded from here on reads there what it has. One that is being loaded may have read before.
        self._write(away)
        index = yield from ask(f"{self._server.http_url}{INDEX}", {}, PATIENCE)
        for name, least in away.items():
            if is_unloaded(index, name):
                self._models[name].held = least
                self._models[name].needs.clear()

    def _balance(self) -> Waiting[None]:
        models = {name: model for name, model in self._models.items() if model.account}
        claims = {name: model.claim(model.account) for name, model in models.items() if model.account}
        step = self._whole // STEP if time.monotonic() - self._moved >= self._interval else 0
        wanted = balance(claims, max(self._free, 0), step)
        before = {name: claim.held for name, claim in claims.items()}
        takers = {name: size for name, size in wanted.items() if size > before[name]}
        if not takers:
            return
        self._moved = time.monotonic()
        for name in wanted.keys() - takers.keys():
            if wanted[name] < before[name]:
                yield from self._shrink(name, wanted[name])
        for name, size in takers.items():
            yield from self._grow(name, min(size, before[name] + max(self._free, 0)))
        self._tell(before, [name for name in takers if claims[name].lack(before[name])])

    @property
    def _whole(self) -> int:
        """Bytes for all models that were ever loaded; the others still have their shares."""
        return sum(model.share for model in self._models.values())

    @property
    def _free(self) -> int:
        return self._whole - sum(model.held for model in self._models.values())

    def _shrink(self, name: str, size: int) -> Waiting[None]:
        """It has less when its account says so."""
        self._write({name: size})
        try:
            yield from self._ask(name, f"{LIMIT}{size}")
            deadline = time.monotonic() + PATIENCE
            while time.monotonic() < deadline:
                account = yield from self._account(name)
                if account.block and account.kv_most <= size and account.committed <= account.budget:
                    self._models[name].held = account.kv_most
                    return
                yield from pause(POLL_INTERVAL)
        except LaunchError as error:
            log.debug("%s keeps its memory: %s", name, error)

    def _grow(self, name: str, size: int) -> Waiting[None]:
        """It has more as soon as it is asked to: the account may show it later, and so long it counts as done."""
        model = self._models[name]
        if not model.account or size < model.held + model.account.block:
            return
        before, model.held = model.held, size
        model.sure_at = time.monotonic() + self._server.settings.heartbeat_timeout + PATIENCE
        self._write({})
        try:
            yield from self._ask(name, f"{LIMIT}{size}")
        except TroubleError:  # it did not take that
            model.held = before
        except LaunchError as error:
            log.debug("%s may have got memory: %s", name, error)

    def _tell(self, before: Mapping[str, int], lacking: Collection[str]) -> None:
        sizes = [
            f"{name} {mib(self._models[name].held)} instead of {mib(size)}"
            for name, size in before.items()
            if self._models[name].held != size
        ]
        if sizes:
            why = f"requests of {', '.join(lacking)} need it" if lacking else "nobody else has it"
            log.info("for KV caches: %s; %s", ", ".join(sizes), why, extra=event("memory_moved"))

    def _ask(self, name: str, word: str) -> Waiting[bytes]:
        return ask(f"{self._server.http_url}/v2/models/{name}/generate", {"control": word}, PATIENCE)

    def _account(self, name: str) -> Waiting[MemoryAccount]:
        """Raises LaunchError."""
        answer = yield from self._ask(name, "memory")
        try:
            return MemoryAccount(**json.loads(text_of(answer)))
        except (ValueError, TypeError):
            raise LaunchError(f"{name} did not tell its memory") from None

    def _write(self, changes: Mapping[str, int]) -> None:
        """For all that may be loaded again."""
        held = {name: model.held for name, model in self._models.items() if model.share}
        ledger.write(self._server.ledger, held | dict(changes))


def _on_one_device(settings: Settings) -> list[str]:
    """Decoders of the models whose ranks are where the first one's are; the others' memory is no use to these."""
    first = settings.of(settings.model_name) if settings.models else settings
    further = [
        decoder_of(one.name)
        for one, own in ((one, settings.of(one.name)) for one in settings.models)
        if (own.device, own.tensor_parallel_size) == (first.device, first.tensor_parallel_size)
    ]
    return [FIRST_DECODER, *further]
