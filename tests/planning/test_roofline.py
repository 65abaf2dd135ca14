"""planning/roofline.py against arithmetic by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from helpers.model_shapes import LLAMA_8B
from tidewright.planning.gpus import GPUS
from tidewright.planning.plan import Engine, Load, Machine, make_plan
from tidewright.planning.roofline import estimate

LAYER = 4096 * (32 * 128 * 2 + 2 * 8 * 128 + 3 * 14336)
LAYERS = 32 * LAYER  # of Llama 3.1 8B
MATRICES = LAYERS + 128256 * 4096  # with its head
ATTENTION = 4 * 32 * 32 * 128  # multiplications and additions for one token and one of its context
H200 = GPUS["H200"]


def test_few_sequences_are_bound_by_the_memory() -> None:
    """A step reads all matrices and the keys and values of 10 sequences of 1000 tokens, 128 KiB each."""
    plan = make_plan(LLAMA_8B, Load(context=2048, concurrent=10, mean_tokens=2048), Machine(gpu=H200), Engine())
    made = estimate(LLAMA_8B, plan, H200, Engine(), 1000, (900, 200))
    assert made
    step = (2 * MATRICES + 10 * 1000 * 131072) / 4.8e12
    assert made.bound == "memory bandwidth"
    assert made.step_seconds == pytest.approx(step)
    assert made.tokens_per_second_of_one == pytest.approx(1 / step)
    assert made.all_tokens_per_second == made.tokens_per_second == pytest.approx(10 / step)
    assert made.prompt_tokens_per_second == pytest.approx(989e12 / (2 * LAYERS))
    prompt = (900 * 2 * LAYERS + ATTENTION * 900 * 900 / 2) / 989e12
    assert made.prompt_seconds == pytest.approx(max(prompt, 2 * LAYERS / 4.8e12))
    assert made.all_requests_per_second == pytest.approx(1 / (prompt + 200 * step / 10))


def test_many_short_sequences_are_bound_by_arithmetic() -> None:
    plan = make_plan(LLAMA_8B, Load(context=128, concurrent=2000, mean_tokens=128), Machine(gpu=H200), Engine())
    made = estimate(LLAMA_8B, plan, H200, Engine(), 64, None)
    assert made
    assert made.bound == "arithmetic"
    assert made.step_seconds == pytest.approx(2000 * (2 * MATRICES + ATTENTION * 64) / 989e12)
    assert made.prompt_seconds is made.all_requests_per_second is None


def test_replicas_add_up_and_float32_has_figures_of_its_own() -> None:
    wanted = Load(context=8192, concurrent=200, mean_tokens=8192)
    plan = make_plan(LLAMA_8B, wanted, Machine(gpu=H200), Engine())
    made = estimate(LLAMA_8B, plan, H200, Engine(), 4096, None)
    assert made
    assert made.all_tokens_per_second == pytest.approx(plan.replicas * made.tokens_per_second)
    wide = Engine(dtype="float32")
    slow = estimate(LLAMA_8B, make_plan(LLAMA_8B, wanted, Machine(gpu=H200), wide, 1), H200, wide, 4096, None)
    assert slow
    assert slow.prompt_tokens_per_second == pytest.approx(67e12 / (2 * LAYERS))


def test_without_speeds_there_is_no_estimate() -> None:
    plan = make_plan(LLAMA_8B, Load(context=128, concurrent=1, mean_tokens=128), Machine(gpu=H200), Engine())
    assert estimate(LLAMA_8B, plan, replace(H200, bandwidth=None), Engine(), 64, None) is None
    assert estimate(LLAMA_8B, plan, replace(H200, flops_16=None), Engine(), 64, None) is None
