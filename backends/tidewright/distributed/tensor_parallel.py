"""Layers that are cut over tensor-parallel ranks. Each layer cuts and loads its own part of a checkpoint.

With one rank they are plain layers. Which checkpoint name belongs to which layer, the model files say.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn

from tidewright.distributed.cpu_linear import CpuLinear


class ShardingError(ValueError):
    """The model can't be cut into so many ranks."""


class WeightShapeError(ValueError):
    """A checkpoint's weight has another shape than config.json announces."""


class WeightSlice(Protocol):
    """A tensor that is still on disk, as safetensors' `get_slice` gives it: an index reads only that part."""

    def get_shape(self) -> list[int]: ...
    def __getitem__(self, index: tuple[slice, ...]) -> torch.Tensor: ...


Loader = Callable[[WeightSlice], None]


@dataclass(frozen=True)
class TensorParallelGroup:
    rank: int = 0
    size: int = 1

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over ranks, in place."""
        if self.size > 1:
            torch.distributed.all_reduce(x)
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """The ranks' tensors, joined along the last dimension in rank order."""
        if self.size == 1:
            return x
        parts = [torch.empty_like(x) for _ in range(self.size)]
        torch.distributed.all_gather(parts, x.contiguous())
        return torch.cat(parts, dim=-1)

    def share(self, total: int, what: str) -> int:
        """This rank's part of `total` things, which must divide evenly."""
        if total % self.size:
            raise ShardingError(f"{total} {what} can't be cut into {self.size} equal parts")
        return total // self.size


def _weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape), requires_grad=False)


def _checked(source: WeightSlice, *shape: int) -> WeightSlice:
    if tuple(source.get_shape()) != shape:
        raise WeightShapeError(f"expected shape {shape}, found {tuple(source.get_shape())}")
    return source


def replicated_loader(weight: nn.Parameter, plus: float = 0.0) -> Loader:
    """Loads a weight that every rank holds whole, such as that of a norm. `plus` is added in the weight's own type."""

    def load(source: WeightSlice) -> None:
        weight.copy_(_checked(source, *weight.shape)[tuple(slice(None) for _ in weight.shape)])
        if plus:
            weight.add_(plus)

    return load


class PackableLinear(nn.Module):
    """A matrix product whose weight may, once loaded, be put into the layout that the processor likes best."""

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self) -> None:
        super().__init__()
        self.bias = None
        self._cpu_linear: CpuLinear | None = None

    def pack(self) -> None:
        """To be called when the weight is loaded and stays; it is kept, and copied where a copy makes it faster."""
        if self.weight.device.type == "cpu":
            self._cpu_linear = CpuLinear(self.weight.detach(), None if self.bias is None else self.bias.detach())

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        if self._cpu_linear is None:
            return F.linear(x, self.weight, self.bias)
        return self._cpu_linear.multiply(x)


@dataclass(frozen=True)
class _Rows:
    """Of one projection: rows in the checkpoint, this rank's first row, and this rank's number of rows."""

    total: int
    first: int
    count: int


class _ColumnParallel(PackableLinear):
    """Projections of one input in one matrix product; each rank holds some rows of each projection's weight."""

    def __init__(self, in_features: int, parts: tuple[_Rows, ...], bias: bool) -> None:
        super().__init__()
        self.in_features, self._parts = in_features, parts
        rows = sum(part.count for part in parts)
        self.weight = _weight(rows, in_features)
        self.bias = _weight(rows) if bias else None

    def loaders(self, name: str, part: int = 0) -> dict[str, Loader]:
        """Loads this rank's rows of projection number `part`, which the checkpoint calls `name`."""
        loaders = {f"{name}.weight": self._loader(self.weight, part)}
        if self.bias is not None:
            loaders[f"{name}.bias"] = self._loader(self.bias, part)
        return loaders

    def _loader(self, target: nn.Parameter, part: int) -> Loader:
        rows = self._parts[part]
        offset = sum(other.count for other in self._parts[:part])

        def load(source: WeightSlice) -> None:
            whole = _checked(source, rows.total, *target.shape[1:])
            target[offset : offset + rows.count].copy_(whole[(slice(rows.first, rows.first + rows.count),)])

        return load


class MergedColumnParallelLinear(_ColumnParallel):
    """Several column-parallel projections of one input, in one matrix product. Outputs stay cut."""

    def __init__(
        self, in_features: int, out_features: tuple[int, ...], group: TensorParallelGroup, bias: bool = False
    ) -> None:
        shares = [group.share(out, "output features") for out in out_features]
        parts = (_Rows(out, group.rank * share, share) for out, share in zip(out_features, shares, strict=True))
        super().__init__(in_features, tuple(parts), bias)

    def forward(self, x_TE: torch.Tensor) -> torch.Tensor:
        return self.multiply(x_TE)


class ColumnParallelLinear(MergedColumnParallelLinear):
    """One projection, cut by output features. The output stays cut."""

    def __init__(self, in_features: int, out_features: int, group: TensorParallelGroup, bias: bool = False) -> None:
        super().__init__(in_features, (out_features,), group, bias)


class QKVParallelLinear(_ColumnParallel):
    """Query, key and value projections in one product, cut by heads.

    With more ranks than KV heads, neighbouring ranks hold copies of one KV head.
    """

    def __init__(
        self,
        in_features: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        group: TensorParallelGroup,
        bias: bool = False,
    ) -> None:
        own_heads = group.share(num_heads, "query heads")
        if num_kv_heads % group.size and group.size % num_kv_heads:
            raise ShardingError(f"{num_kv_heads} KV heads can't be shared by {group.size} ranks")
        own_kv_heads = max(1, num_kv_heads // group.size)
        first_kv_head = group.rank * num_kv_heads // group.size
        q = _Rows(num_heads * head_dim, group.rank * own_heads * head_dim, own_heads * head_dim)
        kv = _Rows(num_kv_heads * head_dim, first_kv_head * head_dim, own_kv_heads * head_dim)
        super().__init__(in_features, (q, kv, kv), bias)
        self.num_heads, self.num_kv_heads, self.head_dim = own_heads, own_kv_heads, head_dim

    def forward(self, x_TE: torch.Tensor) -> torch.Tensor:
        """q, k and v heads side by side: [T, num_heads + 2 * num_kv_heads, head_dim]."""
        return self.multiply(x_TE).view(x_TE.shape[0], -1, self.head_dim)


class RowParallelLinear(PackableLinear):
    """A projection cut by input features, after a column-parallel one; the ranks' results are summed."""

    def __init__(self, in_features: int, out_features: int, group: TensorParallelGroup, bias: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features, self.group = in_features, out_features, group
        self.weight = _weight(out_features, group.share(in_features, "input features"))
        self._has_bias = bias
        # The results are summed, so only one rank may add the bias.
        self.bias = _weight(out_features) if bias and group.rank == 0 else None

    def loaders(self, name: str) -> dict[str, Loader]:
        """Loads this rank's columns of the projection that the checkpoint calls `name`."""
        share = self.weight.shape[1]
        first = self.group.rank * share

        def load(source: WeightSlice) -> None:
            columns = _checked(source, self.out_features, self.in_features)
            self.weight.copy_(columns[:, first : first + share])

        loaders: dict[str, Loader] = {f"{name}.weight": load}
        if self._has_bias:
            loaders[f"{name}.bias"] = replicated_loader(self.bias) if self.bias is not None else _not_here
        return loaders

    def forward(self, x_TF: torch.Tensor) -> torch.Tensor:
        return self.group.all_reduce(self.multiply(x_TF))


def _not_here(source: WeightSlice) -> None:
    """Of a weight that only another rank holds."""


class VocabParallelEmbedding(nn.Module):
    """Token embeddings cut by vocabulary; the last rank's rows are padded to an equal number."""

    def __init__(self, vocab_size: int, hidden_size: int, group: TensorParallelGroup) -> None:
        super().__init__()
        self.vocab_size, self.hidden_size, self.group = vocab_size, hidden_size, group
        rows = -(-vocab_size // group.size)
        self.first = min(group.rank * rows, vocab_size)
        self.end = min(self.first + rows, vocab_size)
        self.weight = _weight(rows, hidden_size)

    def loader(self) -> Loader:
        def load(source: WeightSlice) -> None:
            rows = _checked(source, self.vocab_size, self.hidden_size)
            self.weight[self.end - self.first :].zero_()
            self.weight[: self.end - self.first].copy_(rows[self.first : self.end, :])

        return load

    def forward(self, token_ids_T: torch.Tensor) -> torch.Tensor:
        if self.group.size == 1:
            return F.embedding(token_ids_T, self.weight)
        elsewhere_T = (token_ids_T < self.first) | (token_ids_T >= self.end)
        local_ids_T = (token_ids_T - self.first).masked_fill(elsewhere_T, 0)
        x_TE = F.embedding(local_ids_T, self.weight).masked_fill(elsewhere_T[:, None], 0)
        return self.group.all_reduce(x_TE)


class ParallelLMHead(VocabParallelEmbedding, PackableLinear):
    """From hidden states to the logits of the whole vocabulary, on every rank."""

    def tie(self, embedding: VocabParallelEmbedding) -> None:
        self.weight = embedding.weight

    def forward(self, x_BE: torch.Tensor) -> torch.Tensor:
        return self.group.all_gather(self.multiply(x_BE))[:, : self.vocab_size]
