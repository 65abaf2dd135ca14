"""CUDA graphs of decode: one launch for the hundreds of kernels of a forward pass, which leave a small batch waiting.

A graph is recorded for each of some batch sizes, over the step's persistent buffers. A step of single tokens replays
the smallest that has room for it; the rows beyond it are padding: they have no context, and no cache keeps their keys
and values. Where there are LoRA adapters, each size has a second graph for steps with some, with as many tiles of rows
as there may be: other steps need not launch what adds nothing. Whose memory is what: the input is the step buffers',
the output is `_hidden_BE`, one for all sizes, and what lies between is the recorder's, shared by all graphs, as only
one of them runs at a time. Other steps run eagerly, and those of a size for whose graph memory did not suffice.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any, Protocol

import torch

from tidewright.devices.memory import out_of_memory
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
        """What does on the device all that `compute` does, on the same tensors, without its Python.

        After an error, the device is as if nothing had been recorded, and more can be.
        """


class CudaRecorder:
    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None  # torch's handle of the memory of graphs that there are
        self._failed: list[torch.cuda.CUDAGraph] = []  # torch's allocators may go on asking them

    def begin(self) -> None:
        self._pool = None  # torch takes no graph into a pool whose graphs are all gone, if any memory of it is in use

    def record(self, compute: Replay) -> Replay:
        # If torch can't end a recording, it leaves the stream that it recorded on as the current one.
        with torch.cuda.device(self._device), torch.cuda.stream(torch.cuda.current_stream()):
            # Kernels are compiled and libraries take their memory in a first run, which is not recorded.
            apart = torch.cuda.Stream()
            apart.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(apart):
                compute()
            torch.cuda.current_stream().wait_stream(apart)
            graph, pool = torch.cuda.CUDAGraph(), self._pool or torch.cuda.graph_pool_handle()
            try:
                # Other threads use no GPU, but what they do to the host's memory must not end the recording.
                with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                    compute()
            except BaseException:
                self._failed.append(graph)
                _leave(pool)
                graph.reset()  # gives its memory back
                raise
        self._pool = pool
        return graph.replay


def _lack(error: Exception) -> str:
    """What it says, if a recording ran out of memory; else empty. The end of one that CUDA has given up has an error of
    its own."""
    before_it = error.__context__
    return out_of_memory(error) or (out_of_memory(before_it) if isinstance(before_it, Exception) else "")


def _leave(pool: Any) -> None:
    """Ends a recording into that memory for torch's allocator, if torch has not: it does not if CUDA, which has given
    the recording up, says so at its end. The allocator would give no memory back any more."""
    device = torch.cuda.current_device()
    with contextlib.suppress(RuntimeError):  # it has
        torch._C._cuda_endAllocateToPool(device, pool)
        torch._C._cuda_releasePool(device, pool)


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
        self.lacks: dict[int, str] = {}
        """Sizes without a graph, and what the device said as memory did not suffice."""
        self._replays: dict[tuple[int, bool], Replay] = {}
        hidden_BE: torch.Tensor | None = None
        kinds = (True, False) if has_adapters else (False,)
        for size, adapted in product(sorted(sizes, reverse=True), kinds):  # later ones fit into the memory of the first
            try:
                batch = batch_of(size, adapted)
                if hidden_BE is None:
                    hidden_BE = torch.empty_like(compute(batch))

                def run(batch: StepBatch = batch, out_BE: torch.Tensor = hidden_BE[:size]) -> None:
                    out_BE.copy_(compute(batch))

                self._replays[size, adapted] = recorder.record(run)
            except Exception as error:
                if not (lack := _lack(error)):
                    raise
                self.lacks[size] = lack
        self._hidden_BE = hidden_BE

    def has(self, batch: StepBatch) -> bool:
        """A graph for a batch of that size."""
        return (batch.padded_to, batch.adapters is not None) in self._replays

    def forward(self, batch: StepBatch) -> torch.Tensor:
        """Hidden states of a batch that it has a graph for. The next forward overwrites them."""
        self._replays[batch.padded_to, batch.adapters is not None]()
        assert self._hidden_BE is not None
        return self._hidden_BE[: len(batch.token_ids_T)]
