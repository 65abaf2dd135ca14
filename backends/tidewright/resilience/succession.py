"""What may follow a call that failed, for whoever has another model or another replica to ask. Pure.

`failsafe` (in Triton) and the gateway's failover decide by the same rules; docs/resilience.md has them in one table.
"""

from __future__ import annotations

from tidewright.resilience.errors import ModelError
from tidewright.resilience.outcome import Outcome
from tidewright.schema import SamplingParams

# The request's own doing, or the caller's: anybody else would be told the same, or nobody waits any longer.
FINAL = frozenset((Outcome.INVALID, Outcome.CANCELLED, Outcome.REQUEST_TIMEOUT))
# Whoever was asked is gone or says nothing: it computes no longer, so whoever goes on elsewhere adds no load.
LOST = frozenset((Outcome.UNAVAILABLE, Outcome.STALLED, Outcome.STUB_DIED))


def fallback_may_answer(sampling: SamplingParams) -> bool:
    """Whether the fallback can be asked the same at all: it has no LoRA adapters, and must not answer without them."""
    return sampling.lora_name is None


def fallback_can_go_on(sampling: SamplingParams, delivered: bool) -> bool:
    """Whether the fallback can take up what the decoder has written. `delivered`: that is something.

    It would not know how far a grammar is, nor which of several outputs have ended.
    """
    return not delivered or (sampling.n == 1 and not sampling.guided)


def failed_at_fallback(error: ModelError) -> ModelError:
    """What the fallback's refusal is to the caller: the decoder would have taken the request."""
    if error.outcome is not Outcome.INVALID:
        return error
    return ModelError(str(error), Outcome.ENGINE_FAILED)
