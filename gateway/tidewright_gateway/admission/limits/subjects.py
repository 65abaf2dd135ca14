"""Whose limits a request counts against."""

from __future__ import annotations

import hashlib

from tidewright_gateway.admission.limits.store import Subject
from tidewright_gateway.auth.callers import Caller, Limits
from tidewright_gateway.config import GatewaySettings

LONGEST_USER = 64  # characters that stand in the name of an account; of a longer user, a digest


def subjects_of(caller: Caller, user: str | None, settings: GatewaySettings) -> list[Subject]:
    """The key, and the `user` that the request names, if it names one. A key that has no limit at all gets those of
    the settings."""
    subjects = [Subject(f"key {caller.key_id}", caller.limits if caller.limits != Limits() else _default(settings))]
    if user:
        subjects.append(Subject(f"user {_short(user)} of key {caller.key_id}", caller.user_limits))
    return subjects


def _default(settings: GatewaySettings) -> Limits:
    return Limits(
        requests_per_second=settings.limit_requests_per_second or None,
        concurrent=settings.limit_concurrent or None,
        tokens_per_minute=settings.limit_tokens_per_minute or None,
        tokens_per_day=settings.limit_tokens_per_day or None,
    )


def _short(user: str) -> str:
    """Quoted, so that no user can name the account of another key; ASCII, whatever is in it."""
    if len(user) > LONGEST_USER:
        return hashlib.blake2b(ascii(user).encode(), digest_size=16).hexdigest()
    return ascii(user)
