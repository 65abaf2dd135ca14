"""The same engine on a GPU. Skipped where there is none; run it with `pytest tests/engine/test_engine_cuda.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from engine.test_engine import alone, engine, folder, requests, run, tokens  # noqa: F401 (fixtures)

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
    for got, want in zip(tokens(run(made, requests(**params), 2)), alone[sampling], strict=True):
        cut = got.index(2) if sampling == "greedy" and 2 in got else len(got)
        assert got[:cut] == want[:cut]
