"""limits/limiter.py: settling, headers, refusals, and whose limits they are."""

from __future__ import annotations

import asyncio

import pytest
from pydantic import ValidationError

from gateway.test_limits import Clock, in_loop
from tidewright_gateway.admission.limits import Limiter, Subject, make_limiter, subjects_of
from tidewright_gateway.admission.limits.headers import duration
from tidewright_gateway.admission.limits.memory import MemoryStore
from tidewright_gateway.auth.callers import ANONYMOUS, Caller, Limits
from tidewright_gateway.config import GatewaySettings
from tidewright_gateway.openai.errors import ApiError

FULL = Limits(requests_per_second=2, concurrent=3, tokens_per_minute=1000, tokens_per_day=5000)


def limiter(clock: Clock | None = None) -> Limiter:
    return Limiter(MemoryStore(clock or Clock()))


def test_a_reservation_is_settled_once() -> None:
    async def scenario() -> None:
        limits, subjects = limiter(), [Subject("key a", Limits(tokens_per_day=1000))]
        first = await limits.reserve(subjects, 1000)
        await limits.settle(first, 400)
        await limits.settle(first, 0)
        second = await limits.reserve(subjects, 600)
        with pytest.raises(ApiError):
            await limits.reserve(subjects, 1)
        await limits.settle(second, 0)

    asyncio.run(scenario())


def test_who_has_no_limits_costs_nothing() -> None:
    # The store is none: it would be an error to ask it.
    limits = Limiter(None)  # type: ignore[arg-type]
    reservation = in_loop(limits.reserve([Subject("key a", Limits())], 10**9))
    assert reservation.headers == {}
    in_loop(limits.settle(reservation, 5))


def test_headers_tell_of_the_limit_that_leaves_the_least() -> None:
    async def scenario() -> None:
        limits = limiter()
        key, user = Subject("key a", FULL), Subject("user 'b' of key a", Limits(tokens_per_minute=600))
        reservation = await limits.reserve([key, user], 300)
        assert reservation.headers == {
            "X-RateLimit-Limit-Requests": "2",
            "X-RateLimit-Remaining-Requests": "1",
            "X-RateLimit-Reset-Requests": "500ms",
            "X-RateLimit-Limit-Tokens": "600",
            "X-RateLimit-Remaining-Tokens": "300",
            "X-RateLimit-Reset-Tokens": "30s",
        }
        assert set((await limits.reserve([user], 0)).headers) == {
            f"X-RateLimit-{what}-Tokens" for what in ("Limit", "Remaining", "Reset")
        }

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("limits", "cost", "message", "retry_after"),
    [
        (Limits(requests_per_second=0.5), 1, "key a has used up its 0.5 requests per second; try again in 2s", "2"),
        (Limits(concurrent=1), 1, "key a has 1 request at one time; wait until one of them ends", "1"),
        (
            Limits(tokens_per_minute=120),
            100,
            "key a has 20 left of its 120 tokens per minute, .* 100 .* in 40s",
            "40",
        ),
        (Limits(tokens_per_day=120), 100, "key a has 20 left of its 120 tokens per day, .* in 5m0s", "300"),
        (Limits(tokens_per_day=99), 100, "may need 100 tokens .* key a has 99 tokens per day; lower max_tokens", None),
        (Limits(tokens_per_minute=1_234_567), 2 * 10**6, "key a has 1234567 tokens per minute", None),
    ],
)
def test_a_refusal_says_which_limit_and_when_to_try_again(
    limits: Limits, cost: int, message: str, retry_after: str | None
) -> None:
    async def scenario() -> None:
        subjects, checks = [Subject("key a", limits)], limiter()
        if retry_after:
            await checks.reserve(subjects, cost)
        with pytest.raises(ApiError, match=message) as refused:
            await checks.reserve(subjects, cost)
        error = refused.value
        assert (error.status, error.code, error.type) == (429, "rate_limit_exceeded", "rate_limit_error")
        assert error.headers.get("Retry-After") == retry_after
        assert error.headers.get("X-Should-Retry") == (None if retry_after else "false")
        assert ("X-RateLimit-Remaining-Tokens" in error.headers) == bool(
            limits.tokens_per_minute or limits.tokens_per_day
        )

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0ms"), (0.0121, "13ms"), (1.5, "1.5s"), (59.9999, "60s"), (360, "6m0s"), (86_399.2, "24h0m0s")],
)
def test_durations_look_as_those_of_openai(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_subjects_are_the_key_and_the_user() -> None:
    options = GatewaySettings(limit_concurrent=7, limit_tokens_per_day=100)
    default = Limits(concurrent=7, tokens_per_day=100)
    of_user = Limits(concurrent=1)
    own = Caller("a", limits=Limits(requests_per_second=1), user_limits=of_user)
    assert subjects_of(ANONYMOUS, None, options) == [Subject("key anonymous", default)]
    assert subjects_of(own, "", options) == [Subject("key a", own.limits)]
    key, user = subjects_of(Caller("a", user_limits=of_user), "x", options)
    assert (key.limits, user) == (default, Subject("user 'x' of key a", of_user))


def test_no_user_has_the_account_of_another() -> None:
    options = GatewaySettings()
    users = ["x", "x' of key b", "\ud800", "ä" * 100, "ä" * 101]
    names = [subjects_of(Caller(key), user, options)[1].name for key in ("a", "b") for user in users]
    assert len(set(names)) == len(names)
    assert all(name.isascii() and len(name) < 100 for name in names)


@pytest.mark.parametrize(
    "options",
    [
        {"limit_requests_per_second": -1},
        {"limit_requests_per_second": "nan"},
        {"limit_concurrent": -1},
        {"limit_tokens_per_minute": -1},
        {"limit_tokens_per_day": -1},
        {"limits_store": "localhost:6379"},
        {"limits_when_lost": "maybe"},
    ],
)
def test_bad_options_are_refused(options: dict) -> None:
    with pytest.raises(ValidationError, match=next(iter(options))):
        GatewaySettings(**options)


def test_a_gateway_alone_counts_in_memory() -> None:
    assert isinstance(make_limiter(GatewaySettings())._store, MemoryStore)
