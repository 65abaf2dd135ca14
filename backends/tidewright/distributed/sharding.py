"""Which part of a model is a rank's own, as plain arithmetic: by it layers are cut, and `tidewright plan` counts."""

from __future__ import annotations

from dataclasses import dataclass

# Parts of a hidden dimension are multiples of this where the whole is one: short rows are slow to read.
_UNIT = 32
# The vocabulary is padded to a multiple: the kernels then need no copy of its weight, see CpuKernels.pack.
_ROWS = 64


class ShardingError(ValueError):
    """The model can't be cut into so many ranks."""


@dataclass(frozen=True)
class Cut:
    """Of a dimension of `total` entries: those from `first` on, `count` of them."""

    total: int
    first: int
    count: int

    @classmethod
    def whole(cls, total: int) -> Cut:
        return cls(total, 0, total)

    @property
    def slice(self) -> slice:
        return slice(self.first, self.first + self.count)

    def of(self, entries: int) -> Cut:
        """The same cut where each entry is several: heads, then rows of heads."""
        return Cut(self.total * entries, self.first * entries, self.count * entries)


def cut(total: int, rank: int, size: int) -> Cut:
    """A rank's part of `total` features; parts differ by little where they can't be equal.

    Raises:
        ShardingError: there are more ranks than parts.
    """
    unit = _UNIT if total % _UNIT == 0 and total >= _UNIT * size else 1
    parts = total // unit
    if parts < size:
        raise ShardingError(f"{total} features can't be cut into {size} parts")
    return _share(parts, rank, size).of(unit)


def cut_heads(num_heads: int, num_kv_heads: int, rank: int, size: int) -> tuple[Cut, Cut]:
    """A rank's query heads, and the KV heads that they read.

    Up to one rank a KV head, each KV head is on one rank, with all its query heads; some ranks may have one more
    than others. Of more ranks, several hold a copy of each KV head and share out its query heads.

    Raises:
        ShardingError: names the sizes that work.
    """
    group = num_heads // num_kv_heads
    if size not in tensor_parallel_sizes(num_heads, num_kv_heads):
        sizes = ", ".join(map(str, tensor_parallel_sizes(num_heads, num_kv_heads)))
        raise ShardingError(
            f"tensor_parallel_size is {size}, but {num_heads} query heads and {num_kv_heads} KV heads can "
            f"only be shared by {sizes} ranks"
        )
    if size <= num_kv_heads:
        kv = _share(num_kv_heads, rank, size)
        return kv.of(group), kv
    copies = size // num_kv_heads
    share = group // copies
    return Cut(num_heads, rank * share, share), Cut(num_kv_heads, rank // copies, 1)


def vocabulary_rows(vocab_size: int, size: int) -> int:
    """Rows of the embedding on each rank, padding included."""
    return -(-vocab_size // size // _ROWS) * _ROWS


def tensor_parallel_sizes(num_heads: int, num_kv_heads: int) -> list[int]:
    """Numbers of ranks that the heads can be shared by."""
    group = num_heads // num_kv_heads
    copies = [count for count in range(2, group + 1) if group % count == 0]
    return [*range(1, num_kv_heads + 1), *(num_kv_heads * count for count in copies)]


def _share(parts: int, rank: int, size: int) -> Cut:
    """Of so many parts a rank's, all of the same number or one more."""
    first, end = (parts * number // size for number in (rank, rank + 1))
    return Cut(parts, first, end - first)
