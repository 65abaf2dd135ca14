"""gguf's reader with bounds, so that a damaged file neither reads past its end nor takes all time and memory."""

from __future__ import annotations

from typing import Any

import numpy as np
from gguf import GGUFReader

# Each number or text of an array is one; vocabularies of 256k tokens with their merges have about two million.
MOST_VALUES = 5_000_000


class BoundedReader(GGUFReader):
    """Raises ValueError, also where gguf's own would read numbers that are not there, or loop over them."""

    values = 0

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
        self.values += 1
        if int(offset) + int(count) * np.dtype(dtype).itemsize > len(self.data):
            raise ValueError("it ends too early")
        if self.values > MOST_VALUES:
            raise ValueError(f"it has more than {MOST_VALUES} values in its header")
        return super()._get(offset, dtype, count, override_order)
