"""From logits to tokens on a GPU: the tokens that sampling/sampler.py draws, without a sort and without a sync.

Grammars, allowed and banned tokens and bias come first: they change single entries, and sampling/logits.py does that on
any device. Then five kernels, over rows and chunks of the vocabulary:

- penalise: logits in float32 with their penalties, and the highest of each chunk;
- weigh: exp((logit - highest) / temperature), the probability up to a factor, and the sum of each chunk;
- truncate: the lowest weight that min_p, top_k and top_p keep. For top_k it is the lowest x with fewer than k weights
  above it, for top_p the lowest x with less than top_p of the mass above it. A search over the bits of x finds each, in
  15 passes over the row. Weights equal to the edge all stay, as on the CPU;
- race, pick: the draw of truncation.race, with the lots of sampling/lots.py, which are bit-equal on CPU and GPU.

Weights differ from the CPU's in their last bits, as exp and the order of the sums differ. The race tolerates that:
about one draw in a million from equal logits gives another token. A row's token depends on that row alone, and no sum
depends on the order in which programs run. The host reads nothing back, so a CUDA graph can capture all kernels.
"""

from __future__ import annotations

import numpy as np
import torch

from tidewright.devices.cuda import sampling_kernels as kernels
from tidewright.devices.cuda.launch import start
from tidewright.devices.cuda.sampling_launch import CHUNK, COUNT_LAUNCH, Work, launches_of
from tidewright.step.sampling import Columns


class DeviceCounts:
    """How often each token occurs in a sequence's output, and whether the prompt has it; on the device, one row each.

    A row takes four bytes per token of the vocabulary, so only sequences with penalties should have one. Draws after
    speculative tokens need rows of their own, as each has another history.
    """

    def __init__(self, rows: int, vocab_size: int, device: torch.device) -> None:
        self.counts_NV = torch.zeros((rows, vocab_size), dtype=torch.int32, device=device)

    def set(self, row: int, prompt_ids: torch.Tensor, output_ids: torch.Tensor) -> None:
        """Counts a sequence anew, when it enters or after a preemption."""
        counts_V = self.counts_NV[row].zero_()
        counts_V.index_add_(0, output_ids, torch.ones_like(output_ids, dtype=torch.int32))
        counts_V[prompt_ids] = counts_V[prompt_ids] | kernels.IN_PROMPT  # idempotent, so duplicates do no harm

    def add(self, rows_B: torch.Tensor, tokens_B: torch.Tensor) -> None:
        """Counts one more token in each of the rows; -1: none."""
        if len(rows_B):
            vocab = self.counts_NV.shape[1]
            start(kernels.count_kernel, (len(rows_B),), COUNT_LAUNCH, self.counts_NV, rows_B, tokens_B, vocab)


def work_of(params: Columns[np.ndarray], has_penalties: bool) -> Work:
    """By the host's copy of the columns."""
    return Work(
        penalties=has_penalties,
        random=bool(params.is_random.any()),
        filters=bool(params.is_filtered.any()),
    )


def sample(
    logits_BV: torch.Tensor,
    params: Columns[torch.Tensor],
    work: Work,
    counts: DeviceCounts | None = None,
    count_rows_B: torch.Tensor | None = None,
) -> torch.Tensor:
    """tokens_B, int64. Does not change the logits. `count_rows_B`: int32, the row in `counts`; -1: no penalties."""
    batch, vocab = logits_BV.shape
    assert logits_BV.stride(1) == 1
    assert not work.penalties or (counts is not None and count_rows_B is not None)
    launches = launches_of(vocab, work)
    chunks = -(-vocab // CHUNK)
    work_BV = logits_BV.new_empty((batch, vocab), dtype=torch.float32)
    tokens_B = logits_BV.new_empty(batch, dtype=torch.int64)
    keys_BC, firsts_BC, blocks_BC = logits_BV.new_empty((3, batch, chunks), dtype=torch.int32)
    sums_BC, scores_BC, masses_BC = logits_BV.new_empty((3, batch, chunks), dtype=torch.float32)
    edges_B = logits_BV.new_empty(batch, dtype=torch.float32)
    if not batch:
        return tokens_B
    by_chunk, by_row = (batch, chunks), (batch,)
    size = vocab, chunks
    temperature_B, where = params.temperature, (params.seed, params.position)
    unused = tokens_B  # for what a kernel does not read

    start(
        kernels.penalise_kernel,
        by_chunk,
        launches["penalise"],
        *(logits_BV, work_BV, keys_BC, firsts_BC),
        *(params.repetition_penalty, params.frequency_penalty, params.presence_penalty),
        unused if count_rows_B is None else count_rows_B,
        unused if counts is None else counts.counts_NV,
        *(vocab, logits_BV.stride(0), chunks),
    )
    if work.random:
        start(kernels.weigh_kernel, by_chunk, launches["weigh"], work_BV, sums_BC, keys_BC, temperature_B, *size)
        if work.filters:
            filters = temperature_B, params.top_k, params.top_p, params.min_p
            start(kernels.truncate_kernel, by_row, launches["truncate"], work_BV, sums_BC, edges_B, *filters, *size)
        start(
            kernels.race_kernel,
            by_chunk,
            launches["race"],
            *(work_BV, edges_B, scores_BC, blocks_BC, masses_BC),
            *(temperature_B, *where, *size),
        )
    start(
        kernels.pick_kernel,
        by_row,
        launches["pick"],
        *(work_BV, edges_B, keys_BC, firsts_BC, scores_BC, blocks_BC, masses_BC),
        *(tokens_B, temperature_B, *where, *size),
    )
    return tokens_B
