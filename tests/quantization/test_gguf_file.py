"""quantization/gguf_file.py: rows and columns of every type, in the order and under the index that `prepare` writes."""

from __future__ import annotations

from pathlib import Path

import gguf
import msgspec
import numpy as np
import pytest
import torch
from gguf.quants import dequantize

from tidewright.quantization.affine import AffineSource, QuantizationError
from tidewright.quantization.checkpoint import CheckpointError, open_checkpoint
from tidewright.quantization.gguf_index import GGUF_FILE, INDEX_FILE, PLAIN_TYPES, SERVED_TYPES, GgufIndex, GgufTensor
from tidewright.quantization.gguf_types import BLOCK_TYPES

ROWS, COLUMNS, HEADS = 24, 512, 3
START = 32  # of the tensors in the file


def write(folder: Path, data: np.ndarray, **tensor: object) -> Path:
    (folder / GGUF_FILE).write_bytes(bytes(START) + data.tobytes())
    place = GgufTensor(**({"type": "F32", "shape": data.shape, "offset": START} | tensor))  # type: ignore[arg-type]
    index = GgufIndex(START + data.nbytes, {"x.weight": place})
    (folder / INDEX_FILE).write_bytes(msgspec.json.encode(index))
    return folder


def in_rope_order(weight: np.ndarray) -> np.ndarray:
    """Rows as llama.cpp's converter orders those of Hugging Face."""
    heads = weight.reshape(HEADS, 2, ROWS // HEADS // 2, -1)
    return heads.swapaxes(1, 2).reshape(weight.shape)


@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_cuts_are_those_of_the_whole(tmp_path: Path, name: str, permuted: bool) -> None:
    block = BLOCK_TYPES[name]
    packed = np.random.default_rng(0).integers(0, 60, (ROWS, COLUMNS // block.elements * block.bytes), dtype=np.uint8)
    stored = in_rope_order(packed) if permuted else packed
    heads = HEADS if permuted else 0
    folder = write(tmp_path, stored, type=name, shape=(ROWS, COLUMNS), permuted_heads=heads)
    expected = torch.from_numpy(dequantize(packed, gguf.GGMLQuantizationType[name]))
    with open_checkpoint(folder) as weights:
        source = weights["x.weight"]
        assert isinstance(source, AffineSource)
        assert source.get_shape() == [ROWS, COLUMNS]
        for part in (
            (slice(0, ROWS), slice(0, COLUMNS)),
            (slice(5, 17), slice(32, 480)),  # amid a block of 256
            (slice(0, 1), slice(256, 512)),
            (slice(ROWS, ROWS), slice(0, COLUMNS)),  # of a rank without vocabulary
        ):
            own = source.cut(*part)
            assert torch.equal(own.dequantized(), expected[part])
            assert (own.bits, own.group_size) == (block.bits, block.group_size)
        with pytest.raises(QuantizationError, match="within a group"):
            source.cut(slice(0, ROWS), slice(0, 40))


@pytest.mark.parametrize(("name", "dtype"), [("F32", torch.float32), ("F16", torch.float16), ("BF16", torch.bfloat16)])
def test_plain_types(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    whole = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0)).to(dtype)
    data = whole.view(torch.uint8).numpy()
    with open_checkpoint(write(tmp_path, data, type=name, shape=(ROWS, COLUMNS))) as weights:
        assert torch.equal(weights["x.weight"][3:9, 5:], whole[3:9, 5:])  # type: ignore[index]
        assert weights["x.weight"][ROWS:ROWS, 5:].shape == (0, COLUMNS - 5)  # type: ignore[index]
    with open_checkpoint(write(tmp_path, data[0], type=name, shape=(COLUMNS,))) as weights:
        assert torch.equal(weights["x.weight"][(slice(None),)], whole[0])  # type: ignore[index]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"type": "IQ4_NL"}, "IQ4_NL of shape"),
        ({"type": "Q4_0", "shape": (8, 40)}, "can't be served"),
        ({"type": "Q4_0", "shape": (64,)}, "can't be served"),
        ({"offset": 33}, "outside the GGUF file"),
        ({"offset": -1}, "outside the GGUF file"),
        ({"shape": (8, 0)}, "outside the GGUF file"),
        ({"permuted_heads": 3}, "not those of 3 heads"),
    ],
)
def test_an_index_that_does_not_fit(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    write(tmp_path, np.zeros((8, 16), dtype=np.float32), **changes)
    with pytest.raises(CheckpointError, match=message):
        with open_checkpoint(tmp_path):
            pass


def test_another_file_than_the_one_that_was_prepared(tmp_path: Path) -> None:
    write(tmp_path, np.zeros((8, 16), dtype=np.float32))
    with (tmp_path / GGUF_FILE).open("ab") as file:
        file.write(b"more")
    with pytest.raises(CheckpointError, match="has 548 bytes, expected 544; prepare the model anew"):
        with open_checkpoint(tmp_path):
            pass


def test_plain_weights_beside_it_come_first_if_preferred(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    write(tmp_path, np.zeros((8, 16), dtype=np.float32))
    save_file({"x.weight": torch.ones(1)}, tmp_path / "model.safetensors")
    for prefer_plain, shape in ((True, [1]), (False, [8, 16])):
        with open_checkpoint(tmp_path, prefer_plain) as weights:
            assert weights["x.weight"].get_shape() == shape


def test_each_type_that_is_served_is_plain_or_has_a_decoder() -> None:
    assert {*SERVED_TYPES} == {*PLAIN_TYPES, *BLOCK_TYPES}
