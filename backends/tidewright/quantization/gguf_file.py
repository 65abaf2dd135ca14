"""Weights of a GGUF file, read from a memory map as they are."""

from __future__ import annotations

import mmap
from pathlib import Path

import msgspec
import numpy as np
import torch

from tidewright.quantization.affine import AffineWeight, QuantizationError, groups_of_columns
from tidewright.quantization.gguf_index import GGUF_FILE, INDEX_FILE, GgufIndex, GgufTensor
from tidewright.quantization.gguf_types import BLOCK_TYPES, BlockType, flat
from tidewright.quantization.stored import check_finite

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class _Rows:
    """A tensor's rows in the file, by their numbers in Hugging Face's order."""

    def __init__(self, bytes_FB: np.ndarray, permuted_heads: int) -> None:
        self._bytes_FB, self._order_F = bytes_FB, None
        if permuted_heads:
            # Rows of a head stand as pairs (i, i + D/2) side by side; Hugging Face wants the two halves apart.
            numbers = np.arange(len(bytes_FB)).reshape(permuted_heads, -1, 2)
            self._order_F = numbers.swapaxes(1, 2).reshape(-1)

    def read(self, rows: slice, first: int, last: int) -> np.ndarray:
        """A copy of bytes `first` to `last` of each."""
        chosen = rows if self._order_F is None else self._order_F[rows]
        return np.array(self._bytes_FB[chosen, first:last])


class GgufWeight:
    """An `AffineSource`."""

    def __init__(self, name: str, block: BlockType, shape: tuple[int, int], rows: _Rows) -> None:
        self.name, self._block, self._shape, self._rows = name, block, shape, rows

    def get_shape(self) -> list[int]:
        return list(self._shape)

    def cut(self, rows: slice, columns: slice) -> AffineWeight:
        """Raises QuantizationError."""
        block, size = self._block, self._block.group_size
        groups_of_columns(self._shape[1], size, columns.start, columns.stop)
        first, last = columns.start // block.elements, -(-columns.stop // block.elements)
        packed = self._rows.read(rows, first * block.bytes, last * block.bytes)
        blocks = packed.shape[1] // block.bytes
        codes, scales, offsets = (
            None if numbers is None else flat(numbers.reshape(len(packed), blocks, numbers.shape[1]))
            for numbers in block.decode(packed.reshape(len(packed) * blocks, block.bytes))
        )
        assert codes is not None
        # A block may have more groups than were asked for.
        skipped, width = columns.start - first * block.elements, columns.stop - columns.start
        groups = slice(skipped // size, (skipped + width) // size)
        codes_FE = codes[:, skipped : skipped + width]
        scales_FG, offsets_FG = (
            None if numbers is None else torch.from_numpy(np.ascontiguousarray(numbers[:, groups]))
            for numbers in (scales, offsets)
        )
        check_finite(self.name, scales_FG, offsets_FG)
        assert scales_FG is not None
        return AffineWeight(torch.from_numpy(np.ascontiguousarray(codes_FE)), scales_FG, offsets_FG, block.bits, size)


class GgufPlainWeight:
    """A `WeightSlice`."""

    def __init__(self, dtype: torch.dtype, shape: tuple[int, ...], rows: _Rows) -> None:
        self._dtype, self._shape, self._rows = dtype, shape, rows

    def get_shape(self) -> list[int]:
        return list(self._shape)

    def __getitem__(self, index: tuple[slice, ...]) -> torch.Tensor:
        if len(self._shape) == 1:
            (columns,), rows = index, slice(0, 1)
        else:
            rows, columns = index
        first, last, _ = columns.indices(self._shape[-1])
        packed = self._rows.read(rows, first * self._dtype.itemsize, last * self._dtype.itemsize)
        # Flat: a matrix without rows has strides that torch does not view as another type.
        values = torch.from_numpy(packed.reshape(-1)).view(self._dtype).reshape(len(packed), last - first)
        return values[0] if len(self._shape) == 1 else values


class GgufFile:
    """Raises QuantizationError: index or file is not there, or damaged."""

    def __init__(self, folder: Path) -> None:
        path = folder / GGUF_FILE
        try:
            index = msgspec.json.decode((folder / INDEX_FILE).read_bytes(), type=GgufIndex)
            size = path.stat().st_size
            if size != index.bytes:
                raise QuantizationError(f"{path} has {size} bytes, expected {index.bytes}; prepare the model anew")
            with path.open("rb") as file:
                # Not np.memmap: it would be an open file for every array.
                self._map = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype=np.uint8)
        except (OSError, ValueError) as error:
            if isinstance(error, QuantizationError):
                raise
            raise QuantizationError(f"{folder} holds no readable GGUF model: {error}; prepare it anew") from error
        self._index = index

    def weights(self) -> dict[str, GgufWeight | GgufPlainWeight]:
        return {name: self._weight(name, tensor) for name, tensor in self._index.tensors.items()}

    def _weight(self, name: str, tensor: GgufTensor) -> GgufWeight | GgufPlainWeight:
        if not tensor.shape:
            raise QuantizationError(f"{name} has no shape; prepare the model anew")
        *leading, depth = tensor.shape
        rows = leading[0] if leading else 1
        block, dtype = BLOCK_TYPES.get(tensor.type), _DTYPES.get(tensor.type)
        if (
            len(leading) > 1
            or (block is None) == (dtype is None)
            or (block and (depth % block.elements or not leading))
        ):
            raise QuantizationError(f"{name}: {tensor.type} of shape {tensor.shape} can't be served")
        width = depth // block.elements * block.bytes if block else depth * dtype.itemsize if dtype else 0
        stored = self._map[tensor.offset : tensor.offset + rows * width]
        if tensor.offset < 0 or min(tensor.shape) < 1 or len(stored) != rows * width:
            raise QuantizationError(f"{name} lies outside the GGUF file; prepare the model anew")
        if tensor.permuted_heads and rows % (2 * tensor.permuted_heads):
            raise QuantizationError(f"{name}: {rows} rows are not those of {tensor.permuted_heads} heads")
        in_order = _Rows(stored.reshape(rows, width), tensor.permuted_heads)
        if block:
            return GgufWeight(name, block, (rows, depth), in_order)
        assert dtype
        return GgufPlainWeight(dtype, tensor.shape, in_order)
