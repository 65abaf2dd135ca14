"""How a call to the model ended, and what that says about the model's health."""

from __future__ import annotations

from enum import Enum


class Verdict(Enum):
    """What an outcome means to a breaker."""

    SUCCESS = "success"
    FAILURE = "failure"
    IGNORED = "ignored"


class Outcome(Enum):
    """Each has a `label` for logs and metrics, and the `verdict` that the breaker counts."""

    SUCCESS = ("success", Verdict.SUCCESS)

    # The model can't do its work, whoever asks.
    ENGINE_FAILED = ("engine_failed", Verdict.FAILURE)
    UNAVAILABLE = ("unavailable", Verdict.FAILURE)  # not loaded, not ready, not reachable
    FIRST_TOKEN_TIMEOUT = ("first_token_timeout", Verdict.FAILURE)  # the server's limit, not the client's timeout
    STALLED = ("stalled", Verdict.FAILURE)  # no sign of life, or no further token
    STUB_DIED = ("stub_died", Verdict.FAILURE)

    # These say something about the request or the load, and a model switched off for them would serve nobody better.
    INVALID = ("invalid", Verdict.IGNORED)
    CANCELLED = ("cancelled", Verdict.IGNORED)
    OVERLOADED = ("overloaded", Verdict.IGNORED)
    ENGINE_KILLED = ("engine_killed", Verdict.IGNORED)  # the request that ends every engine that has it
    REQUEST_TIMEOUT = ("request_timeout", Verdict.IGNORED)  # a long generation: the request's own timeout ended it

    def __init__(self, label: str, verdict: Verdict) -> None:
        self.label = label
        self.verdict = verdict
