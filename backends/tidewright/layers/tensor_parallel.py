"""Layers that are cut over tensor-parallel ranks. Each layer cuts and loads its own part of a checkpoint.

With one rank they are plain layers. Which checkpoint name belongs to which layer, the model files say.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn

from tidewright.devices.cpu.kernels import PackedWeight
from tidewright.devices.cpu.linear import CpuLinear
from tidewright.distributed.group import TensorParallelGroup
from tidewright.distributed.sharding import Cut, vocabulary_rows


class WeightShapeError(ValueError):
    """A checkpoint's weight has another shape than config.json announces."""


class WeightSlice(Protocol):
    """A tensor that is still on disk, as safetensors' `get_slice` gives it: an index reads only that part."""

    def get_shape(self) -> list[int]: ...
    def __getitem__(self, index: tuple[slice, ...]) -> torch.Tensor: ...


Loader = Callable[[WeightSlice], None]


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
        """To be called when the weight is loaded and stays: where our kernels multiply by it, they take it away."""
        if self.weight.device.type != "cpu":
            return
        self._cpu_linear = CpuLinear(self.weight.detach(), None if self.bias is None else self.bias.detach())
        if self.packed:
            self.weight.data = self.weight.data.new_empty(0)

    @property
    def packed(self) -> PackedWeight | None:
        return self._cpu_linear.packed if self._cpu_linear else None

    def weight_rows(self, ids_T: torch.Tensor) -> torch.Tensor:
        """As an embedding reads them."""
        if self._cpu_linear is None:
            return F.embedding(ids_T, self.weight)
        return self._cpu_linear.weight_rows(ids_T)

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        if self._cpu_linear is None:
            return F.linear(x, self.weight, self.bias)
        return self._cpu_linear.multiply(x)


class _ColumnParallel(PackableLinear):
    """Projections of one input in one matrix product; each rank holds some rows of each projection's weight."""

    def __init__(self, in_features: int, parts: tuple[Cut, ...], bias: bool) -> None:
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
        super().__init__(in_features, tuple(group.cut(out) for out in out_features), bias)

    def forward(self, x_TE: torch.Tensor) -> torch.Tensor:
        return self.multiply(x_TE)


class ColumnParallelLinear(MergedColumnParallelLinear):
    """One projection, cut by output features. The output stays cut."""

    def __init__(self, in_features: int, out_features: int, group: TensorParallelGroup, bias: bool = False) -> None:
        super().__init__(in_features, (out_features,), group, bias)


class QKVParallelLinear(_ColumnParallel):
    """Query, key and value projections in one product, cut by heads as `TensorParallelGroup.cut_heads` says."""

    def __init__(
        self,
        in_features: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        group: TensorParallelGroup,
        bias: bool = False,
    ) -> None:
        heads, kv_heads = group.cut_heads(num_heads, num_kv_heads)
        kv = kv_heads.of(head_dim)
        super().__init__(in_features, (heads.of(head_dim), kv, kv), bias)
        self.num_heads, self.num_kv_heads, self.head_dim = heads.count, kv_heads.count, head_dim

    def forward(self, x_TE: torch.Tensor) -> torch.Tensor:
        """q, k and v heads side by side: [T, num_heads + 2 * num_kv_heads, head_dim]."""
        return self.multiply(x_TE).view(x_TE.shape[0], -1, self.head_dim)


class RowParallelLinear(PackableLinear):
    """A projection cut by input features, after a column-parallel one; the ranks' results are summed.

    `columns` are this rank's input features: those that the projection before it puts out here.
    """

    def __init__(self, columns: Cut, out_features: int, group: TensorParallelGroup, bias: bool = False) -> None:
        super().__init__()
        self.columns, self.out_features, self.group = columns, out_features, group
        self.weight = _weight(out_features, columns.count)
        self._has_bias = bias
        # The results are summed, so only one rank may add the bias.
        self.bias = _weight(out_features) if bias and group.rank == 0 else None

    def loaders(self, name: str) -> dict[str, Loader]:
        """Loads this rank's columns of the projection that the checkpoint calls `name`."""
        first, end = self.columns.first, self.columns.first + self.columns.count

        def load(source: WeightSlice) -> None:
            whole = _checked(source, self.out_features, self.columns.total)
            self.weight.copy_(whole[:, first:end])

        loaders: dict[str, Loader] = {f"{name}.weight": load}
        if self._has_bias:
            loaders[f"{name}.bias"] = replicated_loader(self.bias) if self.bias is not None else _not_here
        return loaders

    def forward(self, x_TF: torch.Tensor) -> torch.Tensor:
        return self.group.all_reduce(self.multiply(x_TF))


def _not_here(source: WeightSlice) -> None:
    """Of a weight that only another rank holds."""


class VocabParallelEmbedding(nn.Module):
    """Token embeddings cut by vocabulary; all ranks' rows are padded to one number, which suits the kernels."""

    def __init__(self, vocab_size: int, hidden_size: int, group: TensorParallelGroup) -> None:
        super().__init__()
        self.vocab_size, self.hidden_size, self.group = vocab_size, hidden_size, group
        rows = vocabulary_rows(vocab_size, group.size)
        self.first = min(group.rank * rows, vocab_size)
        self.end = min(self.first + rows, vocab_size)
        self.weight = _weight(rows, hidden_size)
        self._read: Callable[[torch.Tensor], torch.Tensor] = lambda ids_T: F.embedding(ids_T, self.weight)

    def loader(self) -> Loader:
        def load(source: WeightSlice) -> None:
            rows = _checked(source, self.vocab_size, self.hidden_size)
            self.weight[self.end - self.first :].zero_()
            self.weight[: self.end - self.first].copy_(rows[self.first : self.end, :])

        return load

    def forward(self, token_ids_T: torch.Tensor) -> torch.Tensor:
        if self.group.size == 1:
            return self._read(token_ids_T)
        elsewhere_T = (token_ids_T < self.first) | (token_ids_T >= self.end)
        local_ids_T = (token_ids_T - self.first).masked_fill(elsewhere_T, 0)
        x_TE = self._read(local_ids_T).masked_fill(elsewhere_T[:, None], 0)
        return self.group.all_reduce(x_TE)


class ParallelLMHead(VocabParallelEmbedding, PackableLinear):
    """From hidden states to the logits of the whole vocabulary, on rank 0; the others get None."""

    def tie(self, embedding: VocabParallelEmbedding) -> None:
        self.weight = embedding.weight
        embedding._read = self.weight_rows  # packed or not

    def forward(self, x_BE: torch.Tensor) -> torch.Tensor | None:  # type: ignore[override]
        logits_BV = self.group.gather(self.multiply(x_BE))
        return None if logits_BV is None else logits_BV[:, : self.vocab_size]
