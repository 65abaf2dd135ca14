"""The adapters of a step's rows, as the step's buffers make them."""

from __future__ import annotations

import numpy as np
import torch

from tidewright.step.adapters import AdapterColumn, AdapterRows, adapter_arrays
from tidewright.step.arena import Arena


def adapter_rows(slots: list[int]) -> AdapterRows:
    arena = Arena(adapter_arrays(len(slots), max(slots) + 1), torch.device("cpu"), staged=False)
    rows = AdapterColumn(arena, max(slots) + 1).gather(np.array(slots, np.int32))
    assert rows
    return rows
