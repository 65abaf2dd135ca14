"""The engine: requests in, new tokens out, one step at a time. It knows no process and no socket (process.py)."""

from __future__ import annotations

import heapq
import logging
import math
import os
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import msgspec

from tidewright.devices.memory import out_of_memory
from tidewright.distributed.group import ALONE, TensorParallelGroup
from tidewright.distributed.rank_messages import AddAdapter, Committed, DropAdapter, Expire, Input, Resize
from tidewright.distributed.ranks import Ranks
from tidewright.engine.admission import Admission
from tidewright.engine.latency import LatencyController
from tidewright.engine.limits import RequestRefusedError, SchedulerConfig
from tidewright.engine.memory_manager import GrowthError, MemoryManager
from tidewright.engine.messages import Abort, EngineConfig, EngineStats, Ready, SequenceOutput, Submit
from tidewright.engine.model_runner import ModelRunner
from tidewright.engine.newcomers import Newcomers
from tidewright.engine.pace import StepPace
from tidewright.engine.plan import DrawnToken, SequenceResult, StepPlan
from tidewright.engine.runner import EngineConfigError, LaunchedStep, Runner
from tidewright.engine.scheduler import Scheduler
from tidewright.engine.sequence import Sequence
from tidewright.engine.step_budget import memory_error
from tidewright.engine.step_cost import StepLoad
from tidewright.engine.targets import Targets
from tidewright.engine.timing import Timing
from tidewright.kv_cache.block_pool import BlockPool
from tidewright.kv_cache.idle_audit import IdleAudit
from tidewright.logs import event
from tidewright.lora.adapter import Adapter
from tidewright.memory.machine import machine_memory
from tidewright.memory.reclaim import Watermarks

_T = TypeVar("_T")

log = logging.getLogger(__name__)


class _Flight(NamedTuple):
    """A step that is not committed yet."""

    plan: StepPlan
    launched: LaunchedStep | None  # None: memory did not suffice
    began: float  # on time.monotonic()
    lack: str  # what the device said then


class Engine:
    """Rank 0, which the others follow step by step.

    Raises a ValueError whose message says what to change when it can't be made.
    """

    def __init__(self, config: EngineConfig, group: TensorParallelGroup = ALONE, ranks: Ranks | None = None) -> None:
        for name in ("block_size", "max_batched_tokens", "max_running"):
            if getattr(config, name) < 1:
                raise EngineConfigError(f"{name} must be at least 1")
        started = time.monotonic()
        self.runner = _make_runner(config, group)
        self.load_seconds = time.monotonic() - started
        self.config = config
        self.scheduler = make_scheduler(config, self.runner)
        self.idle_audit = IdleAudit(self.scheduler.cache)
        targets = Targets(config.ttft_target, config.tpot_target, config.class_targets)
        self._latency = LatencyController(
            config.prefill_step_time, targets, config.max_batched_tokens, config.max_running
        )
        self._newcomers = Newcomers(self._latency.cost)
        self._admission = Admission(self.scheduler, self._latency, targets)
        self.memory = self._manage_memory()
        self._ranks = ranks
        self._inputs: list[Input] = []  # that the other ranks have not got yet
        self._in_flight: deque[_Flight] = deque()
        self._computed = 0.0  # when the last step's result was there
        self._timing = Timing()
        self._deadlines: list[tuple[float, int]] = []  # a heap; those of ended requests leave it when they are due
        self._schedule_seconds = self._agree_seconds = 0.0

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or bool(self._in_flight)

    @property
    def progress(self) -> int:
        """Grows as long as a step comes on, however long it takes."""
        return self.runner.progress

    def submit(self, request: Submit) -> SequenceOutput | None:
        """Takes a request; the output that ends it at once, if it can't be taken."""
        try:
            sequence = make_sequence(request)
            predicted = self._admission.check(request, sequence)
            self.scheduler.add(sequence)
        except RequestRefusedError as error:
            return _refusal(request, error)
        except Exception as error:
            log.exception("request %d could not be taken", request.request_id)
            message = f"the engine can't take this request ({type(error).__name__}: {error})"
            return SequenceOutput(request.request_id, [], "invalid", message=message)
        now = time.monotonic()
        self._latency.submitted(request.sampling)
        self._newcomers.submitted(sequence, now)
        self._admission.accepted(sequence, predicted)
        self._tell_ranks(request)
        self._timing.arrived(request.request_id, now)
        if request.deadline is not None:
            heapq.heappush(self._deadlines, (request.deadline, request.request_id))
        return None

    def beyond_share(self, request: Submit, held: int, own: int) -> SequenceOutput | None:
        """The output that ends a request which is to be held back, as `held` others are, `own` of them its tenant's."""
        try:
            self.scheduler.check_share(request.sampling.tenant, held, own)
        except RequestRefusedError as error:
            return _refusal(request, error)
        return None

    def abort(self, request_id: int) -> None:
        self.scheduler.abort(request_id)
        self._admission.left(request_id)
        self._tell_ranks(Abort(request_id))

    def expire(self) -> list[SequenceOutput]:
        """Ends the requests whose deadline has passed."""
        outputs = []
        while self._deadlines and self._deadlines[0][0] <= time.monotonic():
            _, request_id = heapq.heappop(self._deadlines)
            if output := self.scheduler.expire(request_id):
                self._admission.left(request_id)
                self._tell_ranks(Expire(request_id))
                outputs.append(output)
        return outputs

    def resize(self, num_blocks: int) -> bool:
        """Gives the KV cache another number of blocks, while requests run; False: memory does not suffice for it.

        Raises:
            GrowthError: it does on this rank, but not on another. All have as many as before.
            BlockMoveError: all has to begin anew.
        """
        if num_blocks > (before := self.num_blocks):
            _, lack = _attempt(lambda: self.runner.resize(num_blocks, {}))
            if lack:
                self.runner.trim()
                return False
            self._flush_inputs()  # what was decided before comes first: an earlier resize moves blocks
            if self._ranks and (lacking := self._ranks.reserve(num_blocks)):
                self.runner.resize(before, {})
                self._ranks.reserve(before)
                raise GrowthError(lacking)
            self.scheduler.resize(num_blocks)
        else:
            self.runner.resize(num_blocks, self.scheduler.resize(num_blocks))
        self._tell_ranks(Resize(num_blocks))
        return True

    @property
    def has_adapters_beside(self) -> bool:
        """LoRA adapters are in the memory that the KV cache is in; else the device has room for some from the start."""
        return isinstance(self.runner, ModelRunner) and not self.runner.device.memory.is_bounded

    # The KV cache, as its manager sees it

    @property
    def num_blocks(self) -> int:
        return self.scheduler.cache.pool.num_blocks

    @property
    def used_blocks(self) -> int:
        return self.scheduler.cache.pool.num_used

    @property
    def cached_blocks(self) -> int:
        return self.scheduler.cache.num_cached

    @property
    def free_blocks(self) -> int:
        return self.scheduler.free_blocks

    @property
    def least_blocks(self) -> int:
        return self.scheduler.config.least_blocks

    @property
    def wanted_blocks(self) -> int:
        return self.scheduler.wanted_blocks(self._latency.running)

    @property
    def touched_blocks(self) -> int:
        return self.runner.touched_blocks

    def _manage_memory(self) -> MemoryManager:
        fixed, config, runner = self.runner.fixed_memory, self.config, self.runner
        wish: float = config.wished_blocks
        if not config.num_blocks and self.num_blocks < fixed.most_blocks:
            wish = self.num_blocks  # the configuration's, of which the budget would pay for more
        wish = wish or math.inf
        if not isinstance(runner, ModelRunner):
            return MemoryManager(fixed, self, wish, None, Watermarks(0, 0))
        memory, layers = runner.device.memory, len(runner.kv_cache.layers)
        if memory.is_bounded:  # others can't take what is this engine's; a copy of a layer must have room
            marks = Watermarks(0, fixed.block * int(min(wish, fixed.most_blocks)) // layers)
            return MemoryManager(fixed, self, wish, memory.free, marks, layers, in_slabs=memory.reserves)
        marks = Watermarks.of(memory.capacity())
        sharers = config.local_ranks, config.memory_share
        return MemoryManager(fixed, self, wish, lambda: machine_memory().free, marks, layers, *sharers)

    def step(self) -> list[SequenceOutput]:
        """Launches what can be launched, waits for the oldest step in flight, and tells what it has brought."""
        while not self._in_flight or (
            len(self._in_flight) < self.runner.steps_in_flight
            and self._in_flight[-1].launched
            and self.scheduler.may_run_ahead
        ):
            if not self._launch():
                break
        return self._commit(self._in_flight.popleft()) if self._in_flight else []

    def _launch(self) -> bool:
        """False: there is nothing to compute."""
        began = time.monotonic()
        running = self.scheduler.running
        pace = self._latency.pace(running)
        pace = self._newcomers.shorten(pace, len(running), self.scheduler.waiting, began)
        plan = self.scheduler.schedule(pace)
        self._admission.planned()
        planned = time.monotonic()
        self._schedule_seconds += planned - began
        if not plan.sequences:
            return False
        self._lead(plan, pace)
        agreed = time.monotonic()
        self._agree_seconds += agreed - planned
        self._timing.planned(plan, began)
        launched, lack = _attempt(lambda: self.runner.launch(plan))
        self._in_flight.append(_Flight(plan, launched, agreed, lack))
        return True

    def _commit(self, flight: _Flight) -> list[SequenceOutput]:
        result, lack = _attempt(flight.launched.result) if flight.launched else (None, flight.lack)
        if result is None:
            self._make_smaller([flight.plan, *(later.plan for later in self._in_flight)], lack)
            return []
        computed = time.monotonic()
        # Of steps in flight, the device has begun one when it was done with the one before.
        self._latency.computed(StepLoad.of(flight.plan), computed - max(flight.began, self._computed))
        self._computed = computed
        if self._ranks:
            self._tell_ranks(Committed(tuple(_only_tokens(drawn) for drawn in result.sequences)))
        outputs = self.scheduler.commit(flight.plan, result)
        for output in outputs:
            self._admission.told(output, computed)
        outputs = [self._timing.told(output, computed) for output in outputs]
        self._schedule_seconds += time.monotonic() - computed
        return outputs

    def _make_smaller(self, plans: list[StepPlan], cause: str) -> None:
        """Takes back the steps in flight, of which the first ran out of memory; later ones are smaller.

        Raises:
            StepMemoryError: they can't be, or other ranks wait for this one amid the step, so that all begin anew.
        """
        error = memory_error(plans[0], cause)
        if self._ranks or not error.step_tokens:
            raise error
        self._in_flight.clear()
        self.runner.trim()
        self.scheduler.undo(plans)
        log.warning(
            "%s; going on with steps of up to %d tokens for a while",
            *(error, self.scheduler.step_tokens),
            extra=event("out_of_memory"),
        )

    def _tell_ranks(self, entry: Input) -> None:
        """With the next step; at once if none is to come, or what an idle server is told would pile up here."""
        if not self._ranks:
            return
        self._inputs.append(entry)
        if not self.has_work:
            self._flush_inputs()

    def _flush_inputs(self) -> None:
        """Tells the other ranks now what would come with the next step."""
        if self._ranks and self._inputs:
            self._ranks.tell(self._inputs)
            self._inputs = []

    def _lead(self, plan: StepPlan, pace: StepPace) -> None:
        """Lets the other ranks begin the same step."""
        if self._ranks:
            self._ranks.send(plan, self._inputs, pace)
            self._inputs = []

    def add_adapter(self, name: str, adapter: Adapter, number: int = 0) -> None:
        """Requests may have it from here on. The other ranks have read it as `number`."""
        self.scheduler.adapters.add(name, adapter.digest)
        self.runner.add_adapter(name, adapter)
        self._tell_ranks(AddAdapter(name, number, adapter.digest))

    def drop_adapter(self, name: str) -> None:
        """No request has it, and none may."""
        self.scheduler.adapters.remove(name)
        self.runner.drop_adapter(name)
        self._tell_ranks(DropAdapter(name))

    def check_ranks(self) -> None:
        """Raises RankError if another rank does not answer. For when there is nothing else to do."""
        if self._ranks:
            self._ranks.ping()

    def stats(self) -> EngineStats:
        return msgspec.structs.replace(
            self.scheduler.stats(),
            may_run=self._latency.running,
            refused_by_timeout=self._admission.refused_by_timeout,
            refused_by_target=self._admission.refused_by_target,
            schedule_seconds=self._schedule_seconds,
            agree_seconds=self._agree_seconds,
            forward_seconds=self.runner.forward_seconds,
            sample_seconds=self.runner.sample_seconds,
            memory=self.memory.account(),
            cache_resizes=self.memory.resizes,
            reclaimed=dict(self.memory.reclaimed),
        )

    def ready(self) -> Ready:
        return Ready(
            pid=os.getpid(),
            device=self.runner.device_name,
            dtype=self.config.dtype,
            block_size=self.config.block_size,
            num_blocks=self.runner.num_blocks,
            max_model_len=self.runner.max_model_len,
            vocab_size=self.runner.vocab_size,
            load_seconds=self.load_seconds,
            max_output_tokens=self.config.max_output_tokens,
            eos_ids=list(self.runner.eos_ids),
            embedding_size=self.runner.embedding_size,
            memory=self.memory.account(),
        )


def _refusal(request: Submit, error: RequestRefusedError) -> SequenceOutput:
    log.debug("request %d refused: %s", request.request_id, error, extra=event("request_refused"))
    return SequenceOutput(request.request_id, [], error.reason, message=str(error))


def _attempt(compute: Callable[[], _T]) -> tuple[_T | None, str]:
    """Its result; or None and the error's words, if memory did not suffice. The error would keep the step's tensors."""
    try:
        return compute(), ""
    except Exception as error:
        if not (lack := out_of_memory(error)):
            raise
        return None, lack


def _make_runner(config: EngineConfig, group: TensorParallelGroup) -> Runner:
    if not config.is_onnx:
        return ModelRunner(config, group)
    from tidewright.engine.onnx_runner import OnnxRunner  # onnxruntime, which others don't need

    return OnnxRunner(config)


def make_scheduler(config: EngineConfig, runner: Runner) -> Scheduler:
    """The same on every rank."""
    embeds = config.task == "embed"
    # A mean needs the hidden states of all tokens, also those that a cached block would skip.
    prefix_caching = config.prefix_caching and not (embeds and config.pooling == "mean")
    return Scheduler(
        SchedulerConfig(
            block_size=config.block_size,
            max_batched_tokens=config.max_batched_tokens,
            max_running=config.max_running,
            max_waiting=config.max_waiting,
            max_model_len=runner.max_model_len,
            vocab_size=runner.vocab_size,
            eos_ids=runner.eos_ids,
            prefix_caching=prefix_caching,
            speculative_tokens=config.speculative_tokens,
            embeds=embeds,
            cache_format=config.cache_format,
            adapter_slots=runner.adapter_slots,
        ),
        BlockPool(runner.num_blocks),
    )


def make_sequence(request: Submit) -> Sequence:
    words = tuple(tuple(word) for word in request.bad_words_ids)
    ids = request.prompt_token_ids, request.output_token_ids
    return Sequence(
        request.request_id, ids[0], request.sampling, words, ids[1], request.adapter, request.accepted_before
    )


def _only_tokens(result: SequenceResult) -> SequenceResult:
    """What another rank's scheduler needs to know of a result."""
    return SequenceResult(tuple(DrawnToken(drawn.token_id, error=drawn.error) for drawn in result.drawn))
