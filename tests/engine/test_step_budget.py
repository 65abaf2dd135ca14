"""engine/step_budget.py: smaller steps after one ran out of memory, larger ones again, and no flapping."""

from __future__ import annotations

import math

from tidewright.engine.step_budget import FIRST_PATIENCE, StepBudget


def test_half_of_the_step_that_failed_is_tried_next() -> None:
    budget = StepBudget(2048)
    budget.out_of_memory(60)  # of 2048 that it might have had
    assert budget.tokens == 30
    budget.out_of_memory(30)
    assert budget.tokens == 15
    budget.out_of_memory(1)
    assert budget.tokens == 1


def test_it_comes_back_and_fails_ever_more_rarely() -> None:
    budget, failures, steps = StepBudget(1000), 0, 100_000
    for _ in range(steps):
        if budget.tokens > 300:  # all that there is memory for
            failures += 1
            budget.out_of_memory(budget.tokens)
        else:
            budget.computed()
    assert failures <= math.log2(steps / FIRST_PATIENCE) + 2
    assert 150 <= budget.tokens <= 300
    for _ in range(4 * steps):  # now there is more
        budget.computed()
    assert budget.tokens == 1000
