"""Workloads, arrivals and what is read off them."""

from __future__ import annotations

import random
import statistics

import pytest

from tidewright.bench.workloads import (
    ONE_BY_ONE,
    SHORT,
    WORKLOADS,
    Outcome,
    Request,
    Run,
    failed,
    parse_mix,
    poisson_requests,
)

IDS = range(100, 49152)


@pytest.mark.parametrize(
    ("name", "count", "tokens_in", "out"),
    [
        ("W1", 1, 128, 128),
        ("W2", 16, 128, 64),
        ("W3", 16, 528, 32),
        ("W4", 1, 1024, 1),
        (ONE_BY_ONE, 16, 128, 64),
        (SHORT, 40, 16, 1),
    ],
)
def test_workloads_have_their_sizes(name: str, count: int, tokens_in: int, out: int) -> None:
    requests = WORKLOADS[name].requests(random.Random(1), IDS)
    assert [(len(r.prompt), r.max_tokens, r.at) for r in requests] == [(tokens_in, out, 0.0)] * count


def test_only_w3_shares_a_prefix() -> None:
    shared = WORKLOADS["W3"].requests(random.Random(1), IDS)
    assert len({tuple(r.prompt[:512]) for r in shared}) == 1
    assert len({tuple(r.prompt[512:]) for r in shared}) == 16
    assert len({tuple(r.prompt[:16]) for r in WORKLOADS["W2"].requests(random.Random(1), IDS)}) == 16


def test_arrivals_are_poisson() -> None:
    arrivals = [r.at for r in poisson_requests([(1, 1)], 5.0, 4000, 7, IDS)]
    gaps = [late - early for early, late in zip([0.0, *arrivals], arrivals, strict=False)]
    assert min(gaps) >= 0
    # An exponential distribution: mean and standard deviation are both 1/rate, and 1 - 1/e lie below it.
    assert statistics.mean(gaps) == pytest.approx(0.2, rel=0.05)
    assert statistics.stdev(gaps) == pytest.approx(0.2, rel=0.1)
    assert sum(gap < 0.2 for gap in gaps) / len(gaps) == pytest.approx(0.632, abs=0.03)


def test_same_seed_same_arrivals() -> None:
    mix = [(8, 2), (16, 4)]
    one = poisson_requests(mix, 2.0, 50, 3, IDS)
    assert one == poisson_requests(mix, 2.0, 50, 3, IDS)
    other = poisson_requests(mix, 2.0, 50, 4, IDS)
    assert [r.at for r in one] != [r.at for r in other]
    assert {(len(r.prompt), r.max_tokens) for r in one} == set(mix)


def test_another_rate_is_the_same_pattern_with_other_prompts() -> None:
    slow, fast = (poisson_requests([(8, 2), (4, 1)], rate, 20, 3, IDS) for rate in (1.0, 4.0))
    assert [r.at for r in slow] == pytest.approx([4 * r.at for r in fast])
    assert [len(r.prompt) for r in slow] == [len(r.prompt) for r in fast]
    assert not {tuple(r.prompt) for r in slow} & {tuple(r.prompt) for r in fast}


def test_mix() -> None:
    assert parse_mix("128:64,1024:16") == [(128, 64), (1024, 16)]
    for wrong in ("", "128", "128:0", "a:b", "1:2:3"):
        with pytest.raises(ValueError, match="a mix is written like 128:64"):
            parse_mix(wrong)


def test_a_run_lasts_until_its_last_token() -> None:
    requests = [Request([1], 5, at=1.0), Request([1], 5, at=2.0), Request([1], 5, at=9.0)]
    run = Run.of(requests, [Outcome(1, 7, 5), Outcome(1, 3, 5), failed("overloaded")])
    assert (run.seconds, run.tokens) == (8.0, 10)


def test_time_a_token_leaves_out_the_first() -> None:
    assert Outcome(first=1.0, last=3.0, tokens=5).token_seconds == 0.5
    assert Outcome(first=1.0, last=1.0, tokens=1).token_seconds == 0.0
