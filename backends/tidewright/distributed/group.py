"""A rank's view of its tensor-parallel group: which part of everything is its own, and the collectives. Not: layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tidewright.distributed.shared_memory import SharedMemory

# Parts of a hidden dimension are multiples of this where the whole is one: short rows are slow to read.
_UNIT = 32


class ShardingError(ValueError):
    """The model can't be cut into so many ranks."""


@dataclass(frozen=True)
class Cut:
    """Of a dimension of `total` entries: those from `first` on, `count` of them."""

    total: int
    first: int
    count: int

    def of(self, entries: int) -> Cut:
        """The same cut where each entry is several: heads, then rows of heads."""
        return Cut(self.total * entries, self.first * entries, self.count * entries)


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
        """This rank's part of `total` features; parts differ by little where they can't be equal.

        Raises:
            ShardingError: there are more ranks than parts.
        """
        unit = _UNIT if total % _UNIT == 0 and total >= _UNIT * self.size else 1
        parts = total // unit
        if parts < self.size:
            raise ShardingError(f"{total} features can't be cut into {self.size} parts")
        return self._share(parts).of(unit)

    def cut_heads(self, num_heads: int, num_kv_heads: int) -> tuple[Cut, Cut]:
        """This rank's query heads, and the KV heads that they read.

        Up to one rank a KV head, each KV head is on one rank, with all its query heads; some ranks may have one more
        than others. Of more ranks, several hold a copy of each KV head and share out its query heads.

        Raises:
            ShardingError: names the sizes that work.
        """
        group = num_heads // num_kv_heads
        if self.size not in tensor_parallel_sizes(num_heads, num_kv_heads):
            sizes = ", ".join(map(str, tensor_parallel_sizes(num_heads, num_kv_heads)))
            raise ShardingError(
                f"tensor_parallel_size is {self.size}, but {num_heads} query heads and {num_kv_heads} KV heads can "
                f"only be shared by {sizes} ranks"
            )
        if self.size <= num_kv_heads:
            kv = self._share(num_kv_heads)
            return kv.of(group), kv
        copies = self.size // num_kv_heads
        share = group // copies
        return Cut(num_heads, self.rank * share, share), Cut(num_kv_heads, self.rank // copies, 1)

    def _share(self, parts: int) -> Cut:
        """Of so many parts this rank's, all of the same number or one more."""
        first, end = (parts * rank // self.size for rank in (self.rank, self.rank + 1))
        return Cut(parts, first, end - first)


ALONE = TensorParallelGroup()


def tensor_parallel_sizes(num_heads: int, num_kv_heads: int) -> list[int]:
    """Numbers of ranks that the heads can be shared by."""
    group = num_heads // num_kv_heads
    copies = [count for count in range(2, group + 1) if group % count == 0]
    return [*range(1, num_kv_heads + 1), *(num_kv_heads * count for count in copies)]
