"""What tests of the stores of limits do with a limiter."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from tidewright_gateway.admission.limits import Limiter, Reservation, Subject
from tidewright_gateway.auth.callers import Limits
from tidewright_gateway.openai.errors import ApiError

ONE = [Subject("key a", Limits(concurrent=1))]
"""One at a time."""


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    deadline = time.monotonic() + 60
    while not await condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


async def passes(limiter: Limiter, subjects: list[Subject] = ONE, cost: int = 1) -> Reservation | None:
    """None if it is over a limit."""
    try:
        return await limiter.reserve(subjects, cost)
    except ApiError as error:
        if error.status == 429:
            return None
        raise


async def limits_apply(limiter: Limiter) -> bool:
    """Of two at once, one."""
    try:
        both = [await passes(limiter), await passes(limiter)]
    except ApiError:  # a 503
        return False
    for reservation in both:
        if reservation:
            await limiter.settle(reservation, 1)
    return None in both
