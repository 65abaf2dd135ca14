"""sampling/sampler.py against a plain numpy sampler, and its promise that a seed means the same in any batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from helpers.sampling_oracle import changed_logits, chi_square, chi_square_limit, distribution, kept_tokens
from helpers.step_batches import columns, sample
from tidewright.devices.cpu.sampling import CpuChoice, cpu_choice
from tidewright.engine.plan import Draw, DrawnToken, History
from tidewright.sampling import truncation
from tidewright.sampling.logits import penalise
from tidewright.sampling.logprobs import prompt_logprobs
from tidewright.sampling.lots import exponentials
from tidewright.sampling.token_counts import TokenCounts
from tidewright.sampling.truncation import drop_unlikely, first_argmax, num_lots, race, top
from tidewright.schema import SamplingParams
from tidewright.step.sampling import SamplingBatch

VOCAB = 200
# The filters look at 128 tokens, then at 4096, then at all.
LARGE_VOCAB = 9001
HISTORY = (3, 3, 5, 8, 13, 3, 5, 7, 7, 7)


def logits(rows: int, seed: int = 0, vocab: int = VOCAB) -> torch.Tensor:
    return 3 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def draw(
    position: int = 5, banned: tuple[int, ...] = (), bad_words: tuple[tuple[int, ...], ...] = (), **params: object
) -> Draw:
    sampling = SamplingParams(**({"seed": 1} | params))  # type: ignore[arg-type]
    return Draw(0, sampling, position, banned, bad_words, History(HISTORY, len(HISTORY), 4))


def race_winner(probs_V: np.ndarray, lots_E: np.ndarray) -> int:
    """By plain loops: which 64 tokens, then which of them."""
    starts = range(0, len(probs_V), 64)
    times = [probs_V[start : start + 64].sum() / lot for start, lot in zip(starts, lots_E, strict=False)]
    start = starts[int(np.argmax(times))]
    inside_S = probs_V[start : start + 64]
    return start + int(np.argmax(inside_S / lots_E[len(starts) : len(starts) + len(inside_S)]))


@pytest.fixture(scope="module", params=["torch", "kernel"])
def choose(request: pytest.FixtureRequest) -> CpuChoice | None:
    if request.param == "torch":
        return None
    kernel = cpu_choice()
    assert kernel, "the tests need g++"
    return kernel


def token_ids(drawn: list[DrawnToken]) -> list[int]:
    return [token.token_id for token in drawn]


FEATURES: list[dict] = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.3},
    {"top_k": 5},
    {"top_k": 1},
    {"top_k": 150},
    {"top_k": 10**6},
    {"top_p": 0.5},
    {"top_p": 0.01},
    {"top_p": 0.99, "temperature": 20.0},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"min_p": 0.001, "top_p": 0.9},
    {"top_k": 20, "top_p": 0.7, "temperature": 2.0},
    {"top_k": 30, "top_p": 0.9, "min_p": 0.02},
    {"repetition_penalty": 1.8},
    {"repetition_penalty": 0.6, "temperature": 0.0},
    {"presence_penalty": 1.5},
    {"frequency_penalty": -2.0},
    {"logit_bias": {7: 9.0, 199: -100.0, 3: 8.5}},
    {"bad_words": ((7,), (5, 7, 7, 7, 11), (7, 12), (8, 14)), "logit_bias": {11: 20.0, 14: 9.0}},
    {"banned": tuple(range(150))},
    {"allowed_token_ids": [7]},
    {"allowed_token_ids": [3, 199, 64, 3], "temperature": 0.0},
    {"allowed_token_ids": [3, 5, 8, 130, 131], "banned": (5, 6), "bad_words": ((8,),), "logit_bias": {7: 100.0}},
    {"allowed_token_ids": [3, 5, 8, 130, 131, 150], "repetition_penalty": 3.0, "top_k": 3, "top_p": 0.9, "min_p": 0.01},
    {
        "repetition_penalty": 1.2,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.5,
        "logit_bias": {5: 6.0},
        "bad_words": ((9,),),
        "top_p": 0.9,
        "top_k": 50,
        "min_p": 0.01,
        "temperature": 1.5,
    },
]


@pytest.mark.parametrize(
    ("vocab", "seed"), [(LARGE_VOCAB, 0), (LARGE_VOCAB, 1), *((VOCAB, seed) for seed in range(12))]
)
def test_agrees_with_numpy_row_by_row(vocab: int, seed: int, choose: CpuChoice | None) -> None:
    logits_BV = logits(len(FEATURES), seed, vocab)
    draws = [draw(position=row + 3, seed=seed + 10, **params) for row, params in enumerate(FEATURES)]
    expected = [
        race_winner(distribution(row.numpy(), d), exponentials([(d.params.seed or 0, d.position)], num_lots(vocab))[0])
        for row, d in zip(logits_BV, draws, strict=True)
    ]
    assert token_ids(sample(logits_BV.clone(), draws, choose=choose)) == expected


@pytest.mark.parametrize("vocab", [VOCAB, LARGE_VOCAB, 49152])
def test_a_seed_gives_the_same_alone_and_in_any_batch(vocab: int, choose: CpuChoice | None) -> None:
    logits_BV = logits(len(FEATURES), vocab=vocab)
    draws = [draw(position=9, seed=4, **params) for params in FEATURES]
    together = token_ids(sample(logits_BV.clone(), draws, choose=choose))
    alone = [sample(logits_BV[i : i + 1].clone(), [d], choose=choose)[0].token_id for i, d in enumerate(draws)]
    backwards = token_ids(sample(logits_BV.flip(0).clone(), draws[::-1], choose=choose))[::-1]
    assert together == alone == backwards


def test_probabilities_do_not_depend_on_the_batch_by_a_single_bit() -> None:
    params = [SamplingParams(**p) for p in FEATURES if not {"bad_words", "banned"} & p.keys()]
    probs_BV = logits(len(params), 3, 49152).softmax(-1)
    together_BV = probs_BV.clone()
    drop_unlikely(together_BV, columns(params))
    for row, p in enumerate(params):
        alone_1V = probs_BV[row : row + 1].clone()
        drop_unlikely(alone_1V, columns([p]))
        assert torch.equal(alone_1V[0], together_BV[row])


def test_rounding_elsewhere_in_the_vocabulary_does_not_change_a_draw(choose: CpuChoice | None) -> None:
    """A replay computes in other batches than the first time: logits differ in the last bits, tokens must not."""
    generator = torch.Generator().manual_seed(7)
    changed = 0
    for seed in range(40):
        logits_BV = logits(50, seed, 49152) / 3
        logits_BV[:, 0] += 10  # Next to it the others are as likely as its rounding error.
        rounded_BV = logits_BV + 3e-6 * torch.randn(logits_BV.shape, generator=generator)
        draws = [draw(seed=seed, position=position) for position in range(50)]
        first, second = (
            token_ids(sample(logits_BV, draws, choose=choose)),
            token_ids(sample(rounded_BV, draws, choose=choose)),
        )
        changed += sum(a != b for a, b in zip(first, second, strict=True))
    assert changed <= 1


@pytest.mark.parametrize("params", FEATURES)
def test_frequencies_follow_the_distribution(params: dict, choose: CpuChoice | None) -> None:
    size = 4000
    row = np.linspace(1.5, -1.5, VOCAB).astype(np.float32)
    row[:20] += 2
    draws = [draw(position=i, **params) for i in range(size)]
    expected = distribution(row, draws[0]) * size
    counts = np.bincount(token_ids(sample(torch.tensor(row).repeat(size, 1), draws, choose=choose)), minlength=VOCAB)
    assert not counts[expected == 0].any()
    # A test of many rare tokens says little; each bin holds neighbours that are expected 20 times or more.
    bins = np.minimum(np.cumsum(expected) // 20, expected.sum() // 20 - 1).astype(int)
    filled = np.bincount(bins, expected) > 0
    observed, predicted = np.bincount(bins, counts)[filled], np.bincount(bins, expected)[filled]
    assert chi_square(observed, predicted) <= chi_square_limit(max(1, len(observed) - 1))


@st.composite
def filters(draw_value: st.DrawFn) -> SamplingParams:
    return SamplingParams(
        top_k=draw_value(st.sampled_from([-1, 0, 1, 2, 5, 128, 129, 300, 10**6])),
        top_p=draw_value(st.floats(0.001, 1.0)),
        min_p=draw_value(st.just(0.0) | st.floats(0.0, 1.0)),
    )


@settings(max_examples=150, deadline=None)
@given(data=st.data(), vocab=st.sampled_from([1, 2, 63, 64, 65, 400, 5000]))
def test_filters_keep_what_a_slow_filter_keeps(data: st.DataObject, vocab: int) -> None:
    params = data.draw(st.lists(filters(), min_size=1, max_size=3))
    spread = data.draw(st.sampled_from([0.5, 3.0, 10.0]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    # In steps, as the logits of bfloat16 models come: there are many equals.
    logits_RV = (torch.randn(len(params), vocab, generator=generator) * spread * 4).round() / 4
    probs_RV = logits_RV.softmax(-1)
    for probs, p in zip(probs_RV.double().numpy(), params, strict=True):
        # Where rounding decides, float32 and float64 may disagree.
        assume(not np.isclose(probs, p.min_p * probs.max(), rtol=1e-5, atol=0).any() or p.min_p in (0, 1))
        ordered = np.sort(probs * (kept_tokens(probs, SamplingParams(top_k=p.top_k, min_p=p.min_p))))[::-1]
        assume(p.top_p == 1 or not np.isclose(ordered.cumsum(), p.top_p * ordered.sum(), rtol=1e-5, atol=0).any())
    result_RV = probs_RV.clone()
    drop_unlikely(result_RV, columns(params))
    for probs, result, p in zip(probs_RV.numpy(), result_RV.numpy(), params, strict=True):
        np.testing.assert_array_equal(result, probs * kept_tokens(probs.astype(np.float64), p))


def test_how_far_the_filters_look_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    params = [SamplingParams(**p) for p in FEATURES if not {"bad_words", "banned"} & p.keys()]
    looked, sorted_RV = (logits(len(params), 5, LARGE_VOCAB).softmax(-1) for _ in range(2))
    drop_unlikely(looked, columns(params))
    monkeypatch.setattr(truncation, "_WINDOWS", (1,))
    drop_unlikely(sorted_RV, columns(params))
    assert torch.equal(looked, sorted_RV)


def test_equals_that_reach_beyond_the_first_window_count_for_top_p() -> None:
    weights = np.repeat([4.0, 1.0, 0.1], [100, 300, 600])
    probs_1V = torch.tensor(weights / weights.sum(), dtype=torch.float32)[None]
    drop_unlikely(probs_1V, columns([SamplingParams(top_k=120, top_p=0.7)]))
    assert int((probs_1V > 0).sum()) == 400


@settings(max_examples=60, deadline=None)
@given(
    history=st.lists(st.integers(0, 9), max_size=30),
    share=st.floats(0, 1),
    repetition=st.floats(0.1, 10),
    presence=st.floats(-2, 2),
    frequency=st.floats(-2, 2),
)
def test_penalties_are_those_of_a_loop(
    history: list[int], share: float, repetition: float, presence: float, frequency: float
) -> None:
    params = SamplingParams(repetition_penalty=repetition, presence_penalty=presence, frequency_penalty=frequency)
    other = Draw(1, SamplingParams(), 3)
    one = Draw(0, params, 9, history=History(history, len(history), int(share * len(history))))
    logits_BV = logits(3, vocab=12)
    before_BV = logits_BV.clone()
    penalise(logits_BV, SamplingBatch.of([other, one, other]), TokenCounts())
    assert torch.equal(logits_BV[::2], before_BV[::2])
    np.testing.assert_allclose(logits_BV[1].numpy(), changed_logits(before_BV[1].numpy(), one), rtol=1e-5, atol=1e-5)


def test_a_bad_word_is_cut_at_its_last_token_only_behind_the_others(choose: CpuChoice | None) -> None:
    def banned(history: tuple[int, ...], *words: tuple[int, ...]) -> list[int]:
        # All but the banned tokens are drawn by some position, for the logits are equal.
        draws = [Draw(0, SamplingParams(seed=p), p, (), words, History(history, len(history))) for p in range(400)]
        drawn = token_ids(sample(torch.zeros(400, 10), draws, choose=choose))
        return sorted(set(range(10)) - set(drawn))

    assert banned((1, 2), (4,), (2, 5), (1, 2, 6), (3, 2, 7), (0, 1, 2, 8)) == [4, 5, 6]
    assert banned((), (4,), (2, 5)) == [4]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_bans_give_way_where_they_would_leave_no_allowed_token(temperature: float, choose: CpuChoice | None) -> None:
    def drawn(allowed: list[int], banned: tuple[int, ...], *words: int) -> set[int]:
        bad_words = tuple((word,) for word in words)
        draws = [
            draw(p, banned, bad_words, seed=p, allowed_token_ids=allowed, temperature=temperature) for p in range(200)
        ]
        return set(token_ids(sample(torch.zeros(200, VOCAB), draws, choose=choose)))

    everything = temperature > 0
    assert drawn([5, 6, 7], (5,), 6) == {7}
    assert drawn([6, 7, 8], (6,), 7, 8) == ({7, 8} if everything else {7})  # min_tokens stays in force
    assert drawn([6, 7], (6, 7)) == ({6, 7} if everything else {6})


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_only_allowed_tokens_come_also_of_logits_that_are_no_numbers(
    temperature: float, value: float, choose: CpuChoice | None
) -> None:
    draws = [draw(p, allowed_token_ids=[70, 150], temperature=temperature) for p in range(20)]
    logits_BV = torch.full((20, VOCAB), value)
    logits_BV[:, 3] = 1.0
    if value == -float("inf"):
        logits_BV[:, 150] = -3.0
    assert set(token_ids(sample(logits_BV, draws, choose=choose))) <= {70, 150}


def test_banned_tokens_are_never_chosen_but_logprobs_are_raw(choose: CpuChoice | None) -> None:
    logits_BV = logits(3)
    best = logits_BV.argmax(dim=-1).tolist()
    raw = logits_BV.log_softmax(-1)
    drawn = sample(
        logits_BV.clone(),
        [
            draw(temperature=0.0, banned=(best[0],), logprobs=1),
            draw(temperature=1.0, banned=tuple(i for i in range(VOCAB) if i != 17), logprobs=0),
            draw(temperature=2.0, logit_bias={40: 100.0}, top_k=1, repetition_penalty=3.0, logprobs=0),
        ],
        choose=choose,
    )
    assert token_ids(drawn) == [logits_BV[0].topk(2).indices[1], 17, 40]
    chosen, most_likely = drawn[0].logprobs or []
    assert (chosen.rank, most_likely.rank, most_likely.token_id) == (2, 1, best[0])
    assert most_likely.logprob == pytest.approx(raw[0, best[0]].item())
    for row in (1, 2):
        (entry,) = drawn[row].logprobs or []
        assert entry.token_id == drawn[row].token_id
        assert entry.logprob == pytest.approx(raw[row, entry.token_id].item(), abs=1e-5)


@pytest.mark.parametrize("vocab", [VOCAB, LARGE_VOCAB])
def test_logprobs_only_for_the_rows_that_ask(vocab: int, choose: CpuChoice | None) -> None:
    logits_BV = logits(4, vocab=vocab)
    raw = logits_BV.double().log_softmax(-1)
    drawn = sample(
        logits_BV.clone(),
        [draw(), draw(logprobs=3, temperature=5.0), draw(temperature=0.0), draw(logprobs=0)],
        choose=choose,
    )
    assert [token.logprobs and len(token.logprobs) for token in drawn] == [None, 4, None, 1]
    for row in (1, 3):
        chosen = (drawn[row].logprobs or [])[0]
        assert chosen.token_id == drawn[row].token_id
        assert chosen.logprob == pytest.approx(raw[row, chosen.token_id].item(), abs=1e-5)
        assert chosen.rank == 1 + int((raw[row] > raw[row, chosen.token_id]).sum())
    most_likely = (drawn[1].logprobs or [])[1:]
    assert [entry.token_id for entry in most_likely] == raw[1].topk(3).indices.tolist()
    assert [entry.rank for entry in most_likely] == [1, 2, 3]


def test_prompt_logprobs_are_of_the_tokens_that_follow() -> None:
    logits_BV = logits(3)
    raw = logits_BV.double().log_softmax(-1)
    entries = prompt_logprobs(logits_BV.bfloat16().float(), torch.tensor([5, 6, 7]), 2).now()
    assert [[len(row), row[0].token_id, row[1].rank, row[2].rank] for row in entries] == [
        [3, t, 1, 2] for t in (5, 6, 7)
    ]
    for row, entry in enumerate(entries):
        assert entry[0].logprob == pytest.approx(raw[row, 5 + row].item(), rel=0.02)


@pytest.mark.parametrize("temperature", [1e-30, 1e-6, 1e-5, 1e-3])
def test_tiny_temperatures_are_greedy(temperature: float, choose: CpuChoice | None) -> None:
    logits_BV = logits(3)
    assert (
        token_ids(sample(logits_BV.clone(), [draw(temperature=temperature)] * 3, choose=choose))
        == logits_BV.argmax(-1).tolist()
    )


@pytest.mark.parametrize("params", FEATURES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_logits_that_are_no_numbers_give_a_token_and_hurt_no_neighbour(
    params: dict, value: float, choose: CpuChoice | None
) -> None:
    logits_BV = logits(2)
    (alone,) = sample(logits_BV[1:].clone(), [draw()], choose=choose)
    for tokens in (slice(None), slice(3, 5)):
        broken_BV = logits_BV.clone()
        broken_BV[0, tokens] = value
        first, second = sample(broken_BV, [draw(**params), draw()], choose=choose)
        assert 0 <= first.token_id < VOCAB
        assert second == alone


def test_a_distribution_of_no_mass_is_reported() -> None:
    probs_BV = torch.tensor([[0.0, 0.0], [0.0, 0.5], [torch.nan, 0.5]])
    tokens_B, valid_B = race(probs_BV, torch.ones(3, num_lots(2)))
    assert valid_B.tolist() == [False, True, False]
    assert tokens_B[1] == 1


@pytest.mark.parametrize("lot", [float(np.finfo(np.float32).tiny), 1.0, 100.0])
def test_only_tokens_that_have_probability_win(lot: float) -> None:
    probs_BV = torch.zeros(1, 500)
    probs_BV[0, [70, 71, 300]] = torch.tensor([1e-30, 0.7, 0.1])
    lots_BE = torch.full((1, num_lots(500)), lot)
    assert race(probs_BV, lots_BE)[0] == 71
    lots_BE[0, 500 // 64 + 1 + 71 % 64] = 1e38  # it starts as late as can be
    assert race(probs_BV, lots_BE)[0] in (70, 71)


@settings(max_examples=60, deadline=None)
@given(vocab=st.integers(1, 700), width=st.integers(1, 10), seed=st.integers(0, 100))
def test_block_searches_agree_with_a_sort(vocab: int, width: int, seed: int) -> None:
    values_RV = (logits(2, seed, vocab) * 2).round()
    width = min(width, vocab)
    values_RW, ids_RW = top(values_RV, width)
    assert torch.equal(values_RW, values_RV.sort(dim=-1, descending=True).values[:, :width])
    assert torch.equal(values_RV.gather(1, ids_RW), values_RW)
    assert all(len(set(row)) == width for row in ids_RW.tolist())
    assert first_argmax(values_RV).tolist() == values_RV.numpy().argmax(-1).tolist()


def test_bfloat16_logits_are_widened_first(choose: CpuChoice | None) -> None:
    logits_BV = logits(2).bfloat16()
    draws = [draw(logprobs=0), draw(temperature=0.0)]
    assert sample(logits_BV, draws, choose=choose) == sample(logits_BV.float(), draws, choose=choose)
