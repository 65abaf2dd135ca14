"""Refuses a request that would get its first token too late, at once, with the wait that is expected.

For rank 0, before the scheduler gets it: this reads clocks and measured times. Whatever is not known yet refuses
nobody, and who would begin at once is never refused.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import NamedTuple

from tidewright.engine.fairness import goes_before
from tidewright.engine.latency import LatencyController
from tidewright.engine.limits import RequestRefusedError, longest
from tidewright.engine.messages import SequenceOutput, Submit
from tidewright.engine.prediction import Backlog, Work, seconds_to_first_token
from tidewright.engine.scheduler import Scheduler
from tidewright.engine.sequence import Sequence
from tidewright.engine.targets import Targets
from tidewright.engine.victims import victims
from tidewright.errors import seconds_text
from tidewright.kv_cache.budget import blocks_of
from tidewright.schema import expected_wait

# Of ttft_target. The last that is let in gets its first token when it was predicted, give or take an error: if that
# were the target itself, half of all would miss it as long as more come than can be served.
MARGIN = 0.8
MIN_ENDED = 4  # outputs whose length is known, before anybody is refused
_NEWEST = 1 / 16  # the weight of the newest output's length, and of the newest error of a prediction
_CORRECTION = (0.5, 2.0)  # bounds of what predictions are multiplied by, from what came of earlier ones
_LEAST_TO_LEARN = 0.05  # seconds: an error of a shorter wait says nothing about a longer one
_COST = 20  # a prediction may take 1/20 of the time;
_MOST_LAST = 1024  # tenants whose last prediction is kept
_FRESH = 1.0  # meanwhile the last one of the same tenant and priority stands for so many seconds


@dataclass
class _Accepted:
    sequence: Sequence
    at: float
    predicted: float  # seconds, uncorrected; 0: it was not


class _Last(NamedTuple):
    at: float
    seconds: float


class Admission:
    def __init__(self, scheduler: Scheduler, latency: LatencyController, targets: Targets) -> None:
        """Of `targets`, those for the first token. Without one, only deadlines count."""
        self._scheduler, self._latency, self._targets = scheduler, latency, targets
        self._accepted: dict[int, _Accepted] = {}  # that have not ended
        self._ended = 0
        self._used = 1.0  # of the tokens that outputs might have, the share that they have
        self._correction = 1.0
        self._last: dict[tuple[int, str], _Last] = {}
        self._next_at = 0.0
        self._some_wait = False  # did when the last step was planned
        self.refused_by_timeout = self.refused_by_target = 0

    def check(self, request: Submit, sequence: Sequence) -> float:
        """The predicted seconds to its first token; 0: none were predicted.

        Raises:
            RequestRefusedError: it would come too late.
        """
        target = self._targets.ttft(sequence.sampling)
        if not self._is_measured:
            return 0.0
        sequence.likely_cached = self._scheduler.likely_cached(sequence)  # also for those that come behind it
        if not self._may_refuse(request, target):
            return 0.0
        now = time.monotonic()
        left = math.inf if request.deadline is None else request.deadline - now
        predicted = self._predict(sequence, now) if left > 0 else 0.0
        expected = predicted * self._correction
        limit = min(left, MARGIN * target if target else math.inf)
        if expected <= limit:
            return predicted
        if expected > left:
            self.refused_by_timeout += 1
            rule = f"its timeout leaves {seconds_text(left)} s"
        else:
            self.refused_by_target += 1
            rule = f"{MARGIN:g} of its ttft_target are {seconds_text(MARGIN * target)} s"
        waiting = len(self._scheduler.waiting)
        wait = "1 request waits" if waiting == 1 else f"{waiting} requests wait"
        message = f"{wait}, so that its first token is expected in {seconds_text(expected)} s, but {rule}"
        raise RequestRefusedError(message + expected_wait(expected - limit), "overloaded")

    def accepted(self, sequence: Sequence, predicted: float) -> None:
        self._accepted[sequence.request_id] = _Accepted(sequence, time.monotonic(), predicted)
        key = _key(sequence)
        if last := self._last.get(key):  # which stands for a while: the next one waits for this one, too
            self._last[key] = _Last(last.at, last.seconds + self._share(sequence))

    def planned(self) -> None:
        """A step was: who waits now did not get into it."""
        self._some_wait = len(self._scheduler.waiting) > 0

    def left(self, request_id: int) -> None:
        """It ended without an answer."""
        self._accepted.pop(request_id, None)

    def told(self, output: SequenceOutput, now: float) -> None:
        """Learns from the first tokens of a request, and from its end."""
        accepted = self._accepted.get(output.request_id)
        if accepted is None:
            return
        if accepted.predicted > _LEAST_TO_LEARN and output.token_ids:
            ratio = (now - accepted.at) / accepted.predicted
            low, high = _CORRECTION
            self._correction += _NEWEST * (min(max(ratio, low), high) - self._correction)
        accepted.predicted = 0.0
        if output.finish_reason:
            del self._accepted[output.request_id]
            sequence = accepted.sequence
            most = self._most_output(sequence)
            if output.finish_reason in ("stop", "length") and most > 0:
                self._ended += 1
                weight = max(_NEWEST, 1 / self._ended)
                self._used += weight * (sequence.num_generated / most - self._used)

    def _may_refuse(self, request: Submit, target: float) -> bool:
        has_limit = bool(target) or request.deadline is not None
        # One that an earlier engine had begun, or that waited in the bridge, has been let in already.
        is_new = not (request.output_token_ids or request.accepted_before)
        scheduler = self._scheduler
        waits = self._some_wait or len(scheduler.waiting) + len(scheduler.running) >= self._places
        return has_limit and is_new and waits

    def _share(self, sequence: Sequence) -> float:
        """Seconds by which it delays those behind it."""
        work, places = self._work(sequence), self._places
        seconds = self._latency.cost.prompt(work.start, work.prompt)
        if len(self._scheduler.waiting) + len(self._scheduler.running) < places:
            return seconds
        return seconds + work.output * self._latency.cost.decode(places) / places

    @property
    def _is_measured(self) -> bool:
        return self._latency.cost.is_known and self._ended >= MIN_ENDED

    @property
    def _places(self) -> int:
        return min(self._scheduler.config.max_running, self._latency.running)

    def _predict(self, sequence: Sequence, now: float) -> float:
        key = _key(sequence)
        if now < self._next_at:
            last = self._last.get(key)
            return last.seconds if last and now - last.at < _FRESH else 0.0
        if len(self._last) >= _MOST_LAST:
            self._last.clear()
        scheduler = self._scheduler
        # As the scheduler will set them.
        sequence.account = scheduler.waiting.standing(sequence.sampling)
        sequence.order = (sequence.sampling.priority, 0)
        own = self._work(sequence)
        leaving = self._leaving(sequence, own.blocks)
        # A tenant that would have to make room waits for its next turn behind the new request.
        rivals = {other.account for other in leaving}
        ahead = scheduler.waiting.ahead(sequence.sampling, self._tokens)
        backlog = Backlog(
            [self._beside(sequence, other) for other in scheduler.running if other not in leaving],
            [self._work(other) for other in ahead if other.account not in rivals],
            scheduler.free_blocks + sum(len(other.block_table) for other in leaving),
            self._places,
        )
        seconds = seconds_to_first_token(backlog, own, self._latency)
        self._last[key] = _Last(now, seconds)
        self._next_at = now + _COST * (time.monotonic() - now)
        return seconds

    def _leaving(self, sequence: Sequence, needed: int) -> list[Sequence]:
        """Who would make room for it and so many blocks now; nobody, if it has room, or they would not suffice."""
        scheduler, leaving = self._scheduler, list[Sequence]()
        running, free = list(scheduler.running), scheduler.free_blocks
        held = blocks_of(sequence.num_known, scheduler.config.block_size)  # with those of the prefix cache
        others = victims(sequence, running, 0, held, (self._places, scheduler.cache.pool.num_blocks))
        while len(running) - len(leaving) >= self._places or free < needed:
            other = next(others, None)
            if other is None:
                return []
            leaving.append(other)
            free += len(other.block_table)
        return leaving

    def _beside(self, sequence: Sequence, running: Sequence) -> Work:
        """What is to do of one that runs; not its prompt, if the new one's goes before it."""
        work = self._work(running)
        return work._replace(prompt=0) if goes_before(sequence, running) else work

    def _tokens(self, sequence: Sequence) -> int:
        """That it will cost, as fairness counts them."""
        work = self._work(sequence)
        return work.prompt + 2 * work.output

    def _work(self, sequence: Sequence) -> Work:
        size, known = self._scheduler.config.block_size, sequence.num_known
        blocks = len(sequence.block_table) or blocks_of(known - sequence.likely_cached, size)
        start = sequence.num_computed if sequence.block_table else sequence.likely_cached
        most = self._most_output(sequence)
        expected = max(int(self._used * most), 1)
        # One that is longer than most are goes on for a while.
        output = max(expected - sequence.num_generated, expected // 4, 1)
        prompt = 0 if sequence.decodes else max(sequence.num_expected - start, 1)
        target = self._latency.step_target(sequence.sampling.priority, sequence.sampling.tpot_target)
        return Work(prompt, start, min(output, most - sequence.num_generated), blocks, target)

    def _most_output(self, sequence: Sequence) -> int:
        return longest(sequence, self._scheduler.config) - len(sequence.prompt_token_ids)


def _key(sequence: Sequence) -> tuple[int, str]:
    return sequence.sampling.priority, sequence.sampling.tenant
