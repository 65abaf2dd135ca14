"""quantization/stored_scheme.py: of every format, what its config.json or index says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tidewright.quantization.affine import SCHEMES, QuantizationError, Scheme
from tidewright.quantization.compressed_tensors_writer import quantization_config
from tidewright.quantization.gguf_index import INDEX_FILE, GgufIndex, GgufTensor
from tidewright.quantization.stored_scheme import stored_scheme

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128}


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (None, None),
        (GPTQ, Scheme("gptq int4-g128", 4, 128)),
        (GPTQ | {"bits": 8, "group_size": -1, "sym": False}, Scheme("gptq int8", 8, 0, symmetric=False)),
        ({"quant_method": "awq", "w_bit": 4, "q_group_size": 64}, Scheme("awq int4-g64", 4, 64, symmetric=False)),
        ({"quant_method": "fp8"}, SCHEMES["fp8"]),
        *((quantization_config(scheme, None, []), scheme) for scheme in SCHEMES.values()),
    ],
)
def test_of_config_json(tmp_path: Path, found: dict[str, Any] | None, expected: Scheme | None) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": found}))
    assert stored_scheme(tmp_path) == expected


def test_of_a_gguf_file_it_is_that_of_most_weights(tmp_path: Path) -> None:
    types = ["Q8_0", "Q4_1", "Q4_1", "F32", "F32", "F32"]
    shapes = [(64, 32)] * 3 + [(32,)] * 3  # norms do not count
    pairs = zip(types, shapes, strict=True)
    tensors = {str(number): GgufTensor(kind, shape, 0) for number, (kind, shape) in enumerate(pairs)}
    (tmp_path / INDEX_FILE).write_bytes(msgspec.json.encode(GgufIndex(0, tensors)))
    assert stored_scheme(tmp_path) == Scheme("gguf Q4_1", 4, 32, symmetric=False)
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "config.json").write_text("{}")
    assert stored_scheme(tmp_path) is None
    assert stored_scheme(tmp_path, prefer_plain=False)
    (tmp_path / INDEX_FILE).write_text("{")
    with pytest.raises(QuantizationError, match=r"is not readable.*prepare the model anew"):
        stored_scheme(tmp_path, prefer_plain=False)
