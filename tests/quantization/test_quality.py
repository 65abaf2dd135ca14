"""quantization/quality.py against numpy over the same logits, and what quantization costs the embedded model."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf

from helpers.checkpoints import SIZES, engine_config, logits, prompt
from helpers.checkpoints import save as save_model
from tidewright.engine.model_runner import ModelRunner
from tidewright.quantization.affine import SCHEMES
from tidewright.quantization.quality import (
    ANSWER,
    CHOICES,
    CONTEXT,
    CONTINUATION,
    WINDOW,
    Extent,
    Quality,
    answer,
    measure,
    questions,
)
from tidewright.quantization.quantize_model import QuantizationRun, Recipe
from tidewright.quantization.report import read_text

TEXT = prompt(1300, 5)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelRunner, ModelRunner]:
    """A model, and another that is close to it: its own in 4 bits."""
    source, target = (tmp_path_factory.mktemp(name) for name in ("source", "quantized"))
    save_model(
        source, hf.LlamaConfig(**{**SIZES, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4})
    )
    QuantizationRun(source, target, Recipe(SCHEMES["int4-g32"], SCHEMES["int8"])).run(lambda done, total: None)
    limits = {"max_model_len": 256, "max_batched_tokens": 256, "quantization": "none"}
    runners = ModelRunner(engine_config(source, **limits)), ModelRunner(engine_config(target, **limits))
    runners[1].model.norm.weight.mul_(1.3)  # it is surer of itself, so that the divergence has a direction
    return runners


def measured(pair: tuple[ModelRunner, ModelRunner], monkeypatch: pytest.MonkeyPatch, **extent: int) -> Quality:
    monkeypatch.setattr("tidewright.quantization.quality.WINDOW", 256)  # that the runners take
    return measure(pair[0], {"int4": pair[1]}, TEXT, Extent(**extent))["int4"]


def test_figures_are_those_of_the_definitions(
    pair: tuple[ModelRunner, ModelRunner], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = measured(pair, monkeypatch, tokens=600, questions=0, answers=0)
    windows = [TEXT[first : min(first + 256, 600)] for first in (0, 256, 512)]
    losses, divergence, same, count = np.zeros(2), 0.0, 0, 0
    for window in windows:
        probs = [torch.softmax(logits(runner, window, 256)[:-1].double(), -1).numpy() for runner in pair]
        following = np.array(window[1:])
        losses -= [np.log(some[np.arange(len(following)), following]).sum() for some in probs]
        divergence += (probs[0] * np.log(probs[0] / probs[1])).sum()
        same += (probs[0].argmax(-1) == probs[1].argmax(-1)).sum()
        count += len(following)
    assert found.tokens == count == 597
    assert found.source_perplexity == pytest.approx(math.exp(losses[0] / count), rel=1e-4)
    assert found.perplexity == pytest.approx(math.exp(losses[1] / count), rel=1e-4)
    assert found.divergence == pytest.approx(divergence / count, rel=1e-3)
    assert found.same_next_token == same / count
    assert found.divergence > 0  # it is another model


def test_a_model_beside_itself(pair: tuple[ModelRunner, ModelRunner], monkeypatch: pytest.MonkeyPatch) -> None:
    found = measured((pair[0], pair[0]), monkeypatch, tokens=300, questions=4, answers=2)
    assert (found.divergence, found.same_next_token, found.same_answer) == (0, 1, ANSWER)
    assert found.perplexity == found.source_perplexity
    assert found.right_choices == found.source_right_choices


def test_questions_are_stretches_of_the_text_and_their_wrong_answers_are_from_elsewhere() -> None:
    asked = questions(TEXT, 20)
    assert len(asked) == 20
    assert asked == questions(TEXT, 20)
    text = " ".join(map(str, TEXT))
    for question in asked:
        assert (len(question.context), len(question.choices)) == (CONTEXT, CHOICES)
        assert {len(choice) for choice in question.choices} == {CONTINUATION}
        assert " ".join(map(str, [*question.context, *question.choices[0]])) in text
        assert len({tuple(choice) for choice in question.choices}) == CHOICES


def test_the_likeliest_choice_is_the_answer(pair: tuple[ModelRunner, ModelRunner]) -> None:
    runner, question = pair[0], questions(TEXT, 3)[2]
    scores = []
    for choice in question.choices:
        logprobs_TV = logits(runner, [*question.context, *choice], 256).log_softmax(-1)[CONTEXT - 1 : -1]
        scores.append(float(logprobs_TV.gather(1, torch.tensor(choice)[:, None]).sum()))
    assert answer(runner, question) == int(np.argmax(scores))


def test_the_text_is_long_enough(model_dir: Path) -> None:
    assert len(read_text(model_dir)) >= 20_000


# As measured over 511 tokens, and half as much again: relative perplexity, KL divergence, share of equal next tokens.
BOUNDS = {"int8": (1.02, 0.02, 0.9), "stored": (1.01, 0.01, 0.93), "int4-g64": (1.3, 0.4, 0.6)}


@pytest.mark.heavy
def test_what_quantization_costs_the_embedded_model_stays_in_bounds(model_dir: Path) -> None:
    limits = {"max_model_len": WINDOW, "max_batched_tokens": WINDOW, "dtype": "bfloat16", "kv_cache_memory": "64MiB"}

    def serve(quantization: str) -> ModelRunner:
        return ModelRunner(engine_config(model_dir, quantization=quantization, block_size=16, **limits))

    extent = Extent(tokens=WINDOW, questions=0, answers=0)
    found = measure(serve("none"), {name: serve(name) for name in BOUNDS}, read_text(model_dir), extent)
    for name, (perplexity, divergence, same) in BOUNDS.items():
        quality = found[name]
        assert quality.perplexity / quality.source_perplexity < perplexity, (name, quality)
        assert quality.divergence < divergence, (name, quality)
        assert quality.same_next_token > same, (name, quality)
