"""A rank's view of its tensor-parallel group: which part of everything is its own, and the collectives. Not: layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tidewright.distributed import sharding
from tidewright.distributed.sharding import Cut
from tidewright.distributed.shared_memory import SharedMemory


@dataclass(frozen=True)
class TensorParallelGroup:
    """Collectives go through torch.distributed's default group, or through `shared` memory where it can be used.

    While ranks start they meet in `store`: one may load for much longer than a collective may take.
    """

    rank: int = 0
    size: int = 1
    shared: SharedMemory | None = None
    store: torch.distributed.Store | None = None

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over ranks, in place; the same bits on all of them."""
        if self.size > 1:
            if self.shared and self.shared.takes(x):
                self.shared.all_reduce(x)
            else:
                torch.distributed.all_reduce(x)
        return x

    def gather(self, x: torch.Tensor) -> torch.Tensor | None:
        """On rank 0 the ranks' tensors, of equal shapes, joined along the last dimension; None on the others."""
        if self.size == 1:
            return x
        if self.shared and self.shared.takes(x):
            return self.shared.gather(x)
        parts = [torch.empty_like(x) for _ in range(self.size)] if self.rank == 0 else None
        torch.distributed.gather(x.contiguous(), parts)
        return None if parts is None else torch.cat(parts, dim=-1)

    def broadcast(self, x: torch.Tensor) -> torch.Tensor:
        """Rank 0's, in place."""
        if self.size > 1:
            torch.distributed.broadcast(x, 0)
        return x

    def smallest(self, value: int) -> int:
        """The least of the ranks' values, on each of them. Waits for the others as long as the store does."""
        if self.size == 1:
            return value
        assert self.store is not None
        round_ = self.store.add(f"rounds of {self.rank}", 1)
        self.store.set(f"{round_} of {self.rank}", str(value))
        return min(int(self.store.get(f"{round_} of {rank}")) for rank in range(self.size))

    def wait_for_all(self) -> None:
        """Until every rank has come here."""
        self.smallest(0)

    def cut(self, total: int) -> Cut:
        """As sharding.py says, for this rank. Raises ShardingError."""
        return sharding.cut(total, self.rank, self.size)

    def cut_heads(self, num_heads: int, num_kv_heads: int) -> tuple[Cut, Cut]:
        """Likewise: its query heads, and the KV heads that they read."""
        return sharding.cut_heads(num_heads, num_kv_heads, self.rank, self.size)


ALONE = TensorParallelGroup()
