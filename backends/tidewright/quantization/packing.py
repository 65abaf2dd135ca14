"""Codes of 4 or 8 bits inside int32 words, as compressed-tensors, GPTQ and AWQ store them: the lowest bits first."""

from __future__ import annotations

import torch

from tidewright.quantization.affine import QuantizationError

WORD_BITS = 32
PACKED_BITS = (4, 8)


def unpack(words: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """Unsigned codes, uint8; `dim` grows by as many as a word holds. Raises QuantizationError: words are no int32."""
    if words.dtype != torch.int32:
        raise QuantizationError(f"packed codes are stored as {words.dtype}, expected int32; the file is damaged")
    shifts = torch.arange(0, WORD_BITS, bits, dtype=torch.int32)
    moved = words.movedim(dim, -1)
    codes = (moved[..., None] >> shifts) & (2**bits - 1)
    return codes.to(torch.uint8).flatten(-2).movedim(-1, dim)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """The words of unsigned codes, uint8, along the last dimension, which is filled up with zeros to whole words."""
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % (WORD_BITS // bits)))
    if bits == 4:
        codes = codes[..., 0::2] | (codes[..., 1::2] << 4)
    # `contiguous` leaves odd strides where there is but one row. The lowest byte is the first, as on all our machines.
    return codes.clone(memory_format=torch.contiguous_format).view(torch.int32)


def words_around(part: slice, bits: int) -> tuple[slice, slice]:
    """The words that hold the codes of `part`, and where in the codes of those words `part` is."""
    count = WORD_BITS // bits
    first = part.start // count
    words = slice(first, -(-part.stop // count))
    return words, slice(part.start - first * count, part.stop - first * count)
