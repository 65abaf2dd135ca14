"""devices/cuda/sampler.py, interpreted on the CPU, says what sampling/sampler.py says, step after step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from helpers.interpreted import interpreted
from tidewright.engine.plan import Draw, DrawnToken, History
from tidewright.sampling import sampler
from tidewright.sampling.guided import GuidedDecoding
from tidewright.sampling.sampler import Sampler
from tidewright.schema import SamplingParams
from tidewright.step.sampling import SamplingBatch

with interpreted():
    from tidewright.devices.cuda import sampler as cuda_sampler
    from tidewright.devices.cuda.sampler import CudaSampler

VOCAB = 300
CPU = torch.device("cpu")


class Grammars(GuidedDecoding):
    """Allows multiples of the length of the output, after which comes 0; "broken" ends its request."""

    def __init__(self) -> None:
        super().__init__(Path("none"), VOCAB, (0,))

    def _allow(self, draw: Draw, bits_RI: np.ndarray, index: int) -> None:
        if draw.params.guided_regex == "broken":
            raise ValueError("a bad day")
        allowed_V = np.zeros(bits_RI.shape[1] * 32, np.uint8)
        allowed_V[: VOCAB : len(draw.history.output()) + 3] = 1
        bits_RI[index] = np.packbits(allowed_V, bitorder="little").view(np.int32)


MIX: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.0, "logprobs": 3},
    {"logprobs": 0, "top_p": 0.8},
    {"guided_regex": "a", "bad_words": ((6,), (9,)), "logprobs": 1},
    {"guided_regex": "broken"},
    {"guided_regex": "a", "allowed_token_ids": [1]},
    {"allowed_token_ids": [3, 5, 8, 299], "banned": (5, 8), "repetition_penalty": 3.0},
    {"banned": tuple(range(150)), "logit_bias": {7: 100.0, 170: 9.0, 299: -100.0}},
    {"logit_bias": {VOCAB: 1.0}},
    {"top_k": 2**63},
    {"repetition_penalty": 1.8, "presence_penalty": 0.5, "frequency_penalty": -0.7, "logit_bias": {9: 2.0}},
    {"frequency_penalty": 2.0, "temperature": 0.0, "bad_words": ((4,), (7, 7, 12))},
]


class Requests:
    """Each has a history that grows by what was drawn."""

    def __init__(self, mix: Sequence[dict[str, Any]]) -> None:
        self._tokens = [[3, 3, 5, 8, 13, row, 7, 7] for row in range(len(mix))]
        self._mix = mix

    def draws(self, ids: Sequence[int], drafts: tuple[int, ...] = ()) -> list[Draw]:
        return [self._draw(request_id, drafts[:count]) for request_id in ids for count in range(len(drafts) + 1)]

    def _draw(self, request_id: int, drafts: tuple[int, ...]) -> Draw:
        fields = {"seed": request_id} | self._mix[request_id]
        banned, bad_words = fields.pop("banned", ()), fields.pop("bad_words", ())
        tokens, params = self._tokens[request_id], SamplingParams(**fields)
        history = History(tokens, len(tokens), 4, drafts)
        return Draw(request_id, params, len(tokens) + len(drafts), banned, bad_words, history)

    def grow(self, draws: Sequence[Draw], drawn: Sequence[DrawnToken]) -> None:
        for draw, token in zip(draws, drawn, strict=True):
            if draw.history.drafts == ():
                self._tokens[draw.request_id].append(token.token_id)


def logits(rows: int, seed: int) -> torch.Tensor:
    return 3 * torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed))


def same(got: Sequence[DrawnToken], wanted: Sequence[DrawnToken]) -> None:
    assert [(token.error, token.error or token.token_id) for token in got] == [
        (token.error, token.error or token.token_id) for token in wanted
    ]
    for one, other in zip(got, wanted, strict=True):
        assert (one.logprobs is None) == (other.logprobs is None)
        for mine, its in zip(one.logprobs or [], other.logprobs or [], strict=True):
            assert (mine.token_id, mine.rank) == (its.token_id, its.rank)
            assert mine.logprob == pytest.approx(its.logprob, abs=1e-5)


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # of rows that may have nothing
def test_all_that_a_row_may_ask_for_step_after_step() -> None:
    """Rows come, go and change places, as preempted sequences do; some have guesses."""
    ours, theirs = CudaSampler(Grammars(), CPU), Sampler(Grammars())
    requests = Requests(MIX)
    everybody = list(range(len(MIX)))
    steps: list[tuple[list[int], tuple[int, ...]]] = [
        (everybody, ()),
        (everybody, ()),
        ([11, 10, 6, 1], ()),
        ([10, 11], (9, 4)),
        (everybody, ()),
    ]
    for seed, (ids, drafts) in enumerate(steps):
        draws = requests.draws(ids, drafts)
        logits_RV = logits(len(draws), seed)
        before_RV = logits_RV.clone()
        sampled = ours.sample(logits_RV, SamplingBatch.of(draws))
        drawn = sampled.drawn.now()
        same(drawn, theirs.sample(logits_RV, SamplingBatch.of(draws)).drawn.now())
        assert sampled.tokens_R.tolist() == [token.token_id for token in drawn]
        assert torch.equal(logits_RV, before_RV)
        requests.grow(draws, drawn)


def test_only_a_sequence_that_is_new_at_its_place_is_counted_on_the_host() -> None:
    """Or one that drew elsewhere meanwhile. The logits differ so little that the counts decide."""
    mix: list[dict[str, Any]] = [{"presence_penalty": 1.0, "temperature": 0.0}, {"temperature": 0.0}] * 5
    ours, theirs, requests = CudaSampler(Grammars(), CPU), Sampler(Grammars()), Requests(mix)
    steps: list[tuple[list[int], tuple[int, ...]]] = [([0, 1], ()), ([*range(10)], ()), ([2, 0], ()), ([2, 0], ())]
    counted = []
    for ids, drafts in [*steps, ([2], ()), ([2], (7,)), ([2, 0], ()), ([2, 0], ())]:
        draws = requests.draws(ids, drafts)
        batch, logits_RV = SamplingBatch.of(draws), logits(1, 1).repeat(len(draws), 1) / 100
        counted.append([*ours._counts_of_places.missing(batch)][::2])
        drawn = ours.sample(logits_RV, batch).drawn.now()
        same(drawn, theirs.sample(logits_RV, batch).drawn.now())
        requests.grow(draws, drawn)
    both = ["prompt 0", "prompt 1"]
    assert counted == [
        ["prompt 0"],
        [f"prompt {i}" for i in (2, 4, 6, 8)],
        both,
        [],
        [],
        ["prompt 1"],
        ["prompt 0"],
        [],
    ]
    ours.forget([2])
    assert [*ours._counts_of_places.missing(SamplingBatch.of(requests.draws([2])))] == ["prompt 0", "output 0"]


def test_what_the_gpu_cannot_do_the_host_does(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    ours, draws = CudaSampler(Grammars(), CPU), Requests(MIX).draws(range(4))
    monkeypatch.setattr(cuda_sampler, "sample", fail)
    wanted = sampler.sample(logits(4, 0), SamplingBatch.of(draws), Grammars()).drawn.now()
    same(ours.sample(logits(4, 0), SamplingBatch.of(draws)).drawn.now(), wanted)
    assert "trying it on the host" in caplog.text


def test_a_place_that_a_failed_step_counted_anew_is_nobodys(monkeypatch: pytest.MonkeyPatch) -> None:
    """A drew there; then B's counts took its place in a step that ran out of memory; then A is back."""
    mix: list[dict[str, Any]] = [{"presence_penalty": 1.0, "temperature": 0.0}] * 2
    ours, requests = CudaSampler(Grammars(), CPU), Requests(mix)
    draws = requests.draws([0])
    requests.grow(draws, ours.sample(logits(1, 1), SamplingBatch.of(draws)).drawn.now())
    assert not ours._counts_of_places.missing(SamplingBatch.of(requests.draws([0])))
    with monkeypatch.context() as patched:
        patched.setattr(cuda_sampler, "sample", mock.Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory")))
        with pytest.raises(torch.OutOfMemoryError):
            ours.sample(logits(1, 1), SamplingBatch.of(requests.draws([1])))
    assert "prompt 0" in ours._counts_of_places.missing(SamplingBatch.of(requests.draws([0])))
