"""resilience/breaker.py against a model that keeps the whole history and counts it anew each time.

Times are multiples of a quarter second, and so are the config's, so that no comparison hangs on rounding.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tidewright.resilience.breaker import BreakerConfig, CircuitBreaker, Permit, Refusal
from tidewright.resilience.outcome import Outcome, Verdict
from tidewright.resilience.window import BUCKETS

CONFIGS = st.builds(
    BreakerConfig,
    consecutive_failures=st.sampled_from([1, 2, 5, 1000]),
    failure_rate=st.sampled_from([0.25, 0.5, 1.0]),
    window=st.sampled_from([2.5, 10.0]),
    min_calls=st.sampled_from([2, 4, 8]),
    cool_down=st.sampled_from([0.5, 1.0]),
    cool_down_factor=st.sampled_from([1.0, 2.0, 3.0]),
    cool_down_max=st.sampled_from([1.0, 6.0]),
    probe_timeout=st.sampled_from([0.5, 3.0]),
    probe_successes=st.sampled_from([1, 2]),
)
STEPS = st.sampled_from([0.0, 0.25, 0.5, 1.0, 3.0, 20.0, -0.25, -1.0, -7.0, -100.0])


@dataclass
class Ticket:
    """The model's side of a permit."""

    era: int
    probe: bool
    done: bool = False


@dataclass
class Model:
    config: BreakerConfig
    state: str = "closed"
    era: int = 0
    calls: list[tuple[int, bool]] = field(default_factory=list)  # since it closed: bucket, failed
    row: list[bool] = field(default_factory=list)
    failed_probes: int = 0
    good_probes: int = 0
    waiting_since: float = 0.0
    in_slot: Ticket | None = None
    changes: Counter[tuple[str, str]] = field(default_factory=Counter)

    def go(self, state: str) -> None:
        self.changes[self.state, state] += 1
        self.state, self.era = state, self.era + 1

    def cool_down(self) -> float:
        grown = self.config.cool_down * self.config.cool_down_factor**self.failed_probes
        return min(grown, self.config.cool_down_max) if self.failed_probes else self.config.cool_down

    def acquire(self, now: float) -> Ticket | float:
        if self.state == "closed":
            return Ticket(self.era, probe=False)
        limit = self.cool_down() if self.state == "open" else self.config.probe_timeout
        if self.state == "open" or self.in_slot:
            self.waiting_since = min(self.waiting_since, now)
            if now < self.waiting_since + limit:
                return self.waiting_since + limit - now
        if self.state == "open":
            self.go("half_open")
            self.good_probes = 0
        self.waiting_since = now
        self.in_slot = Ticket(self.era, probe=True)
        return self.in_slot

    def record(self, ticket: Ticket, verdict: Verdict, now: float) -> None:
        current = ticket.era == self.era and not ticket.done and (not ticket.probe or ticket is self.in_slot)
        ticket.done = True
        if not current:
            return
        if ticket.probe:
            self.in_slot = None
        if verdict is Verdict.IGNORED:
            return
        failed = verdict is Verdict.FAILURE
        if ticket.probe and failed:
            self.failed_probes += 1
            self.go("open")
            self.waiting_since = now
        elif ticket.probe:
            self.good_probes += 1
            if self.good_probes == self.config.probe_successes:
                self.go("closed")
                self.calls, self.row, self.failed_probes = [], [], 0
        else:
            self.call(failed, now)

    def call(self, failed: bool, now: float) -> None:
        bucket = self.look(now)
        self.calls.append((bucket, failed))
        self.row.append(failed)
        recent = [failed for _, failed in self.calls]
        in_a_row = self.row[-self.config.consecutive_failures :]
        many = len(in_a_row) == self.config.consecutive_failures and all(in_a_row)
        often = len(recent) >= self.config.min_calls and sum(recent) / len(recent) >= self.config.failure_rate
        if failed and (many or often):
            self.go("open")
            self.waiting_since = now

    def look(self, now: float) -> int:
        """Forgets calls that are too old, or all if the clock was set back by a whole window; the bucket of now."""
        bucket = int(now / (self.config.window / BUCKETS))
        newest = max((bucket for bucket, _ in self.calls), default=bucket)
        if newest - bucket >= BUCKETS:
            self.calls = []
        else:
            bucket = max(bucket, newest)
        self.calls = [(index, failed) for index, failed in self.calls if index > bucket - BUCKETS]
        return bucket


class BreakerMachine(RuleBasedStateMachine):
    @initialize(config=CONFIGS)
    def begin(self, config: BreakerConfig) -> None:
        self.now = 1000.0
        self.breaker, self.model = CircuitBreaker(config), Model(config)
        self.open_calls: list[tuple[Permit, Ticket]] = []

    @rule(step=STEPS)
    def time_passes(self, step: float) -> None:
        self.now = max(self.now + step, 0.0)

    @rule(count=st.sampled_from([1, 1, 1, 2, 30]))
    def callers_arrive(self, count: int) -> None:
        for _ in range(count):
            decision, expected = self.breaker.acquire(self.now), self.model.acquire(self.now)
            if isinstance(decision, Refusal):
                assert decision.retry_after == expected
                assert decision.retry_after > 0
            else:
                assert isinstance(expected, Ticket)
                assert decision.is_probe == expected.probe
                self.open_calls.append((decision, expected))

    @rule()
    def the_cool_down_passes(self) -> None:
        decision = self.breaker.acquire(self.now)
        expected = self.model.acquire(self.now)
        if isinstance(decision, Refusal):
            self.now += decision.retry_after
            assert decision.retry_after == expected
        else:
            assert isinstance(expected, Ticket)
            self.open_calls.append((decision, expected))

    @rule(outcomes=st.lists(st.sampled_from([Outcome.SUCCESS, Outcome.ENGINE_FAILED, Outcome.CANCELLED]), max_size=9))
    def there_is_traffic(self, outcomes: list[Outcome]) -> None:
        for outcome in outcomes:
            self.callers_arrive(1)
            self.the_newest_call_ends(outcome)

    @rule(data=st.data(), outcome=st.sampled_from(list(Outcome)), again=st.booleans())
    def a_call_ends(self, data: st.DataObject, outcome: Outcome, again: bool) -> None:
        """Any call that was ever begun, in any order; some report twice, some never."""
        if self.open_calls:
            index = data.draw(st.integers(0, len(self.open_calls) - 1))
            self.report(index, outcome, again)

    @rule(outcome=st.sampled_from([Outcome.SUCCESS, Outcome.ENGINE_FAILED, Outcome.ENGINE_FAILED]))
    def the_newest_call_ends(self, outcome: Outcome) -> None:
        if self.open_calls:
            self.report(len(self.open_calls) - 1, outcome)

    def report(self, index: int, outcome: Outcome, again: bool = False) -> None:
        permit, ticket = self.open_calls[index] if again else self.open_calls.pop(index)
        self.breaker.record(permit, outcome, self.now)
        self.model.record(ticket, outcome.verdict, self.now)

    @invariant()
    def they_agree(self) -> None:
        model, snapshot = self.model, self.breaker.snapshot(self.now)
        model.look(self.now)
        assert snapshot.state.value == model.state
        assert snapshot.generation == model.era
        assert snapshot.cool_down == model.cool_down()
        assert (snapshot.window_calls, snapshot.window_failures) == (
            len(model.calls),
            sum(failed for _, failed in model.calls),
        )
        counted = {(before.value, after.value): count for (before, after), count in snapshot.transitions.items()}
        assert counted == {change: model.changes[change] for change in counted}
        assert sum(counted.values()) == model.era


TestBreakerMachine = BreakerMachine.TestCase
TestBreakerMachine.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
