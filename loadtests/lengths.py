"""How long prompts and answers are: synthetic, in the shape of public traces, and the same for the same seed.

Lengths are lognormal, in and out independent of each other. A kind of traffic is described by the median and the 90th
percentile that its trace has, from which the two parameters follow. docs/load-testing.md shows how close that is.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass

Z90 = 1.2815515655446004
"""The 90th percentile of the standard normal distribution."""


@dataclass(frozen=True)
class Lognormal:
    """Tokens; a longer draw than `most` is cut to it, as contexts cut prompts."""

    mu: float
    sigma: float
    most: int

    @classmethod
    def of_percentiles(cls, median: float, p90: float, most: int) -> Lognormal:
        return cls(math.log(median), math.log(p90 / median) / Z90, most)

    @classmethod
    def of_mean(cls, mean: float, sigma: float, most: int) -> Lognormal:
        return cls(math.log(mean) - sigma * sigma / 2, sigma, most)

    def draw(self, rng: random.Random, scale: float = 1.0) -> int:
        """`scale` shortens all lengths alike, the longest included."""
        length = math.exp(rng.gauss(self.mu, self.sigma)) * scale
        return max(1, round(min(length, self.most * scale)))


@dataclass(frozen=True)
class Kind:
    """One kind of traffic."""

    source: str
    prompt: Lognormal
    answer: Lognormal


_AZURE_CONVERSATION_ANSWER = Lognormal.of_percentiles(129, 424, 1000)
KINDS: Mapping[str, Kind] = {
    "conversation": Kind(
        "Azure LLM inference trace 2023, conversation: 19,366 requests, median 1020 and p90 2735 tokens in, 129 and "
        "424 out",
        Lognormal.of_percentiles(1020, 2735, 14050),
        _AZURE_CONVERSATION_ANSWER,
    ),
    "code": Kind(
        "Azure LLM inference trace 2023, code: 8,819 requests, median 1469 and p90 5194 tokens in, 13 and 55 out",
        Lognormal.of_percentiles(1469, 5194, 7437),
        Lognormal.of_percentiles(13, 55, 1899),
    ),
    "chat": Kind(
        "ShareGPT as the vLLM paper (SOSP 2023) reports it: mean 161.31 tokens in, 337.99 out; it gives no spread, "
        "which is taken from Azure's conversations",
        Lognormal.of_mean(161.31, Lognormal.of_percentiles(1020, 2735, 1).sigma, 2048),
        Lognormal.of_mean(337.99, _AZURE_CONVERSATION_ANSWER.sigma, 2048),
    ),
}
MIXES: Mapping[str, Mapping[str, float]] = {
    **{name: {name: 1.0} for name in KINDS},
    "mixed": {"chat": 0.5, "conversation": 0.3, "code": 0.2},
}


@dataclass(frozen=True)
class Lengths:
    """Of one request, in tokens."""

    kind: str
    prompt: int
    answer: int


def draw(
    rng: random.Random, mix: str, scale: float = 1.0, max_prompt: int = 1 << 20, max_answer: int = 1 << 20
) -> Lengths:
    """The next request of a mix."""
    shares = MIXES[mix]
    (name,) = rng.choices(list(shares), list(shares.values()))
    kind = KINDS[name]
    prompt, answer = kind.prompt.draw(rng, scale), kind.answer.draw(rng, scale)
    return Lengths(name, min(prompt, max_prompt), min(answer, max_answer))
