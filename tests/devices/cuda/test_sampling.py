"""devices/cuda/sampling.py, interpreted on the CPU, draws the tokens of sampling/sampler.py, which numpy checks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from helpers.interpreted import interpreted
from tidewright.engine.plan import Draw, History
from tidewright.sampling import lots, sampler
from tidewright.sampling.logits import penalise
from tidewright.sampling.token_counts import TokenCounts
from tidewright.sampling.truncation import drop_unlikely
from tidewright.schema import SamplingParams
from tidewright.step.sampling import SamplingBatch

with interpreted():
    import triton
    import triton.language as tl

    from tidewright.devices.cuda import sampling_kernels as kernels
    from tidewright.devices.cuda.launch import Launch, start
    from tidewright.devices.cuda.lot_kernels import lots_kernel, lots_of
    from tidewright.devices.cuda.sampling import DeviceCounts, sample, work_of
    from tidewright.devices.cuda.sampling_launch import CHUNK, Work, launches_of

    @triton.jit
    def lots_of_words_kernel(words_X, lots_X, COUNT: tl.constexpr):
        places_X = tl.arange(0, COUNT)
        tl.store(lots_X + places_X, lots_of(tl.load(words_X + places_X).to(tl.uint64, bitcast=True)))


HISTORY = (3, 3, 5, 8, 13, 3, 5, 7, 7, 7)
CPU = torch.device("cpu")
MIX: list[dict] = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.3, "seed": 2**63 - 1},
    {"top_k": 5},
    {"top_k": 10**6},
    {"top_p": 0.5},
    {"min_p": 0.1},
    {"top_k": 30, "top_p": 0.9, "min_p": 0.02, "temperature": 2.0},
    {"repetition_penalty": 0.6, "temperature": 0.0},
    {"repetition_penalty": 1.8, "presence_penalty": 0.5, "frequency_penalty": -0.7, "top_k": 50, "temperature": 1.5},
]


def draw(position: int = 5, history: Sequence[int] = HISTORY, **params: object) -> Draw:
    sampling = SamplingParams(**({"seed": 1} | params))  # type: ignore[arg-type]
    return Draw(0, sampling, position, history=History(history, len(history), 4))


def draws_of(mix: Sequence[dict]) -> list[Draw]:
    return [draw(position=row + 3, **{"seed": row} | params) for row, params in enumerate(mix)]


def logits(rows: int, vocab: int, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def on_device(logits_BV: torch.Tensor, draws: Sequence[Draw], work: Work | None = None) -> list[int]:
    """Rows with penalties have counts, in another order."""
    rows = [len(draws) - row if one.params.needs_history else -1 for row, one in enumerate(draws)]
    counts = DeviceCounts(len(draws) + 1, logits_BV.shape[1], CPU)
    for row, one in zip(rows, draws, strict=True):
        if row >= 0:
            known = torch.tensor(one.history.token_ids)
            counts.set(row, known[: one.history.prompt_length], known[one.history.prompt_length :])
    batch = SamplingBatch.of(draws)
    work = work or work_of(batch.host, max(rows) >= 0)
    return sample(logits_BV, batch.device, work, counts, torch.tensor(rows, dtype=torch.int32)).tolist()


def on_cpu(logits_BV: torch.Tensor, draws: Sequence[Draw]) -> list[int]:
    return [token.token_id for token in sampler.sample(logits_BV, SamplingBatch.of(draws)).drawn.now()]


def test_words_and_lots_are_equal_to_the_bit() -> None:
    rows = [(0, 0), (5, 77), (2**63 - 1, 2**31)]
    count = 103  # no whole number of Philox's blocks
    words_RE, lots_RE = torch.zeros(3, count, dtype=torch.int64), torch.zeros(3, count)
    columns = (torch.tensor(column) for column in zip(*rows, strict=True))
    start(lots_kernel, (3, 4), Launch({"BLOCKS": 8}, 1, 1, fuses=False), words_RE, lots_RE, *columns, count)
    assert np.array_equal(words_RE.numpy().view(np.uint64), lots.words(rows, count))
    assert np.array_equal(lots_RE.numpy(), lots.exponentials(rows, count))


def test_lots_at_the_ends_of_both_halves_of_a_word() -> None:
    """Where k is greatest, v is 0 or rounds up to 1, and signs could matter."""
    halves = np.array([0, 1, 2**8, 2**9, 2**10, 2**31 - 1, 2**31, 2**32 - 1], dtype=np.uint64)
    low, high = (half.ravel() for half in np.meshgrid(halves, halves))
    words_X = low | (high << np.uint64(32))
    lots_X = torch.empty(64)
    launch = Launch({"COUNT": 64}, 1, 1, fuses=False)
    start(lots_of_words_kernel, (1,), launch, torch.from_numpy(words_X.view(np.int64)), lots_X)
    assert np.array_equal(lots_X.numpy(), lots.of_words(words_X))


def test_penalties_are_equal_to_the_bit() -> None:
    """Of tokens that only the prompt has, that only the output has, and of both, with logits of either sign."""
    penalties = {"repetition_penalty": 1.7, "presence_penalty": 0.3, "frequency_penalty": -0.21}
    draws = [draw(**penalties), draw(), draw(**penalties | {"repetition_penalty": 0.9})]
    logits_BV = logits(3, 20)
    expected_BV = logits_BV.clone()
    penalise(expected_BV, SamplingBatch.of(draws), TokenCounts())
    params, counts = SamplingBatch.of(draws).device, DeviceCounts(1, 20, CPU)
    counts.set(0, torch.tensor(HISTORY[:4]), torch.tensor(HISTORY[4:]))
    work_BV, keys_BC, firsts_BC = torch.empty(3, 20), *torch.empty((2, 3, 1), dtype=torch.int32)
    start(
        kernels.penalise_kernel,
        (3, 1),
        launches_of(20, Work())["penalise"],
        *(logits_BV, work_BV, keys_BC, firsts_BC),
        *(params.repetition_penalty, params.frequency_penalty, params.presence_penalty),
        *(torch.tensor([0, -1, 0], dtype=torch.int32), counts.counts_NV, 20, 20, 1),
    )
    assert torch.equal(work_BV, expected_BV)
    assert firsts_BC[:, 0].tolist() == expected_BV.argmax(-1).tolist()


@pytest.mark.parametrize("vocab", [200, CHUNK + 65])
def test_tokens_are_those_of_the_cpu(vocab: int) -> None:
    """Of one chunk that ends within a block, and of two."""
    mix = MIX if vocab == 200 else [MIX[0], MIX[1], MIX[-1]]
    logits_BV, draws = logits(len(mix), vocab), draws_of(mix)
    assert on_device(logits_BV, draws) == on_cpu(logits_BV, draws)


def test_without_filters_and_greedy_alone_some_kernels_are_left_out() -> None:
    logits_BV = logits(3, 300).bfloat16()
    plain, greedy = draws_of([{}, {"temperature": 0.7}, {}]), draws_of([{"temperature": 0.0}] * 3)
    assert on_device(logits_BV, plain) == on_cpu(logits_BV, plain)
    assert on_device(logits_BV, greedy) == logits_BV.float().argmax(-1).tolist()
    mixed = draws_of([{}, {"top_k": 3}, {"temperature": 0.0}])
    assert on_device(logits_BV, mixed, Work()) == on_cpu(logits_BV, mixed)  # as a graph does


def test_many_draws_of_one_distribution() -> None:
    """As many blocks win as can, and tokens in any place inside."""
    draws = [draw(position=position) for position in range(40)]
    logits_BV = logits(1, 500).div(3).repeat(40, 1)
    tokens = on_device(logits_BV, draws)
    assert tokens == on_cpu(logits_BV, draws)
    assert len({token // 64 for token in tokens}) == 8


def test_a_row_is_the_same_alone_and_beside_others() -> None:
    logits_BV, draws = logits(3, 200), draws_of([MIX[7], MIX[9], MIX[1]])
    together = on_device(logits_BV, draws)
    assert [on_device(logits_BV[row : row + 1], draws[row : row + 1])[0] for row in range(3)] == together


def test_filters_keep_equals_at_their_edge_as_on_the_cpu() -> None:
    """Weights in steps, as the logits of bfloat16 models come: edges lie inside of groups of equals."""
    filters = [
        {"top_k": 1},
        {"top_k": 40},
        {"top_k": 299, "min_p": 0.3},
        {"top_p": 0.001},
        {"top_p": 0.9},
        {"top_p": 0.9999},
        {"min_p": 1.0},
        {"top_k": 60, "top_p": 0.6},
    ]
    params = SamplingBatch.of([draw(**one) for one in filters]).device
    rows, vocab = len(filters), 300
    weights_RV = ((logits(rows, vocab) * 2).round() / 4).exp()
    weights_RV /= weights_RV.amax(-1, keepdim=True)
    expected_RV = weights_RV / weights_RV.sum(-1, keepdim=True)
    drop_unlikely(expected_RV, params)
    edges_R = torch.empty(rows)
    start(
        kernels.truncate_kernel,
        (rows,),
        launches_of(vocab, Work())["truncate"],
        *(weights_RV, weights_RV.sum(-1, keepdim=True), edges_R),
        *(params.temperature, params.top_k, params.top_p, params.min_p, vocab, 1),
    )
    assert torch.equal(weights_RV >= edges_R[:, None], expected_RV > 0)


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_logits_that_are_no_numbers_give_the_cpus_token_and_hurt_no_neighbour(value: float) -> None:
    logits_BV = logits(5, 200)
    logits_BV[0] = value
    logits_BV[1:4, 3:5] = value
    draws = draws_of([{}, {"top_k": 3, "top_p": 0.5}, {}, {"temperature": 0.0}, {}])
    assert on_device(logits_BV, draws) == on_cpu(logits_BV, draws)


def test_the_first_of_the_highest_logits_wins_and_zero_has_no_sign() -> None:
    logits_BV = torch.full((3, 200), -1.0)
    logits_BV[0, [150, 70]] = 2.0
    logits_BV[1, [20, 30]] = torch.tensor([-0.0, 0.0])
    draws = [draw(temperature=0.0)] * 3
    assert on_device(logits_BV, draws) == [70, 20, 0]


def test_counts_that_grow_are_those_of_a_longer_history() -> None:
    counts = DeviceCounts(2, 50, CPU)
    prompt, output = torch.tensor([4, 4, 9]), torch.tensor([9, 1, 1])
    counts.counts_NV[1] = 17  # of the sequence before
    counts.set(1, prompt, output)
    for token in (1, 4, 30):
        counts.add(torch.tensor([-1, 1], dtype=torch.int32), torch.tensor([2, token]))
    assert not counts.counts_NV[0].any()
    expected = torch.zeros(50, dtype=torch.int32)
    expected[[1, 4, 9, 30]] = torch.tensor([3, 1, 1, 1], dtype=torch.int32)
    expected[[4, 9]] += kernels.IN_PROMPT
    assert torch.equal(counts.counts_NV[1], expected)
