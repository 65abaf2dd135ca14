"""What a caller reads of its limits: OpenAI's X-RateLimit headers, and why a request was refused."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from tidewright_gateway.admission.limits.buckets import DAY, MINUTE
from tidewright_gateway.admission.limits.store import Refusal, Subject, TakeResult
from tidewright_gateway.openai.errors import ApiError

_UNITS = {
    "requests_per_second": ("request", "per second"),
    "concurrent": ("request", "at one time"),
    "tokens_per_minute": ("token", "per minute"),
    "tokens_per_day": ("token", "per day"),
}


class _Room(NamedTuple):
    """Least first."""

    remaining: int
    limit: int
    reset: float
    """Seconds until all of it is there again."""


def headers_of(subjects: Sequence[Subject], result: TakeResult) -> dict[str, str]:
    """Of requests and of tokens, where something limits them: the limit that leaves the least."""
    requests, tokens = [], []
    for subject, usage in zip(subjects, result.usages, strict=True):
        limits = subject.limits
        if rate := limits.requests_per_second:
            requests.append(_room(max(1.0, rate), usage.requests, usage.requests / rate))
        if limit := limits.tokens_per_minute:
            tokens.append(_room(limit, usage.tokens, usage.tokens * MINUTE / limit))
        if limit := limits.tokens_per_day:
            tokens.append(_room(limit, usage.day, DAY - result.now % DAY))
    return _headers("Requests", requests) | _headers("Tokens", tokens)


def refused(subjects: Sequence[Subject], cost: int, result: TakeResult, refusal: Refusal) -> ApiError:
    """`cost`: tokens."""
    subject = subjects[refusal.subject]
    limit = _limit(refusal.limit, getattr(subject.limits, refusal.limit))
    headers = headers_of(subjects, result)
    if refusal.wait is None:
        message = (
            f"the request may need {cost} tokens (its prompt, and max_tokens for each choice), and {subject.name} has "
            f"{limit}; lower max_tokens, n or the prompt"
        )
        return ApiError(429, message, code="rate_limit_exceeded", headers=headers, may_retry=False, limit=refusal.limit)
    usage = result.usages[refusal.subject]
    if refusal.limit == "concurrent":
        message = f"{subject.name} has {limit}; wait until one of them ends"
    elif refusal.limit == "requests_per_second":
        message = f"{subject.name} has used up its {limit}; try again in {duration(refusal.wait)}"
    else:
        used = usage.tokens if refusal.limit == "tokens_per_minute" else usage.day
        left = _room(getattr(subject.limits, refusal.limit), used, 0).remaining
        message = (
            f"{subject.name} has {left} left of its {limit}, and the request may need {cost} (its prompt, and "
            f"max_tokens for each choice); try again in {duration(refusal.wait)}, or lower max_tokens, n or the prompt"
        )
    return ApiError(
        429, message, code="rate_limit_exceeded", retry_after=refusal.wait, headers=headers, limit=refusal.limit
    )


def _limit(name: str, value: float) -> str:
    """Such as: 1 request per second."""
    noun, span = _UNITS[name]
    return f"{value:.15g} {noun}{'' if value == 1 else 's'} {span}"


def duration(seconds: float) -> str:
    """As OpenAI's headers have it, such as 250ms, 12.5s or 6m0s; never less than it is."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    if seconds < 60:
        return f"{math.ceil(seconds * 1000) / 1000:g}s"
    minutes, whole = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes}m{whole}s" if hours else f"{minutes}m{whole}s"


def _room(limit: float, used: float, reset: float) -> _Room:
    return _Room(max(math.floor(limit - used), 0), math.floor(limit), reset)


def _headers(kind: str, rooms: list[_Room]) -> dict[str, str]:
    if not rooms:
        return {}
    least = min(rooms, key=lambda room: (room.remaining, -room.reset))
    return {
        f"X-RateLimit-Limit-{kind}": str(least.limit),
        f"X-RateLimit-Remaining-{kind}": str(least.remaining),
        f"X-RateLimit-Reset-{kind}": duration(least.reset),
    }
