"""What a step costs, learned from the steps that were computed: seconds for so many streams, and for prompt tokens.

    seconds = base + stream * streams + token * tokens + context * tokens * (tokens before them)

It follows model, machine and load; nothing is configured. The two halves are fitted one after the other: steps of
streams alone say what streams cost, and what a step with prompts takes beyond that is the prompts'.
"""

from __future__ import annotations

from typing import NamedTuple

from tidewright.engine.pace import prompt_cost
from tidewright.engine.plan import StepPlan

_DECAY = 0.5 ** (1 / 5)  # of a step's weight with each later step of its kind
_RIDGE = 1e-3  # how firmly the second coefficient stays where it is (at first 0) unless steps differ in it
_LEAST_REST = 0.1  # of a step: less of it than that says little about the prompts that are in it
_CONTEXT_UNIT = 4096  # tokens; of the order of a long context, so that both coefficients of prompts are of one order


class _Fit:
    """value = first * x + second * y, with neither negative: weighted least squares of relative errors.

    An error is relative to what was measured or to what was expected, whichever is more, so it is at most 1 for a step
    that took too long, whatever held it up, and for one that took no time: a few such steps move nothing. A change
    that lasts is followed: half of a threefold slowdown after 20 steps.
    """

    def __init__(self) -> None:
        self.first = self.second = 0.0
        self.count = 0
        self._xx = self._xy = self._yy = self._xv = self._yv = 0.0

    def add(self, x: float, y: float, value: float, least: float = 0.0) -> None:
        """`least`: what errors are relative to at least."""
        scale = max(value, self.first * x + self.second * y, least)
        x, y, value = x / scale, y / scale, value / scale
        self._xx = _DECAY * self._xx + x * x
        self._xy = _DECAY * self._xy + x * y
        self._yy = _DECAY * self._yy + y * y
        self._xv = _DECAY * self._xv + x * value
        self._yv = _DECAY * self._yv + y * value
        self.count += 1
        self._solve()

    def _solve(self) -> None:
        xx, xy, xv = self._xx, self._xy, self._xv
        yy, yv = self._yy + _RIDGE * xx, self._yv + _RIDGE * xx * self.second
        determinant = xx * yy - xy * xy
        self.first = (xv * yy - yv * xy) / determinant
        self.second = (yv * xx - xv * xy) / determinant
        if self.second < 0:
            self.first, self.second = max(xv / xx, 0.0), 0.0
        elif self.first < 0:
            self.first, self.second = 0.0, max(yv / yy, 0.0)


class StepLoad(NamedTuple):
    """What a plan computes."""

    streams: int  # sequences that get their next token; what guesses cost beside it is part of what a stream costs
    tokens: int  # of prompts
    context: float  # the sum of the tokens before each of them

    @classmethod
    def of(cls, plan: StepPlan) -> StepLoad:
        streams = tokens = 0
        context = 0.0
        for planned in plan.sequences:
            count = len(planned.token_ids)
            if count == len(planned.draws):
                streams += 1
            else:
                tokens += count
                context += count * (planned.start + count / 2)
        return cls(streams, tokens, context)


class StepCost:
    def __init__(self, max_running: int) -> None:
        self._streams, self._prompts = _Fit(), _Fit()
        # Of a number of streams alone nobody can tell what base is; this prefers it: more streams cost little.
        self._stream_unit = max(max_running, 1)

    def computed(self, load: StepLoad, seconds: float) -> None:
        seconds = max(seconds, 1e-6)
        if not load.tokens:
            self._streams.add(1.0, load.streams / self._stream_unit, seconds)
            return
        rest = seconds - self.decode(load.streams)
        self._prompts.add(load.tokens, load.context / _CONTEXT_UNIT, rest, _LEAST_REST * seconds)

    @property
    def is_known(self) -> bool:
        """Both kinds of steps were measured."""
        return bool(self._streams.count and self._prompts.count)

    @property
    def token(self) -> float:
        """Seconds that a prompt token takes,"""
        return self._prompts.first

    @property
    def context(self) -> float:
        """and for each token before it."""
        return self._prompts.second / _CONTEXT_UNIT

    def decode(self, streams: int) -> float:
        """Seconds of a step of so many streams; 0 as long as that is not known."""
        return self._streams.first + self._streams.second * streams / self._stream_unit

    def prompt(self, start: int, count: int) -> float:
        """Seconds of `count` prompt tokens behind the first `start`, beside what the step takes anyway."""
        return prompt_cost(self.token, self.context, start, count)
