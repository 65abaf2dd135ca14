"""What a rank other than 0 does in a step: derives the same plan from the same inputs, and computes its part of it."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from typing import TypeVar

from tidewright.devices.memory import out_of_memory
from tidewright.distributed.group import TensorParallelGroup
from tidewright.distributed.rank_messages import (
    AdapterRead,
    AddAdapter,
    Committed,
    DropAdapter,
    Expire,
    ForgetAdapter,
    Input,
    ReadAdapter,
    Resize,
    Step,
    plan_checksum,
)
from tidewright.engine.engine import make_scheduler, make_sequence
from tidewright.engine.messages import EngineConfig, Submit
from tidewright.engine.model_runner import ModelRunner
from tidewright.engine.plan import StepPlan, StepResult
from tidewright.engine.runner import LaunchedStep
from tidewright.engine.step_budget import memory_error
from tidewright.lora.reader import AdapterReader

_T = TypeVar("_T")

log = logging.getLogger(__name__)


class PlanMismatchError(RuntimeError):
    """This rank and rank 0 made different plans of the same inputs: a bug. Both plans are in the logs."""


class Follower:
    def __init__(
        self,
        config: EngineConfig,
        group: TensorParallelGroup,
        was_read: Callable[[AdapterRead], None],
        tell: Callable[[str], None],
    ) -> None:
        """`was_read` gets what came of reading an adapter, from another thread; `tell`: why that thread ended."""
        self._runner = ModelRunner(config, group)
        self._reader = AdapterReader(self._runner.read_adapter, was_read, tell)
        self._scheduler = make_scheduler(config, self._runner)
        self._in_flight: deque[tuple[StepPlan, LaunchedStep]] = deque()

    def read(self, message: ReadAdapter) -> None:
        self._reader.put(message.number, message.path)

    def forget(self, message: ForgetAdapter) -> None:
        self._reader.forget(message.number)

    def follow(self, step: Step) -> None:
        """Raises PlanMismatchError, before anything is computed, or StepMemoryError."""
        self.take(step.inputs)
        plan = self._scheduler.schedule(step.pace)
        if plan_checksum(plan) != step.checksum:
            log.error("this rank's plan, where rank 0 has another: %s", plan.summary)
            raise PlanMismatchError("it made another plan than rank 0; both are in the log")
        self._in_flight.append((plan, _compute(plan, lambda: self._runner.launch(plan))))

    def reserve(self, num_blocks: int) -> str:
        """As `Reserve` says; what the device says if memory does not suffice, else empty."""
        try:
            self._runner.resize(num_blocks, {})
        except Exception as error:
            if not (lack := out_of_memory(error)):
                raise
            return lack
        return ""

    def take(self, inputs: list[Input]) -> None:
        """Raises StepMemoryError."""
        for entry in inputs:
            if isinstance(entry, Submit):
                self._scheduler.add(make_sequence(entry))
            elif isinstance(entry, Expire):
                self._scheduler.expire(entry.request_id)
            elif isinstance(entry, Committed):
                plan, launched = self._in_flight.popleft()
                _compute(plan, launched.result)
                # The tokens are rank 0's: so they agree, however the ranks' processors round.
                self._scheduler.commit(plan, StepResult(entry.results))
            elif isinstance(entry, Resize):
                moves = self._scheduler.resize(entry.num_blocks)
                if entry.num_blocks < self._runner.num_blocks:
                    self._runner.resize(entry.num_blocks, moves)
            elif isinstance(entry, AddAdapter):
                self._scheduler.adapters.add(entry.name, entry.digest)
                self._runner.add_adapter(entry.name, self._reader.take(entry.number))
            elif isinstance(entry, DropAdapter):
                self._scheduler.adapters.remove(entry.name)
                self._runner.drop_adapter(entry.name)
            else:
                self._scheduler.abort(entry.request_id)


def _compute(plan: StepPlan, compute: Callable[[], _T]) -> _T:
    """Raises StepMemoryError."""
    try:
        return compute()
    except Exception as error:
        if cause := out_of_memory(error):
            raise memory_error(plan, cause) from None
        raise
