"""A small checkpoint for ranks to share."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers

from helpers.checkpoints import SIZES, save


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, transformers.PreTrainedModel]:
    """6 query and 2 KV heads."""
    folder = tmp_path_factory.mktemp("model")
    return folder, save(folder, transformers.LlamaConfig(**SIZES), shards=True)
