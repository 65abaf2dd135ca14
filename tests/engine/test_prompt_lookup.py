"""engine/prompt_lookup.py against a plain search."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tidewright.engine.prompt_lookup import PromptLookup


def search(tokens: list[int], count: int) -> list[int]:
    for size in (3, 2):
        for end in range(len(tokens) - 1, size - 1, -1):
            if tokens[end - size : end] == tokens[-size:]:
                return tokens[end : end + count]
    return []


@given(st.lists(st.integers(1, 3), max_size=40), st.lists(st.integers(1, 4), max_size=20), st.integers(1, 5))
def test_proposals_follow_the_latest_earlier_occurrence(prompt: list[int], growth: list[int], count: int) -> None:
    lookup, tokens = PromptLookup(), list(prompt)
    assert lookup.propose(tokens, count) == search(tokens, count)
    for amount in growth:
        tokens += [1 + (len(tokens) * 7 + i) % 3 for i in range(amount)]
        assert lookup.propose(tokens, count) == search(tokens, count)
