"""What the benchmark asks of a system, and what it notes of each request. Pure: times come from targets.py."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path


@dataclass(frozen=True)
class Request:
    prompt: list[int]
    max_tokens: int
    at: float = 0.0
    """Seconds from the start of the run to its arrival."""


@dataclass(frozen=True)
class Outcome:
    """What became of a request. Times are seconds since it arrived, whenever the client came round to sending it."""

    first: float  # to its first token
    last: float  # to its last token
    tokens: int
    responses: int = 0
    error: str = ""

    @property
    def token_seconds(self) -> float:
        """Mean time of a token after the first (TPOT)."""
        return (self.last - self.first) / (self.tokens - 1) if self.tokens > 1 else 0.0


def failed(error: str) -> Outcome:
    nan = float("nan")
    return Outcome(nan, nan, 0, error=error)


@dataclass(frozen=True)
class Run:
    """Requests that ran together, and how long it took until the last of them had its last token."""

    outcomes: list[Outcome]
    seconds: float

    @classmethod
    def of(cls, requests: Sequence[Request], outcomes: Sequence[Outcome]) -> Run:
        ends = [request.at + outcome.last for request, outcome in zip(requests, outcomes, strict=True)]
        return cls(list(outcomes), max((end for end in ends if end == end), default=0.0))

    @property
    def tokens(self) -> int:
        return sum(outcome.tokens for outcome in self.outcomes)


@dataclass(frozen=True)
class Workload:
    description: str
    requests: Callable[[random.Random, Sequence[int]], list[Request]]
    """Made from a source of randomness and the token ids to choose from."""
    one_by_one: bool = False
    """Each waits for the one before. Only for ourselves: what batching gains, what a request costs."""
    engine_too: bool = True
    """Also for our engine without Triton."""


def _separate(count: int, tokens_in: int, tokens_out: int) -> Callable[[random.Random, Sequence[int]], list[Request]]:
    return lambda rng, ids: [Request(rng.choices(ids, k=tokens_in), tokens_out) for _ in range(count)]


def _shared_prefix(rng: random.Random, ids: Sequence[int]) -> list[Request]:
    prefix = rng.choices(ids, k=512)
    return [Request(prefix + rng.choices(ids, k=16), 32) for _ in range(16)]


ONE_BY_ONE, SHORT = "W2 one by one", "short"
WORKLOADS = {
    "W1": Workload("one request, 128 tokens in, 128 out", _separate(1, 128, 128)),
    "W2": Workload("16 at once, 128 in, 64 out", _separate(16, 128, 64)),
    "W3": Workload("16 at once sharing 512 tokens, 16 of their own, 32 out", _shared_prefix),
    "W4": Workload("one request, 1024 in, 1 out", _separate(1, 1024, 1)),
    ONE_BY_ONE: Workload("the 16 of W2, one after the other", _separate(16, 128, 64), True, engine_too=False),
    SHORT: Workload("40 with 16 tokens in, 1 out, one after the other", _separate(40, 16, 1), True),
}


def token_ids(model_dir: Path) -> range:
    """Ids to make prompts of: leaves out the first hundred, where special tokens usually are."""
    return range(100, json.loads((model_dir / "config.json").read_text())["vocab_size"])


def parse_mix(text: str) -> list[tuple[int, int]]:
    """Tokens in and out of the kinds of request in a mix: "128:64,1024:16".

    Raises:
        ValueError: says how a mix is written.
    """
    try:
        mix = [(int(tokens_in), int(out)) for tokens_in, out in (kind.split(":") for kind in text.split(","))]
        if min(min(kind) for kind in mix) < 1:
            raise ValueError
    except ValueError:
        raise ValueError(f"a mix is written like 128:64,1024:16 (tokens in:out of each kind), not {text!r}") from None
    return mix


def poisson_requests(
    mix: list[tuple[int, int]], rate: float, count: int, seed: int, ids: Sequence[int], part: str = ""
) -> list[Request]:
    """`count` requests that arrive independently of each other, `rate` a second on average, in the order of arrival.

    The same seed gives the same pattern at every rate, only denser, so that rates differ in nothing else.
    `part` names what else must not repeat: with it the prompts differ, the arrivals don't.
    """
    gaps = random.Random(f"{seed} arrivals")
    prompts = random.Random(f"{seed} {rate} {part}")
    arrivals = accumulate(gaps.expovariate(1.0) / rate for _ in range(count))
    kinds = [gaps.choice(mix) for _ in range(count)]
    return [
        Request(prompts.choices(ids, k=tokens_in), out, at)
        for at, (tokens_in, out) in zip(arrivals, kinds, strict=True)
    ]
