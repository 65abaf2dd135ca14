"""What fails because of one request's parameters ends that request; its neighbours draw what they would have drawn."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.step_batches import sample
from tidewright.engine.plan import Draw, History
from tidewright.sampling import sampler
from tidewright.sampling.guided import GuidedDecoding
from tidewright.schema import SamplingParams

VOCAB = 500
# `SamplingParams` refuses these, so they stand for what nobody thought of.
BROKEN = [
    SamplingParams(seed=3, top_k=2**63),
    SamplingParams(seed=3, top_k=2**64),
    SamplingParams(seed=3, logit_bias={VOCAB: 1.0}),
    SamplingParams(seed=3, logit_bias={2**70: 1.0}),
]


def draw(request_id: int, params: SamplingParams, **fields: Any) -> Draw:
    return Draw(request_id, params, 5, **fields)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("params", BROKEN, ids=range(len(BROKEN)))
def test_the_others_draw_as_without_the_broken_one(params: SamplingParams, dtype: torch.dtype) -> None:
    logits_BV = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(1)).to(dtype)
    others = [
        draw(1, SamplingParams(seed=1, top_k=40, logit_bias={7: 5.0}, logprobs=2)),
        draw(3, SamplingParams(seed=2, temperature=0.7, repetition_penalty=1.2), history=History((1, 2, 3), 3)),
    ]
    expected = sample(logits_BV[[0, 2]], others)
    first, failed, last = sample(logits_BV, [others[0], draw(2, params), others[1]])
    assert [first, last] == expected
    assert "no token can be drawn with these sampling parameters" in failed.error


def test_alone_in_its_batch_it_ends_as_well() -> None:
    (failed,) = sample(torch.zeros(1, VOCAB), [draw(1, BROKEN[0])])
    assert failed.error


def test_logits_are_left_as_they_are() -> None:
    logits_BV = torch.zeros(1, VOCAB)
    sample(logits_BV, [draw(1, SamplingParams(seed=1, logit_bias={7: 5.0}, bad_words=["x"]), bad_words_ids=((3,),))])
    assert not logits_BV.any()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("no memory"),
        torch.AcceleratorError("device-side assert"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_a_device_that_fails_is_nobodys_fault(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(sampler, "choose_in_torch", fail)
    with pytest.raises(type(error)):
        sample(torch.zeros(2, VOCAB), [draw(1, SamplingParams(seed=1)), draw(2, SamplingParams(seed=1))])


def test_what_fails_for_all_is_nobodys_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(sampler, "choose_in_torch", fail)
    with pytest.raises(ZeroDivisionError):
        sample(torch.zeros(2, VOCAB), [draw(1, SamplingParams(seed=1)), draw(2, SamplingParams(seed=1))])


@pytest.fixture(scope="module")
def raising() -> Callable[..., None]:
    def fail(*_: object) -> None:
        raise RuntimeError("llguidance had a bad day")

    return fail


def test_whatever_a_grammar_raises_is_its_requests_error(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch, raising: Callable[..., None]
) -> None:
    guided = GuidedDecoding(model_dir / "tokenizer.json", 49152, (2,))
    monkeypatch.setattr(guided, "_allow", raising)
    draws = [draw(1, SamplingParams(seed=1, guided_regex="a")), draw(2, SamplingParams(seed=1))]
    failed, other = sample(torch.zeros(2, 49152), draws, guided)
    assert failed.error == "guided output failed: llguidance had a bad day"
    assert not other.error
