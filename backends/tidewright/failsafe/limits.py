"""How long an attempt at the decoder may take, which depends on what is known to be wrong there."""

from __future__ import annotations

from dataclasses import dataclass

from tidewright.failsafe.pulse import Kind, Trouble
from tidewright.resilience.outcome import Outcome


@dataclass(frozen=True)
class TimeLimits:
    """In seconds; what each means stands in `Settings`."""

    patience: float
    first_token: float
    stall: float


@dataclass(frozen=True)
class Progress:
    """Of one attempt; times as `now`."""

    streams: bool
    """If not, its first response is its last, and nobody sees how far it is."""
    began: float
    last_token: float | None


def overdue(
    progress: Progress, trouble: Trouble | None, limits: TimeLimits, now: float, *, has_fallback: bool
) -> Outcome | None:
    """Why not to wait for the decoder any longer; None: wait.

    Whose tokens are lost leaves at once. Nobody waits for a silent engine beyond `patience`. One that starts again
    takes up what it had, so who may have tokens there waits for `stall`, and who can't have any for `patience`.
    Without a fallback the decoder is all there is, as long as it has the request.
    """
    if trouble and trouble.kind is Kind.STUB_DIED:
        return Outcome.STUB_DIED if progress.began < trouble.since else None  # later ones are at the next stub, if any
    if not has_fallback:
        return None
    if trouble and trouble.kind is not Kind.UNLOADED:
        may_have_tokens = progress.last_token is not None or (not progress.streams and progress.began < trouble.since)
        is_long = trouble.kind is Kind.RESTARTING and may_have_tokens
        return trouble.kind.outcome if now - trouble.since > (limits.stall if is_long else limits.patience) else None
    if progress.last_token is not None:
        return Outcome.STALLED if now - progress.last_token > limits.stall else None
    return Outcome.FIRST_TOKEN_TIMEOUT if progress.streams and now - progress.began > limits.first_token else None
