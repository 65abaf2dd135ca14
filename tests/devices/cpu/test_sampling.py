"""devices/cpu/sampling.py draws what torch draws; tests/sampling/test_sampler.py holds both to numpy."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.step_batches import sample
from tidewright.devices.cpu.build import load_library
from tidewright.devices.cpu.sampling import CpuChoice, cpu_choice
from tidewright.engine.plan import Draw, History
from tidewright.sampling import lots
from tidewright.sampling.logits import penalise
from tidewright.sampling.sampler import choose_in_torch
from tidewright.sampling.token_counts import TokenCounts
from tidewright.schema import SamplingParams
from tidewright.step.sampling import SamplingBatch

pytestmark = pytest.mark.usefixtures("all_cores")


@pytest.fixture(scope="module")
def kernel() -> CpuChoice:
    made = cpu_choice()
    assert made, "the tests need g++"
    return made


def logits(rows: int, vocab: int, seed: int = 0, spread: float = 3.0) -> torch.Tensor:
    return spread * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def history(tokens: list[int], prompt_length: int = 0, drafts: tuple[int, ...] = ()) -> History:
    return History(tokens, len(tokens), prompt_length, drafts)


def same_tokens(kernel: CpuChoice, logits_RV: torch.Tensor, draws: list[Draw]) -> None:
    batch, before_RV = SamplingBatch.of(draws), logits_RV.clone()
    tokens_R = kernel(logits_RV, batch, TokenCounts())
    assert torch.equal(logits_RV, before_RV)
    assert tokens_R.tolist() == choose_in_torch(logits_RV, batch, TokenCounts()).tolist()


@st.composite
def params(draw_value: st.DrawFn) -> SamplingParams:
    return SamplingParams(
        temperature=draw_value(st.sampled_from([0.0, 0.3, 1.0, 5.0])),
        top_k=draw_value(st.sampled_from([-1, 1, 5, 50, 200, 10**6])),
        top_p=draw_value(st.just(1.0) | st.floats(0.01, 1.0)),
        min_p=draw_value(st.just(0.0) | st.floats(0.0, 1.0)),
        repetition_penalty=draw_value(st.sampled_from([1.0, 1.3])),
        frequency_penalty=draw_value(st.sampled_from([0.0, 0.5])),
        presence_penalty=draw_value(st.sampled_from([0.0, -0.5])),
        seed=draw_value(st.integers(0, 2**63 - 1)),
    )


@settings(max_examples=200)
@given(
    rows=st.lists(params(), min_size=1, max_size=4),
    vocab=st.sampled_from([1, 3, 63, 64, 65, 400, 5000, 20000]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**31),
)
def test_draws_what_torch_draws(
    kernel: CpuChoice, rows: list[SamplingParams], vocab: int, dtype: torch.dtype, seed: int
) -> None:
    tokens = np.random.default_rng(seed).integers(vocab, size=40).tolist()
    draws = [Draw(row, one, 7 + row, history=history(tokens, 25)) for row, one in enumerate(rows)]
    same_tokens(kernel, logits(len(rows), vocab, seed).to(dtype), draws)


@pytest.mark.parametrize("vocab", [49152, 128256])
@pytest.mark.parametrize("spread", [0.1, 3.0, 30.0])
def test_draws_what_torch_draws_from_large_vocabularies(kernel: CpuChoice, vocab: int, spread: float) -> None:
    mix = [{"top_p": 0.95}, {"top_k": 50, "top_p": 0.9}, {"min_p": 0.05}, {"top_k": 3000}, {"top_k": 700}, {}]
    draws = [Draw(row, SamplingParams(seed=row, **one), row) for row, one in enumerate(mix)]  # type: ignore[arg-type]
    same_tokens(kernel, logits(len(mix), vocab, 1, spread), draws)


def test_rows_may_lie_apart(kernel: CpuChoice) -> None:
    draws = [Draw(row, SamplingParams(seed=row), 3) for row in range(5)]
    same_tokens(kernel, logits(10, 300)[::2], draws)
    same_tokens(kernel, logits(300, 5).T, draws)


def test_guesses_count_as_output(kernel: CpuChoice) -> None:
    known = [1, 1, 2, 3]
    penalties = SamplingParams(temperature=0.0, frequency_penalty=1.5, repetition_penalty=1.5)
    draws = [Draw(0, penalties, 4 + n, history=history(known, 2, (2, 9, 9)[:n])) for n in range(4)]
    same_tokens(kernel, logits(4, 12, 3), draws)


def test_a_token_outside_of_the_vocabulary_is_that_rows_error(kernel: CpuChoice) -> None:
    penalised = SamplingParams(temperature=0.0, presence_penalty=1.0)
    draws = [Draw(row, penalised, 3, history=history([1, token, 3])) for row, token in enumerate((2, 100, -1))]
    good, *bad = sample(logits(3, 100), draws, choose=kernel)
    assert not good.error
    assert all("outside of the vocabulary of 100" in one.error for one in bad)


def test_lots_are_equal_to_the_bit() -> None:
    library = load_library()
    assert library
    words_X = lots.words([(0, 0), (5, 77), (2**63 - 1, 2**31)], 4001).ravel()
    lots_X = np.empty(len(words_X), np.float32)
    library.lots_of(*(ctypes.c_void_p(array.ctypes.data) for array in (words_X, lots_X)), ctypes.c_int64(len(words_X)))
    np.testing.assert_array_equal(lots_X.view(np.int32), lots.of_words(words_X).view(np.int32))


def test_penalties_are_equal_to_the_bit() -> None:
    """Of numbers that would be others if a product and a sum were rounded together."""
    library = load_library()
    assert library
    library.penalise.restype = ctypes.c_bool
    known = np.random.default_rng(0).integers(1000, size=5003).tolist()
    penalties = SamplingParams(repetition_penalty=1.1, frequency_penalty=1 / 3, presence_penalty=0.7)
    one = Draw(0, penalties, 5003, history=history(known, 2000))
    wanted_1V = logits(1, 1000)
    row_V = wanted_1V[0].clone()
    penalise(wanted_1V, SamplingBatch.of([one]), counts := TokenCounts())
    place = (ctypes.c_int64 * 3)(*counts.place_of(one))
    numbers = (ctypes.c_double * 3)(
        penalties.repetition_penalty, penalties.presence_penalty, penalties.frequency_penalty
    )
    assert library.penalise(ctypes.c_void_p(row_V.data_ptr()), ctypes.c_int64(1000), place, numbers)
    assert torch.equal(row_V, wanted_1V[0])
