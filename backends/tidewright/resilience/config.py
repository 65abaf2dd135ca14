"""Every option of the resilience library, validated once; the objects of the library are made from it."""

from __future__ import annotations

import math
from itertools import pairwise

from pydantic import BaseModel, ConfigDict, Field, model_validator

from tidewright.resilience.breaker import BreakerConfig
from tidewright.resilience.budget import BudgetConfig
from tidewright.resilience.degradation import LadderConfig, Thresholds
from tidewright.resilience.retry import RetryPolicy


class ResilienceSettings(BaseModel):
    """Flat and of plain numbers, so that each can be a flag and an environment variable. Times are in seconds."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    breaker_consecutive_failures: int = Field(
        5, ge=1, le=10_000, description="Failures in a row that open the breaker."
    )
    breaker_failure_rate: float = Field(
        0.5, gt=0, le=1, description="Share of failed calls in the window that opens the breaker."
    )
    breaker_window: float = Field(
        30.0, ge=0.1, le=3600, description="Seconds that the failure rate looks back, in ten buckets."
    )
    breaker_min_calls: int = Field(
        20, ge=1, le=1_000_000, description="Calls in the window below which the failure rate says nothing."
    )
    breaker_cool_down: float = Field(
        1.0, gt=0, le=3600, description="Seconds that the breaker stays open before the first probe."
    )
    breaker_cool_down_factor: float = Field(
        2.0, ge=1, le=10, description="Each failed probe makes the cool-down so many times longer."
    )
    breaker_cool_down_max: float = Field(30.0, gt=0, le=3600, description="Longest cool-down, in seconds.")
    breaker_probe_timeout: float = Field(
        10.0, gt=0, le=3600, description="Seconds after which a probe that did not report gives its place to another."
    )
    breaker_probe_successes: int = Field(
        1, ge=1, le=100, description="Successful probes, one after the other, that close the breaker."
    )
    retry_max_attempts: int = Field(
        3, ge=1, le=10, description="Attempts of a request, the first included; 1 switches retries off."
    )
    retry_base_delay: float = Field(
        0.05,
        gt=0,
        le=60,
        description="Longest delay before the first retry, in seconds; it doubles for each further one.",
    )
    retry_max_delay: float = Field(2.0, gt=0, le=600, description="Longest delay before any retry, in seconds.")
    retry_min_time: float = Field(
        0.1, ge=0, le=600, description="Seconds that an attempt needs at least; none is begun with less left."
    )
    retry_budget_share: float = Field(0.1, ge=0, le=1, description="Retries, as a share of requests.")
    retry_budget_floor: float = Field(
        1.0, ge=0, le=1000, description="Retries a second that are allowed however little traffic there is."
    )
    retry_budget_burst: float = Field(
        10.0, ge=1, le=100_000, description="Unused retries that are kept for later, at most; as many at the start."
    )
    degrade_kv_cache_short: float = Field(
        0.9, gt=0, le=1, description="Share of the KV cache in use from which answers are short."
    )
    degrade_kv_cache_fallback: float = Field(
        0.98, gt=0, le=1, description="Share of the KV cache in use from which only the fallback answers."
    )
    degrade_queue_short: float = Field(
        0.25, gt=0, le=1, description="Waiting requests, as a share of max_waiting, from which answers are short."
    )
    degrade_queue_fallback: float = Field(
        0.6, gt=0, le=1, description="The same, from which only the fallback answers."
    )
    degrade_queue_shed: float = Field(0.9, gt=0, le=1, description="The same, from which requests are refused.")
    degrade_wait_short: float = Field(
        2.0, gt=0, le=3600, description="Seconds in the queue from which answers are short."
    )
    degrade_wait_fallback: float = Field(
        10.0, gt=0, le=3600, description="Seconds in the queue from which only the fallback answers."
    )
    degrade_wait_shed: float = Field(
        30.0, gt=0, le=3600, description="Seconds in the queue from which requests are refused."
    )
    degrade_release: float = Field(
        0.8, gt=0, lt=1, description="A level is left below its threshold times this; between the two nothing changes."
    )
    degrade_dwell: float = Field(
        10.0, gt=0, le=3600, description="Seconds of calm before each step back towards all features."
    )
    degrade_max_tokens: int = Field(128, ge=1, le=1_000_000, description="Longest answer while answers are short.")

    @model_validator(mode="after")
    def _values_agree(self) -> ResilienceSettings:
        self._ascend("breaker_cool_down", "breaker_cool_down_max", strictly=False)
        self._ascend("retry_base_delay", "retry_max_delay", strictly=False)
        self._ascend("degrade_kv_cache_short", "degrade_kv_cache_fallback")
        self._ascend("degrade_queue_short", "degrade_queue_fallback", "degrade_queue_shed")
        self._ascend("degrade_wait_short", "degrade_wait_fallback", "degrade_wait_shed")
        if self.retry_max_attempts > 1 and not self.retry_budget_share and not self.retry_budget_floor:
            raise ValueError(
                "retry_budget_share and retry_budget_floor are both 0, so the budget is never filled; "
                "to switch retries off, set retry_max_attempts to 1"
            )
        return self

    def _ascend(self, *names: str, strictly: bool = True) -> None:
        for low, high in pairwise(names):
            below, above = getattr(self, low), getattr(self, high)
            if below > above or (strictly and below == above):
                relation = "below" if strictly else "at most"
                raise ValueError(f"{low} must be {relation} {high}, but they are {below:g} and {above:g}")

    def breaker_config(self) -> BreakerConfig:
        return BreakerConfig(
            consecutive_failures=self.breaker_consecutive_failures,
            failure_rate=self.breaker_failure_rate,
            window=self.breaker_window,
            min_calls=self.breaker_min_calls,
            cool_down=self.breaker_cool_down,
            cool_down_factor=self.breaker_cool_down_factor,
            cool_down_max=self.breaker_cool_down_max,
            probe_timeout=self.breaker_probe_timeout,
            probe_successes=self.breaker_probe_successes,
        )

    def retry_policy(self) -> RetryPolicy:
        return RetryPolicy(
            max_attempts=self.retry_max_attempts,
            base_delay=self.retry_base_delay,
            max_delay=self.retry_max_delay,
            min_time=self.retry_min_time,
        )

    def budget_config(self) -> BudgetConfig:
        return BudgetConfig(self.retry_budget_share, self.retry_budget_floor, self.retry_budget_burst)

    def smaller_ladder_config(self) -> LadderConfig:
        """Of the rung between short answers and the fallback: halfway between both."""

        def rung(short: float, fallback: float) -> Thresholds:
            return Thresholds((short + fallback) / 2, math.inf, math.inf)

        return LadderConfig(
            kv_cache=rung(self.degrade_kv_cache_short, self.degrade_kv_cache_fallback),
            queue=rung(self.degrade_queue_short, self.degrade_queue_fallback),
            wait=rung(self.degrade_wait_short, self.degrade_wait_fallback),
            release=self.degrade_release,
            dwell=self.degrade_dwell,
        )

    def ladder_config(self) -> LadderConfig:
        """A full KV cache alone sheds nothing: what then waits shows in the queue."""
        return LadderConfig(
            kv_cache=Thresholds(self.degrade_kv_cache_short, self.degrade_kv_cache_fallback, math.inf),
            queue=Thresholds(self.degrade_queue_short, self.degrade_queue_fallback, self.degrade_queue_shed),
            wait=Thresholds(self.degrade_wait_short, self.degrade_wait_fallback, self.degrade_wait_shed),
            release=self.degrade_release,
            dwell=self.degrade_dwell,
        )
