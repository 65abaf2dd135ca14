"""All that the device needs to compute one step. Made by buffers.py; models, attention and sampler only read it."""

# ruff: noqa: N815 - fields, too, carry their shape

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from tidewright.step.adapters import AdapterRows
from tidewright.step.sampling import SamplingBatch


@dataclass(frozen=True, eq=False)
class StepBatch:
    """The new tokens of all sequences in one flat row (T), sequence by sequence (B).

    Sequences with a single token come first, and of each kind those whose block tables begin alike lie side by side:
    attention can read shared blocks once. `tables_PM` has a row of blocks for each place that a running sequence may
    hold (P), so the rows of a step are scattered in it; what lies beyond a sequence's blocks means nothing.

    The tensors are views of buffers that the next step overwrites.
    """

    token_ids_T: torch.Tensor  # int64
    positions_T: torch.Tensor  # int64
    slots_T: torch.Tensor  # int64; where a token's keys and values go: block * block_size + offset
    spans_B4: torch.Tensor  # int32; of each sequence the first row, its position, the count, and place * M
    places_B: torch.Tensor  # int64; the row in `tables_PM`
    lengths_B: torch.Tensor  # int32; tokens that attention sees of the sequence, the new ones included
    tables_PM: torch.Tensor  # int32; M blocks at most
    rows_R: torch.Tensor  # int64; the rows after which a token is drawn
    sampling: SamplingBatch  # of those rows
    host_spans_B4: np.ndarray  # the same as `spans_B4`, for decisions that must not wait for the device
    num_decodes: int  # sequences with a single token
    end_rows: list[int]  # the row after the last one of each sequence, in the order of the plan
    max_context: int  # tokens that a sequence may have in any step
    padded_to: int = 0  # behind the batch the buffers hold padding, up to so many single tokens; 0: none
    adapters: AdapterRows | None = None  # None: no row has a LoRA adapter
