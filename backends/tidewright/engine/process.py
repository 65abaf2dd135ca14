"""The engine's conversation with the bridge: a thread that listens, the loop that steps, a thread that answers."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import queue
import threading
import time
from multiprocessing.connection import Connection

from tidewright.devices.base import DeviceError
from tidewright.devices.memory import out_of_memory
from tidewright.distributed.group import ALONE
from tidewright.distributed.placement import resolve, take_place
from tidewright.distributed.process_group import join_group, make_store
from tidewright.distributed.rank_messages import AdapterRead
from tidewright.distributed.ranks import RankError, Ranks
from tidewright.engine.adapter_host import AdapterHost, RankAdapters
from tidewright.engine.adapters import Adapters
from tidewright.engine.engine import Engine
from tidewright.engine.messages import (
    Abort,
    AdapterChanged,
    EngineConfig,
    Failed,
    LimitCache,
    LoadAdapter,
    ResizeCache,
    SequenceOutput,
    Shutdown,
    Submit,
    ToBridge,
    ToEngine,
    UnloadAdapter,
    decode_to_engine,
    encode,
)
from tidewright.engine.outbox import Outbox
from tidewright.engine.runner import EngineConfigError
from tidewright.engine.step_budget import StepMemoryError
from tidewright.engine.vital_thread import start_vital_thread
from tidewright.kv_cache.budget import parse_memory
from tidewright.kv_cache.storage import KVCacheMemoryError
from tidewright.sampling.grammar_compiler import Compiled, GrammarCompiler

log = logging.getLogger(__name__)

_EXPLAINED = DeviceError, EngineConfigError, KVCacheMemoryError, RankError, StepMemoryError
LORA_IS_OFF = "LoRA adapters are off: set adapter_folder (an ONNX model takes none)"
RANK_GRACE = 0.5  # seconds from a failed step to giving its own error as the cause


class EngineProcess:
    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._send_lock = threading.Lock()
        self._inbox: queue.SimpleQueue[ToEngine | Compiled | AdapterRead] = queue.SimpleQueue()
        self._outbox = Outbox(self._send)
        self._engine: Engine
        self._grammars: GrammarCompiler
        self._adapters: Adapters
        self._takes_adapters = False
        self._interval = 0.0
        self._last_heartbeat = -math.inf
        self._checked_steps = 0  # after so many the KV cache's books were last looked at

    def run(self, config: EngineConfig, ranks: Ranks | None) -> int:
        """Serves until `Shutdown`; returns the exit status. `ranks` have been started, and are closed by the caller."""
        start_vital_thread("intake", self._listen, self._tell_failure)
        try:
            self._engine = self._make_engine(config, ranks)
        except Exception as error:
            self._fail("the engine can't start", error, ranks)
            return 1
        self._grammars = GrammarCompiler(self._engine.runner.guided.prepare, self._inbox.put, self._tell_failure)
        host = AdapterHost(self._engine, ranks, self._inbox.put, self._tell_failure)
        self._adapters = Adapters(host, config.tensor_parallel_size, parse_memory(config.adapter_memory, 0))
        self._takes_adapters = self._engine.runner.adapter_slots > 0
        if self._engine.has_adapters_beside:
            self._engine.memory.adapters = RankAdapters(self._adapters, config.tensor_parallel_size)
        _yield_to_others(config.niceness)
        self._interval = config.heartbeat_interval
        self._send(self._engine.ready())
        self._outbox.start(config.heartbeat_interval, lambda: self._engine.progress, self._tell_failure)
        try:
            while self._take_messages():
                if expired := self._engine.expire():
                    self._outbox.put_outputs(expired)
                for changed in self._adapters.settle():
                    self._send(changed)
                self._beat()  # first of all once, for amid a long step the last heartbeat is repeated
                if self._engine.has_work:
                    self._outbox.put_outputs(self._engine.step())
                elif self._engine.idle_audit.is_due:
                    self._engine.idle_audit.check_some()
        except Exception as error:
            # The state of a half-done step is not worth saving: the bridge starts a new engine and replays.
            self._fail("the step failed", error, ranks)
            return 1
        return 0

    def _make_engine(self, config: EngineConfig, ranks: Ranks | None) -> Engine:
        resolved, group = resolve(config), ALONE
        config = take_place(resolved, 0)
        if ranks:
            store = make_store(ranks.host, config.start_timeout)
            ranks.gather(resolved, store.port, self._rank_lost)
            size, timeout = config.tensor_parallel_size, config.heartbeat_timeout / 2
            group = join_group(store, 0, size, config.device, ranks.host, timeout, ranks.shared_file)
        engine = Engine(config, group, ranks)
        group.wait_for_all()
        return engine

    def _fail(self, what: str, error: Exception, ranks: Ranks | None) -> None:
        if ranks:
            # A lost rank shows as a failed collective too, but its own end says more (`_rank_lost`).
            time.sleep(RANK_GRACE)
        # What says what to change needs no traceback beside it.
        log.error("%s: %s", what, error, exc_info=None if isinstance(error, _EXPLAINED) else error)
        explained = isinstance(error, ValueError | RankError | StepMemoryError)
        reason = str(error) if explained else f"{type(error).__name__}: {error}"
        if not explained and (lack := out_of_memory(error)):
            reason = f"{what} for lack of memory ({lack}): end what else takes it, or lower kv_cache_memory"
        self._tell_failure(reason, error.step_tokens if isinstance(error, StepMemoryError) else 0)

    def _tell_failure(self, cause: str, step_tokens: int = 0) -> None:
        self._send(Failed(" ".join(cause.split()), step_tokens))

    def _rank_lost(self, cause: str, step_tokens: int) -> None:
        """Called from another thread, at any time: the main one may wait in a collective that can't end."""
        log.error("%s", cause)
        self._tell_failure(cause, step_tokens)
        os._exit(1)

    def _listen(self) -> None:
        """Moves messages from the socket to the inbox, also while a step runs."""
        try:
            while True:
                self._inbox.put(decode_to_engine(self._connection.recv_bytes()))
        except (EOFError, OSError):
            # The bridge is gone, and with it all who could want an answer: don't finish the step.
            os._exit(0)

    def _take_messages(self) -> bool:
        """Acts on all that came in, waiting for it if there is nothing else to do; False after `Shutdown`."""
        refused = [refusal for request in self._adapters.take_ready() if (refusal := self._engine.submit(request))]
        message = self._next_message()
        while message is not None:
            if isinstance(message, Submit) and (refusal := self._beyond_share(message)):
                refused.append(refusal)
            elif isinstance(message, Submit) and message.sampling.guided:
                self._grammars.put(message)  # and comes back as Compiled
            elif isinstance(message, Submit | Compiled):
                refusal = self._submit(message)
                refused += [refusal] if refusal else []
            elif isinstance(message, Abort):
                self._grammars.drop(message.request_id)
                if self._adapters.drop(message.request_id):
                    self._engine.runner.guided.forget([message.request_id])
                self._engine.abort(message.request_id)
            elif isinstance(message, ResizeCache):
                self._engine.memory.set_target(message.num_blocks)
            elif isinstance(message, LimitCache):
                self._engine.memory.limit(message.most_blocks)
            elif isinstance(message, LoadAdapter | UnloadAdapter):
                self._change_adapter(message)
            elif isinstance(message, AdapterRead):
                refused += self._adapter_read(message)
            elif isinstance(message, Shutdown):
                return False
            message = self._inbox.get_nowait() if not self._inbox.empty() else None
        if refused:
            # A grammar may have been made for them, and the scheduler never knew them.
            self._engine.runner.guided.forget([output.request_id for output in refused])
            self._outbox.put_outputs(refused)
        return True

    def _beyond_share(self, request: Submit) -> SequenceOutput | None:
        """Those count as well that wait for a grammar or an adapter, of which the scheduler does not know yet."""
        if request.accepted_before:
            return None
        held = [*self._grammars.tenants, *self._adapters.tenants]
        return self._engine.beyond_share(request, len(held), held.count(request.sampling.tenant)) if held else None

    def _submit(self, message: Submit | Compiled) -> SequenceOutput | None:
        """The output that ends it at once, if it can't be taken."""
        if isinstance(message, Submit):
            return self._give(message)
        refusal = message.refusal
        if not self._grammars.take(message):  # aborted meanwhile
            self._engine.runner.guided.forget([message.request.request_id])
            return None
        return refusal or self._give(message.request)

    def _give(self, request: Submit) -> SequenceOutput | None:
        return None if request.adapter and self._adapters.hold(request) else self._engine.submit(request)

    def _change_adapter(self, message: LoadAdapter | UnloadAdapter) -> None:
        if not self._takes_adapters:
            answer: AdapterChanged | None = AdapterChanged(message.name, False, LORA_IS_OFF)
        elif isinstance(message, LoadAdapter):
            answer = self._adapters.load(message)
        else:
            answer = self._adapters.unload(message)
        if answer:
            self._send(answer)

    def _adapter_read(self, message: AdapterRead) -> list[SequenceOutput]:
        """Requests that end at once."""
        outcome = self._adapters.was_read(message)
        if outcome is None:
            return []
        if outcome.changed:
            self._send(outcome.changed)
        refusals = [self._engine.submit(request) for request in outcome.requests]
        return outcome.refused + [refusal for refusal in refusals if refusal]

    def _next_message(self) -> ToEngine | Compiled | AdapterRead | None:
        until_heartbeat = max(0.0, self._last_heartbeat + self._interval - time.monotonic())
        try:
            is_busy = self._engine.has_work or self._engine.idle_audit.is_due
            return self._inbox.get(timeout=0.0 if is_busy else until_heartbeat)
        except queue.Empty:
            return None

    def _beat(self) -> None:
        now = time.monotonic()
        if now - self._last_heartbeat >= self._interval:
            self._engine.memory.look(now)
            self._adapters.read_again()
            stats = self._engine.stats()
            if not self._engine.has_work:
                self._engine.check_ranks()
                if stats.steps > self._checked_steps:
                    self._engine.idle_audit.begin()
                    self._checked_steps = stats.steps
            self._outbox.put_heartbeat(stats)
            self._last_heartbeat = now

    def _send(self, message: ToBridge) -> None:
        try:
            with self._send_lock:
                self._connection.send_bytes(encode(message))
        except OSError:
            os._exit(0)  # as in `_listen`


def _yield_to_others(niceness: int) -> None:
    """Lowers the priority of all threads; on Linux each has its own. Once the model is loaded: on a busy machine, a
    load at low priority takes minutes, and the server is not ready before."""
    before = os.getpriority(os.PRIO_PROCESS, 0)
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
            os.setpriority(os.PRIO_PROCESS, int(thread), before + niceness)
