"""All layers in one call of C: what it says of its progress, and ranks whose sum fails. Its bits: test_families.py."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from helpers import checkpoints
from helpers.families import FAMILIES
from tidewright.devices.cpu.fusion import fuse_layers
from tidewright.engine.model_runner import ModelRunner


@pytest.fixture
def runner(tmp_path: Path) -> ModelRunner:
    checkpoints.save(tmp_path, FAMILIES["llama, tied"])
    return ModelRunner(checkpoints.engine_config(tmp_path))


@pytest.mark.parametrize("is_fused", [True, False])
def test_progress_counts_layers(runner: ModelRunner, is_fused: bool) -> None:
    if not is_fused:
        runner.device.fused_rows = 0
    before = runner.progress
    checkpoints.logits(runner, checkpoints.prompt(6, seed=1), chunk=3)
    assert runner.progress == before + 2 * len(runner.model.layers)


def test_a_sum_over_ranks_that_fails_ends_the_step_with_its_error(runner: ModelRunner) -> None:
    sums = 0

    def all_reduce(x_TE: torch.Tensor) -> torch.Tensor:
        nonlocal sums
        sums += 1
        if sums == 3:
            raise ConnectionError("no rank 1")
        return x_TE

    ids, before = checkpoints.prompt(3, seed=1), runner.progress
    alone = checkpoints.logits(runner, ids, chunk=3)
    runner.model.group = SimpleNamespace(size=2, all_reduce=all_reduce)
    runner.device._layers = fuse_layers(runner.model)
    runner.model.group = SimpleNamespace(size=1)
    with pytest.raises(ConnectionError, match="no rank 1"):
        checkpoints.logits(runner, ids, chunk=3)
    assert (sums, runner.progress) == (3, before + len(runner.model.layers) + 1)
    sums = 3
    assert torch.equal(checkpoints.logits(runner, ids, chunk=3), alone)
    assert sums == 3 + 2 * len(runner.model.layers)
