"""A breaker's config, and the steps that tests of it are made of."""

from __future__ import annotations

from tidewright.resilience.breaker import BreakerConfig, CircuitBreaker, Permit, Refusal, State
from tidewright.resilience.outcome import Outcome

CONFIG = BreakerConfig(
    consecutive_failures=3,
    failure_rate=0.5,
    window=10.0,
    min_calls=10,
    cool_down=1.0,
    cool_down_factor=2.0,
    cool_down_max=5.0,
    probe_timeout=4.0,
    probe_successes=1,
)


def permitted(breaker: CircuitBreaker, now: float) -> Permit:
    permit = breaker.acquire(now)
    assert isinstance(permit, Permit)
    return permit


def refused(breaker: CircuitBreaker, now: float) -> float:
    refusal = breaker.acquire(now)
    assert isinstance(refusal, Refusal)
    return refusal.retry_after


def call(breaker: CircuitBreaker, outcome: Outcome, now: float = 0.0) -> None:
    breaker.record(permitted(breaker, now), outcome, now)


def opened(config: BreakerConfig = CONFIG, now: float = 0.0) -> CircuitBreaker:
    breaker = CircuitBreaker(config)
    for _ in range(config.consecutive_failures):
        call(breaker, Outcome.ENGINE_FAILED, now)
    assert breaker.state is State.OPEN
    return breaker
