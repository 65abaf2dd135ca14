"""The same engine on a GPU. Skipped where there is none; run it with `pytest tests/engine/test_engine_cuda.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from engine.test_engine import alone, engine, folder, requests, tokens  # noqa: F401 (fixtures)
from helpers.one_engine import outputs_of_engine
from tidewright.engine.messages import Submit
from tidewright.engine.model_runner import LaunchedStep
from tidewright.engine.plan import StepPlan
from tidewright.schema import SamplingParams

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU; torch sees none")


@pytest.mark.parametrize("changes", [{}, {"max_batched_tokens": 9}, {"speculative_tokens": 3}, {"block_size": 1}])
@pytest.mark.parametrize("sampling", ["greedy", "seeded"])
def test_tokens_on_cuda_are_those_of_the_cpu(
    folder: Path,  # noqa: F811
    alone: dict[str, list[list[int]]],  # noqa: F811
    changes: dict[str, Any],
    sampling: str,
) -> None:
    params = {"temperature": 0.7, "top_k": 2, "seed": 11} if sampling == "seeded" else {}
    made = engine(folder, device="cuda", **changes)
    assert made.ready().device == "cuda"
    for got, want in zip(tokens(outputs_of_engine(made, requests(**params), 2)), alone[sampling], strict=True):
        cut = got.index(2) if sampling == "greedy" and 2 in got else len(got)
        assert got[:cut] == want[:cut]


def test_no_step_waits_for_the_gpu_before_its_result(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """What tests/devices/cuda/test_syncs.py finds without a GPU, by CUDA itself."""
    made = engine(folder, device="cuda")
    mix = [
        {"temperature": 0.7, "top_k": 9, "logprobs": 2},
        {"repetition_penalty": 1.3, "logit_bias": {5: 2.0}, "prompt_logprobs": 1},
        {"allowed_token_ids": [5, 6, 7], "min_tokens": 3},
    ]
    submits = [
        Submit(number, request.prompt_token_ids, SamplingParams(seed=1, max_tokens=8, **mix[number % 3]))
        for number, request in enumerate(requests())
    ]
    first = tokens(outputs_of_engine(made, submits))  # compiles kernels, which may wait
    launch = made.runner.launch

    def watched(plan: StepPlan) -> LaunchedStep:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return launch(plan)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(made.runner, "launch", watched)
    assert tokens(outputs_of_engine(made, submits)) == first
