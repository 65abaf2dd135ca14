"""When each request got how far: what the engine tells of it with its first tokens, and after preemptions."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from tidewright.engine.messages import SequenceOutput, StepTimes
from tidewright.engine.plan import StepPlan

MAX_PREEMPTIONS = 32  # of a request, told at a time


@dataclass
class _Waiting:
    """A request without a token. Times are of time.monotonic()."""

    arrived: float
    began: float = 0.0
    chunks: int = 0


class Timing:
    """Costs a request, not a token. Not part of the scheduler, which knows no clock."""

    def __init__(self) -> None:
        self._waiting: dict[int, _Waiting] = {}
        self._preempted: dict[int, list[float]] = {}  # not told yet

    def arrived(self, request_id: int, now: float) -> None:
        self._waiting[request_id] = _Waiting(now)

    def planned(self, plan: StepPlan, began: float) -> None:
        """A step computes this plan since `began`."""
        for request_id in plan.preempted:
            times = self._preempted.setdefault(request_id, [])
            if len(times) < MAX_PREEMPTIONS:
                times.append(began)
        for request_id in plan.ended:  # some ended before they ran, or before they had a token; or since a preemption
            self._waiting.pop(request_id, None)
            self._preempted.pop(request_id, None)
        if self._waiting:
            for sequence in plan.sequences:
                if waiting := self._waiting.get(sequence.request_id):
                    waiting.began = waiting.began or began
                    waiting.chunks += 1

    def told(self, output: SequenceOutput, now: float) -> SequenceOutput:
        """The output with its times, if there is news of them."""
        waiting = self._waiting.pop(output.request_id, None)
        preempted = self._preempted.pop(output.request_id, [])
        if waiting:
            times = StepTimes(waiting.began, waiting.chunks, now, preempted)
            queued = waiting.began - waiting.arrived
            return msgspec.structs.replace(output, queued_seconds=queued, times=times)
        if preempted:
            return msgspec.structs.replace(output, times=StepTimes(preempted=preempted))
        return output
