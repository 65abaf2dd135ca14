"""How many tokens a step may compute: fewer after one ran out of memory, more again after many that did not. Pure.

What else takes memory (another process, a long context's scratch, fragments) may go away again, so the budget comes
back. Each failure doubles the steps until then: in n steps there are about log2(n / FIRST_PATIENCE) of them.
"""

from __future__ import annotations

FIRST_PATIENCE = 64  # steps


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
        """A step of so many tokens was not. Half of them are tried next: half of the budget may be more than that."""
        self.tokens, self._calm = max(count // 2, 1), 0
        self._patience *= 2
