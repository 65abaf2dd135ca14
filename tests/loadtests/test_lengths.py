"""The lengths of requests have the statistics that are stated, and repeat with their seed."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from loadtests.lengths import KINDS, MIXES, Lengths, Lognormal, draw
from loadtests.prompts import WORDS, ids, text
from tidewright.tokenization import Tokenizer

ROOT = Path(__file__).parent.parent.parent
COUNT = 40_000
# Median and 90th percentile of the published Azure traces; means of ShareGPT as the vLLM paper gives them.
PERCENTILES = {"conversation": ((1020, 2735), (129, 424)), "code": ((1469, 5194), (13, 55))}
MEANS = {"chat": (161.31, 337.99)}


def drawn(kind: str) -> np.ndarray:
    rng = random.Random(0)
    lengths = [draw(rng, kind) for _ in range(COUNT)]
    assert {one.kind for one in lengths} == {kind}
    return np.array([(one.prompt, one.answer) for one in lengths])


@pytest.mark.parametrize("kind", PERCENTILES)
def test_medians_and_percentiles_are_those_of_the_trace(kind: str) -> None:
    found = np.percentile(drawn(kind), (50, 90), axis=0).T
    np.testing.assert_allclose(found, PERCENTILES[kind], rtol=0.05)


@pytest.mark.parametrize("kind", MEANS)
def test_means_are_those_of_the_paper(kind: str) -> None:
    np.testing.assert_allclose(drawn(kind).mean(axis=0), MEANS[kind], rtol=0.05)  # answers are cut at the context


@pytest.mark.parametrize("kind", KINDS)
def test_logarithms_are_normal_and_in_and_out_are_independent(kind: str) -> None:
    logs = np.log(drawn(kind))
    for column, length in enumerate((KINDS[kind].prompt, KINDS[kind].answer)):
        whole = logs[:, column][logs[:, column] < np.log(length.most * 0.999)]
        if len(whole) > 0.99 * COUNT and length.mu > 4:  # else cutting and rounding shift them
            assert whole.mean() == pytest.approx(length.mu, abs=0.02)
            assert whole.std() == pytest.approx(length.sigma, abs=0.03)
    assert abs(np.corrcoef(logs.T)[0, 1]) < 0.02


def test_a_mix_has_its_shares() -> None:
    rng = random.Random(1)
    kinds = [draw(rng, "mixed").kind for _ in range(COUNT)]
    for kind, share in MIXES["mixed"].items():
        assert kinds.count(kind) / COUNT == pytest.approx(share, abs=0.01)


def test_the_same_seed_draws_the_same() -> None:
    one, other, third = ([draw(rng, "mixed") for _ in range(50)] for rng in map(random.Random, (5, 5, 6)))
    assert one == other != third


def test_scale_and_limits_shorten() -> None:
    whole = [draw(random.Random(seed), "code") for seed in range(500)]
    tenth = [draw(random.Random(seed), "code", 0.1) for seed in range(500)]
    for one, other in zip(whole, tenth, strict=True):
        assert other.prompt == pytest.approx(one.prompt / 10, abs=1)
    cut = [draw(random.Random(seed), "code", 1.0, 100, 20) for seed in range(500)]
    assert cut == [Lengths(one.kind, min(one.prompt, 100), min(one.answer, 20)) for one in whole]
    assert Lognormal(0.0, 5.0, 3).draw(random.Random(0)) in (1, 2, 3)


def test_the_guide_states_the_parameters() -> None:
    guide = (ROOT / "docs" / "load-testing.md").read_text()
    for name, kind in KINDS.items():
        (row,) = [line for line in guide.splitlines() if line.startswith(f"| `{name}` |")]
        for length in (kind.prompt, kind.answer):
            assert f"{length.mu:.3f}, {length.sigma:.3f}" in row


def test_a_prompt_has_as_many_tokens_as_it_should(tokenizer: Tokenizer) -> None:
    assert len(set(WORDS)) == len(WORDS) > 100
    prompt = text(random.Random(0), 200)
    assert len(tokenizer.encode(" " + prompt)) == 200
    assert len(ids(random.Random(0), 200)) == 200
