"""CUDA graphs of decode: one launch for the hundreds of kernels of a forward pass, which leave a small batch waiting.

A graph is recorded for each of some batch sizes, over the step's persistent buffers. A step of single tokens replays
the smallest that has room for it; the rows beyond it are padding: they have no context, and no cache keeps their keys
and values. Where there are LoRA adapters, each size has a second graph for steps with some, with as many tiles of rows
as there may be: other steps need not launch what adds nothing. Whose memory is what: the input is the step buffers',
the output is `_hidden_BE`, one for all sizes, and what lies between is the recorder's, shared by all graphs, as only
one of them runs at a time. Other steps run eagerly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any, Protocol

import torch

from tidewright.step.batch import StepBatch

Replay = Callable[[], None]


def sizes_of(most: int) -> tuple[int, ...]:
    """Batch sizes up to `most`, closer together where a row more costs more of the step."""
    sizes = (1, 2, 4, *range(8, min(most, 64) + 1, 8), *range(96, most + 1, 32), most)
    return tuple(sorted({size for size in sizes if size <= most}))


class Recorder(Protocol):
    def begin(self) -> None:
        """Nothing that was recorded before is replayed again, and nobody holds it."""

    def record(self, compute: Replay) -> Replay:
        """What does on the device all that `compute` does, on the same tensors, without its Python."""


class CudaRecorder:
    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None  # torch's handle of the graphs' memory

    def begin(self) -> None:
        self._pool = None  # torch takes no graph into a pool whose graphs are all gone, if any memory of it is in use

    def record(self, compute: Replay) -> Replay:
        with torch.cuda.device(self._device):
            # Kernels are compiled and libraries take their memory in a first run, which is not recorded.
            apart = torch.cuda.Stream()
            apart.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(apart):
                compute()
            torch.cuda.current_stream().wait_stream(apart)
            graph = torch.cuda.CUDAGraph()
            # Other threads use no GPU, but what they do to the host's memory must not end the recording.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                compute()
        self._pool = graph.pool()
        return graph.replay


class DecodeGraphs:
    def __init__(
        self,
        recorder: Recorder,
        sizes: Sequence[int],
        batch_of: Callable[[int, bool], StepBatch],
        compute: Callable[[StepBatch], torch.Tensor],
        has_adapters: bool = False,
    ) -> None:
        """`compute` gives the hidden states of a batch of single tokens.

        `batch_of` makes one of a size, with LoRA adapters or without.
        """
        recorder.begin()
        self._replays: dict[tuple[int, bool], Replay] = {}
        hidden_BE: torch.Tensor | None = None
        kinds = (True, False) if has_adapters else (False,)
        for size, adapted in product(sorted(sizes, reverse=True), kinds):  # later ones fit into the memory of the first
            batch = batch_of(size, adapted)
            if hidden_BE is None:
                hidden_BE = torch.empty_like(compute(batch))

            def run(batch: StepBatch = batch, out_BE: torch.Tensor = hidden_BE[:size]) -> None:
                out_BE.copy_(compute(batch))

            self._replays[size, adapted] = recorder.record(run)
        assert hidden_BE is not None
        self._hidden_BE = hidden_BE

    def forward(self, batch: StepBatch) -> torch.Tensor:
        """Hidden states of a batch that is padded to a size. The next forward overwrites them."""
        self._replays[batch.padded_to, batch.adapters is not None]()
        return self._hidden_BE[: len(batch.token_ids_T)]
