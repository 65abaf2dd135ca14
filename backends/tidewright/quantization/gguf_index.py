"""Where the tensors of a GGUF file stand: an index beside it. Neither torch nor numpy: the command line imports it.

`tidewright prepare` does so, once, as reading a GGUF file's own header takes seconds.
"""

from __future__ import annotations

import msgspec

GGUF_FILE = "model.gguf"
INDEX_FILE = "model.gguf.index.json"
PLAIN_TYPES = ("F32", "F16", "BF16")
SERVED_TYPES = (*PLAIN_TYPES, "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")
"""gguf_types.py, which imports numpy, decodes the others."""


class GgufTensor(msgspec.Struct, frozen=True):
    """Names, shapes and the order of rows are Hugging Face's."""

    type: str
    shape: tuple[int, ...]
    offset: int  # in the file
    permuted_heads: int = 0
    """llama.cpp stores these rows interleaved for its rope, by head; 0: as they are."""


class GgufIndex(msgspec.Struct, frozen=True):
    bytes: int
    """Of the file."""
    tensors: dict[str, GgufTensor]
