"""Weights in 8 bits, and the file that they are written to."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx.external_data_helper import ExternalDataInfo

from helpers.checkpoints import save
from helpers.exports import exported
from helpers.families import FAMILIES
from tidewright.onnx_export.decoder import decoder_graph
from tidewright.onnx_export.int8 import BLOCK, quantize
from tidewright.onnx_export.source import SourceModel
from tidewright.onnx_export.weights import bytes_needed, model_tensors


def test_codes_times_scales_are_the_weights() -> None:
    weight_FE = np.random.default_rng(0).standard_normal((5, 2 * BLOCK + 7)).astype(np.float32)
    weight_FE[1, :BLOCK] *= 1e3  # a block's scale is no other block's business
    weight_FE[2, :BLOCK] = 0
    codes, scales = quantize(weight_FE)
    assert (codes.dtype, codes.shape, scales.shape) == (np.uint8, (5, 3, BLOCK), (5, 3))
    restored = ((codes.astype(np.float32) - 128) * scales[..., None]).reshape(5, -1)
    assert (restored[:, weight_FE.shape[1] :] == 0).all()
    error = np.abs(restored[:, : weight_FE.shape[1]] - weight_FE)
    assert (error <= np.repeat(scales, BLOCK, axis=1)[:, : weight_FE.shape[1]] * 0.5001).all()
    assert (codes.min(), codes.max()) == (1, 255)  # symmetric


@pytest.mark.parametrize("int8", [False, True])
def test_weights_lie_in_their_own_file_page_by_page(tmp_path: Path, int8: bool) -> None:
    """A graph with its weights inside can't be read from 2 GiB on."""
    save(tmp_path, FAMILIES["llama, biases"])
    exported(tmp_path, int8)
    weights = onnx.load(tmp_path / "model.onnx", load_external_data=False).graph.initializer
    inside = [weight for weight in weights if not weight.external_data]
    assert all(weight.name.startswith("constant_") for weight in inside)
    infos = [ExternalDataInfo(weight) for weight in weights if weight.external_data]
    assert len(infos) > 20
    assert all(info.location == "model.onnx.data" and info.offset % 4096 == 0 for info in infos)
    ends = sorted((info.offset, info.offset + info.length) for info in infos)
    assert all(end <= start for (_, end), (start, _) in pairwise(ends))
    assert ends[-1][1] == (tmp_path / "model.onnx.data").stat().st_size


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("name", ["llama, tied", "gemma 3, untied"])
def test_the_space_asked_for_is_enough_and_not_far_off(tmp_path: Path, name: str, int8: bool) -> None:
    save(tmp_path, FAMILIES[name])
    exported(tmp_path, int8)
    source = SourceModel(tmp_path)
    graph = decoder_graph(source.architecture, source.config, int8)
    needed, data = bytes_needed(model_tensors(source.decoder), graph), (tmp_path / "model.onnx.data").stat().st_size
    assert data <= needed <= 3 * data
