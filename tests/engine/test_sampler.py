"""engine/sampler.py against a plain numpy sampler, and its promise that a seed means the same in any batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tidewright.engine.plan import Draw, DrawnToken
from tidewright.engine.sampler import sample, uniform
from tidewright.schema import SamplingParams

VOCAB = 200


def logits(rows: int, seed: int = 0, vocab: int = VOCAB) -> torch.Tensor:
    return 3 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def draw(position: int = 5, banned: tuple[int, ...] = (), **params: object) -> Draw:
    return Draw(0, SamplingParams(**({"seed": 1} | params)), position, banned)  # type: ignore[arg-type]


def token_ids(drawn: list[DrawnToken]) -> tuple[int, ...]:
    return tuple(token.token_id for token in drawn)


def numpy_choice(row: np.ndarray, params: SamplingParams, u: float) -> int:
    if params.temperature == 0:
        return int(row.argmax())
    scaled = row.astype(np.float64) / params.temperature
    probs = np.exp(scaled - scaled.max())
    probs /= probs.sum()
    order = np.argsort(-probs, kind="stable")
    if params.top_k > 0:
        probs[order[params.top_k :]] = 0
        probs /= probs.sum()
    if params.top_p < 1:
        before = np.cumsum(probs[order]) - probs[order]
        probs[order[before >= params.top_p]] = 0
        probs /= probs.sum()
    return int(np.searchsorted(np.cumsum(probs), u, side="right"))


MIXED = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.3},
    {"top_k": 5},
    {"top_k": 1},
    {"top_k": 10**6},
    {"top_p": 0.5},
    {"top_p": 0.01},
    {"top_k": 20, "top_p": 0.7, "temperature": 2.0},
]


@pytest.mark.parametrize("seed", range(20))
def test_agrees_with_numpy_row_by_row(seed: int) -> None:
    logits_BV = logits(len(MIXED), seed)
    draws = [draw(position=row + 3, seed=seed + 10, **params) for row, params in enumerate(MIXED)]
    chosen = token_ids(sample(logits_BV.clone(), draws))
    expected = [
        numpy_choice(row.numpy(), d.params, uniform(d.params.seed or 0, d.position))
        for row, d in zip(logits_BV, draws, strict=True)
    ]
    assert list(chosen) == expected


def test_a_seed_gives_the_same_alone_and_in_any_batch() -> None:
    logits_BV = logits(len(MIXED))
    draws = [draw(position=9, seed=4, **params) for params in MIXED]
    together = token_ids(sample(logits_BV.clone(), draws))
    alone = [sample(logits_BV[i : i + 1].clone(), [d])[0].token_id for i, d in enumerate(draws)]
    backwards = token_ids(sample(logits_BV.flip(0).clone(), draws[::-1]))[::-1]
    assert list(together) == alone == list(backwards)


def test_uniform_is_uniform_and_depends_on_seed_and_position() -> None:
    values = np.array([uniform(seed, position) for seed in range(100) for position in range(100)])
    assert len(set(values.tolist())) == values.size
    counts, _ = np.histogram(values, bins=20, range=(0, 1))
    assert chi_square(counts, np.full(20, values.size / 20)) < 43.8  # 0.1 % of 19 degrees
    # Neighbouring seeds must not give shifted copies of one stream.
    streams = values.reshape(100, 100)
    assert abs(np.corrcoef(streams[:-1, 1:].ravel(), streams[1:, :-1].ravel())[0, 1]) < 0.05


def chi_square(counts: np.ndarray, expected: np.ndarray) -> float:
    return float((((counts - expected) ** 2) / expected).sum())


@pytest.mark.parametrize(
    ("params", "kept"), [({}, 6), ({"top_k": 3}, 3), ({"top_p": 0.75}, 3), ({"temperature": 0.5}, 6)]
)
def test_frequencies_follow_the_probabilities(params: dict[str, float], kept: int) -> None:
    probs = np.array([0.35, 0.25, 0.2, 0.1, 0.06, 0.04])
    size = 4000
    logits_BV = torch.tensor(np.log(probs), dtype=torch.float32).repeat(size, 1)
    tokens = token_ids(sample(logits_BV, [draw(position=i, **params) for i in range(size)]))
    expected = probs ** (1 / params.get("temperature", 1.0))
    expected[kept:] = 0
    counts = np.bincount(tokens, minlength=6)
    assert not counts[kept:].any()
    expected = expected[:kept] / expected.sum() * size
    assert chi_square(counts[:kept], expected) < 20.5  # 0.1 % of 5 degrees


def test_banned_tokens_are_never_chosen_but_logprobs_are_raw() -> None:
    logits_BV = logits(2)
    best = logits_BV.argmax(dim=-1).tolist()
    raw = logits_BV.log_softmax(-1)
    result = sample(
        logits_BV.clone(),
        [
            draw(temperature=0.0, banned=(best[0],), logprobs=1),
            draw(temperature=1.0, banned=tuple(i for i in range(VOCAB) if i != 17), logprobs=0),
        ],
    )
    assert result.token_ids[0] == logits_BV[0].topk(2).indices[1]
    assert result.token_ids[1] == 17
    chosen, top = result.logprobs[0] or []
    assert (chosen.rank, top.rank, top.token_id) == (2, 1, best[0])
    assert top.logprob == pytest.approx(raw[0, best[0]].item())
    assert [entry.token_id for entry in result.logprobs[1] or []] == [17]


def test_logprobs_only_for_the_rows_that_ask() -> None:
    logits_BV = logits(4)
    raw = logits_BV.double().log_softmax(-1)
    result = sample(
        logits_BV.clone(),
        [draw(), draw(logprobs=3, temperature=5.0), draw(temperature=0.0), draw(logprobs=0)],
    )
    assert [entry and len(entry) for entry in result.logprobs] == [None, 4, None, 1]
    for row in (1, 3):
        chosen = (result.logprobs[row] or [])[0]
        assert chosen.token_id == result.token_ids[row]
        assert chosen.logprob == pytest.approx(raw[row, chosen.token_id].item(), abs=1e-5)
        assert chosen.rank == 1 + int((raw[row] > raw[row, chosen.token_id]).sum())
    top = (result.logprobs[1] or [])[1:]
    assert [entry.token_id for entry in top] == raw[1].topk(3).indices.tolist()
    assert [entry.rank for entry in top] == [1, 2, 3]


@pytest.mark.parametrize("temperature", [1e-30, 1e-6, 1e-5, 1e-3])
def test_tiny_temperatures_are_greedy(temperature: float) -> None:
    logits_BV = logits(3)
    assert list(token_ids(sample(logits_BV.clone(), [draw(temperature=temperature)] * 3))) == (
        logits_BV.argmax(-1).tolist()
    )


@pytest.mark.parametrize("params", MIXED)
def test_numbers_that_are_none_stay_within_the_vocabulary(params: dict[str, float]) -> None:
    (token,) = token_ids(sample(torch.full((1, VOCAB), torch.nan), [draw(**params)]))
    assert 0 <= token < VOCAB


def test_bfloat16_logits_are_widened_first() -> None:
    logits_BV = logits(2).bfloat16()
    draws = [draw(logprobs=0), draw(temperature=0.0)]
    assert sample(logits_BV, draws) == sample(logits_BV.float(), draws)
