"""The error of a call to a model, and what its text says of how the call ended."""

from __future__ import annotations

from tidewright.resilience.outcome import Outcome
from tidewright.schema import EXPECTED_WAIT, KILLS_ENGINES, FinishReason

# How the text of an error ends, if it is one of ours.
_BY_REASON: dict[str, Outcome] = {
    "[invalid]": Outcome.INVALID,
    "[cancelled]": Outcome.CANCELLED,
    "[overloaded]": Outcome.OVERLOADED,
    "[timeout]": Outcome.REQUEST_TIMEOUT,
    "[engine_failed]": Outcome.ENGINE_FAILED,
}
_REASONS: dict[Outcome, FinishReason] = {
    Outcome.INVALID: "invalid",
    Outcome.CANCELLED: "cancelled",
    Outcome.OVERLOADED: "overloaded",
    Outcome.REQUEST_TIMEOUT: "timeout",
}


class ModelError(Exception):
    """A model answered with an error, or there is none to answer."""

    def __init__(self, message: str, outcome: Outcome | None = None, limit: str = "") -> None:
        """`limit`: of the caller, that refused the request."""
        self.limit = limit
        text, _, mark = message.rpartition(" ")
        known = _BY_REASON.get(mark)
        super().__init__(text if known else message)
        if known is Outcome.ENGINE_FAILED and KILLS_ENGINES in text:  # others may quote what a caller has sent
            known = Outcome.ENGINE_KILLED
        self.outcome = outcome or known or (Outcome.STUB_DIED if "Stub process" in message else Outcome.UNAVAILABLE)

    @property
    def expected_wait(self) -> float | None:
        """Seconds until the model has room, if it refused the request for its load and said so."""
        found = EXPECTED_WAIT.search(str(self)) if self.outcome is Outcome.OVERLOADED else None
        return float(found[1]) if found else None

    @property
    def reason(self) -> FinishReason:
        return _REASONS.get(self.outcome, "engine_failed")
