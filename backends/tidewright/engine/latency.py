"""Keeps streams near their latency target: how much of the prompts a step computes, and how many sequences run.

It reads measured step times, which the scheduler does not; what it finds goes to the schedulers of all ranks as a
`StepPace`. The rules and their bounds: docs/scheduling.md.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from statistics import median

from tidewright.engine.pace import UNPACED, StepPace
from tidewright.engine.sequence import Sequence
from tidewright.engine.step_cost import StepCost, StepLoad
from tidewright.engine.targets import Targets
from tidewright.schema import SamplingParams

FIRST = 64  # prompt tokens, until a step with prompts has been measured; then at most twice as many as ever
LEAST = 16  # prompt tokens of a step, however slow the machine is
SHARE = 0.25  # what prompts get in any case: of the target's time, or of the streams' where that is more
# Shares of the target that streams alone may take: above the first fewer run, below the second one more may.
HOLD, RELEASE = 1 - SHARE, 0.8 * (1 - SHARE)
WINDOW = 8  # steps between two changes of that number
_SHARPEST = 0.75  # of what ran: no change takes more away at once


class LatencyController:
    def __init__(self, step_time: float, targets: Targets, max_tokens: int, max_running: int) -> None:
        """`step_time`: in seconds, where there is no target for tokens, and for the size of steps only; 0: any time."""
        self._step_time, self._targets = step_time, targets
        self._idle_target = targets.server_tpot or step_time or math.inf
        self._held = targets.server_tpot  # by the number that runs; 0: by nothing
        self._max_tokens, self._max_running = max_tokens, max_running
        self._most = min(FIRST, max_tokens)
        self._recent: list[float] = []  # seconds that streams took of each step
        self._streams = 0  # at most, in these
        self._own_targets = False
        self.cost = StepCost(max_running)
        self._running = max_running  # while something holds that number

    @property
    def running(self) -> int:
        """Sequences that may run."""
        return self._running if self._held else self._max_running

    def submitted(self, sampling: SamplingParams) -> None:
        self._own_targets |= sampling.tpot_target is not None

    def computed(self, load: StepLoad, seconds: float) -> None:
        prompts = load.tokens and load.tokens * self.cost.token + load.context * self.cost.context
        self.cost.computed(load, seconds)
        if 2 * load.tokens > self._most:
            self._most = min(2 * load.tokens, self._max_tokens)
        if self._held and load.streams:
            self._streams = max(self._streams, load.streams)
            self._recent.append(max(seconds - prompts, 0.0))
            if len(self._recent) == WINDOW:
                self._adapt(median(self._recent), self._streams)
                self._recent, self._streams = [], 0

    def pace(self, running: Collection[Sequence]) -> StepPace:
        """For the next step."""
        target = self._strictest(running)
        if target == math.inf:
            return UNPACED
        return StepPace(
            seconds=self.prompt_seconds(len(running), target),
            token=self.cost.token,
            context=self.cost.context,
            least=min(LEAST, self._max_tokens),
            most=self._most,
            running=self._running if self._held else UNPACED.running,
        )

    def prompt_seconds(self, streams: int, target: float) -> float:
        """For prompts, in a step beside so many streams that is to take `target` seconds."""
        decode = self.cost.decode(streams)
        return max(target - decode, SHARE * max(target, decode))

    def step_target(self, priority: int, own: float | None) -> float:
        """Seconds that a step may take while such a request runs, whose `own` target for tokens may be None; inf: any.

        Its own may be looser than its class's, and is never stricter: no caller slows the others' prompts.
        """
        target = self._targets.class_tpot(priority) or self._step_time
        return max(target, own or target) if target else math.inf

    def _strictest(self, running: Collection[Sequence]) -> float:
        """Of the step targets of those that run; while none does, the server's."""
        if not (self._own_targets or self._targets.has_classes) or not running:
            return self._idle_target
        asked = {(sequence.sampling.priority, sequence.sampling.tpot_target) for sequence in running}
        if self._targets.has_classes:
            held = {self._targets.class_tpot(priority) for priority, _ in asked}
            self._held = min(filter(None, held), default=0.0)
        return min(self.step_target(*each) for each in asked)

    def _adapt(self, seconds: float, streams: int) -> None:
        """`streams` took so long. More than may run since the last change: wait until some have ended."""
        if seconds > HOLD * self._held and streams <= self._running:
            fewer = int(streams * max(HOLD * self._held / seconds, _SHARPEST))
            self._running = max(min(fewer, self._running - 1), 1)
        elif seconds < RELEASE * self._held and streams >= self._running:
            self._running = min(self._running + 1, self._max_running)
