"""resilience/config.py: what is refused, where the values go, and that the docs list them as they are."""

from __future__ import annotations

from dataclasses import asdict

import pytest
from pydantic import ValidationError

from tidewright.resilience.config import ResilienceSettings


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"breaker_cooldown": 1}, "breaker_cooldown"),
        ({"breaker_consecutive_failures": 0}, "greater than or equal to 1"),
        ({"breaker_failure_rate": 0}, "greater than 0"),
        ({"breaker_failure_rate": 1.1}, "less than or equal to 1"),
        ({"breaker_window": float("nan")}, "finite"),
        ({"degrade_wait_shed": float("inf")}, "finite"),
        (
            {"breaker_cool_down": 60},
            "breaker_cool_down must be at most breaker_cool_down_max, but they are 60 and 30",
        ),
        ({"retry_base_delay": 5}, "retry_base_delay must be at most retry_max_delay"),
        ({"degrade_kv_cache_short": 0.98}, "degrade_kv_cache_short must be below degrade_kv_cache_fallback"),
        ({"degrade_queue_fallback": 0.95}, "degrade_queue_fallback must be below degrade_queue_shed"),
        ({"degrade_wait_short": 20}, "degrade_wait_short must be below degrade_wait_fallback"),
        ({"degrade_release": 1}, "less than 1"),
        ({"retry_budget_share": 0, "retry_budget_floor": 0}, "set retry_max_attempts to 1"),
    ],
)
def test_bad_values_are_refused_and_named(options: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ResilienceSettings(**options)


def test_a_constant_cool_down_and_retries_switched_off_are_fine() -> None:
    ResilienceSettings(breaker_cool_down=30, breaker_cool_down_max=30)
    ResilienceSettings(retry_max_attempts=1, retry_budget_share=0, retry_budget_floor=0)


def test_each_value_arrives_where_it_belongs() -> None:
    settings = ResilienceSettings(**{name: _other(field) for name, field in ResilienceSettings.model_fields.items()})
    values = settings.model_dump()
    arrived = {
        **{f"breaker_{name}": value for name, value in asdict(settings.breaker_config()).items()},
        **{f"retry_{name}": value for name, value in asdict(settings.retry_policy()).items()},
        **{f"retry_budget_{name}": value for name, value in asdict(settings.budget_config()).items()},
    }
    for name, value in asdict(settings.ladder_config()).items():
        levels = value.items() if isinstance(value, dict) else [("", value)]
        arrived |= {f"degrade_{name}_{level}".rstrip("_"): number for level, number in levels}
    assert arrived.pop("degrade_kv_cache_shed") == float("inf")
    assert arrived == {name: value for name, value in values.items() if name != "degrade_max_tokens"}


def _other(field) -> float:
    """Not the default, but in the same order as the others."""
    return field.default + 1 if isinstance(field.default, int) else (field.default or 1) * 1.01


def test_values_cannot_change_later() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        ResilienceSettings().retry_max_delay = 1.0
