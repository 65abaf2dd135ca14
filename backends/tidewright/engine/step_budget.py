"""How many tokens a step may compute: fewer after one ran out of memory, more again after many that did not. Pure.

What else takes memory (another process, a long context's scratch, fragments) may go away again, so the budget comes
back. Each failure doubles the steps until then: in n steps there are about log2(n / FIRST_PATIENCE) of them.
"""

from __future__ import annotations

from tidewright.engine.plan import StepPlan

FIRST_PATIENCE = 64  # steps


class StepMemoryError(RuntimeError):
    """Memory did not suffice for a step, and this engine can't go on with smaller ones. No request is to blame."""

    def __init__(self, message: str, step_tokens: int) -> None:
        """`step_tokens`: what a next engine's steps may have; 0: smaller ones are of no use."""
        super().__init__(message)
        self.step_tokens = step_tokens


def memory_error(plan: StepPlan, cause: str) -> StepMemoryError:
    """For a step that ran out of memory."""
    count = sum(planned.count for planned in plan.sequences)
    advice = "" if count > 1 else ", and there is no smaller one: lower kv_cache_memory, or see what else takes memory"
    message = f"a step of {count} tokens in {len(plan.sequences)} sequences ran out of memory{advice} ({cause})"
    return StepMemoryError(message, less_than(count))


def less_than(count: int) -> int:
    """Tokens of the next steps if one of `count` was too much: half of the budget may still be more than that."""
    return count // 2


class StepBudget:
    def __init__(self, most: int) -> None:
        self.tokens = self._most = most
        self._patience, self._calm = FIRST_PATIENCE, 0

    def computed(self) -> None:
        """A step was."""
        if self.tokens == self._most:
            return
        self._calm += 1
        if self._calm == self._patience:
            self.tokens, self._calm = min(2 * self.tokens, self._most), 0

    def out_of_memory(self, count: int) -> None:
        """A step of so many tokens was not."""
        self.tokens, self._calm = max(less_than(count), 1), 0
        self._patience *= 2
