"""Layers that are cut over tensor-parallel ranks. Each knows its part; its `LinearMethod` knows the weight's format.

With one rank they are plain layers. Which checkpoint name belongs to which layer, the model files say.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from tidewright.devices.base import Device
from tidewright.distributed.group import TensorParallelGroup
from tidewright.distributed.sharding import Cut, vocabulary_rows
from tidewright.layers.linear_method import LinearMethod
from tidewright.layers.weights import Loader, WeightSlice, checked, not_here, replicated_loader
from tidewright.lora.layer import LoraLayer
from tidewright.step.adapters import AdapterRows


class LinearLayer(nn.Module):
    """A matrix product by this rank's part of a weight, and what LoRA adapters add to it.

    `parts`: of each projection of the input, this rank's outputs; `columns`: its inputs.
    """

    bias: nn.Parameter | None
    lora: LoraLayer | None  # None: adapters leave it as it is

    def __init__(
        self, method: LinearMethod, parts: tuple[Cut, ...], columns: Cut, bias: nn.Parameter | None = None
    ) -> None:
        super().__init__()
        self.method, self.bias, self.lora = method, bias, None
        self.parts, self.columns = parts, columns

    def multiply(self, x: torch.Tensor, adapters: AdapterRows | None = None) -> torch.Tensor:
        y = self.method.multiply(x, self.bias)
        if adapters is not None and self.lora is not None:
            self.lora.add(x, y, adapters)
        return y

    def loaders(self, name: str, part: int = 0) -> dict[str, Loader]:
        """Loads this rank's part of projection number `part`, which the checkpoint calls `name`."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Projection:
    """What a checkpoint has one weight for: a part of a layer."""

    layer: LinearLayer
    part: int = 0

    @property
    def rows(self) -> Cut:
        return self.layer.parts[self.part]

    @property
    def columns(self) -> Cut:
        return self.layer.columns

    def loaders(self, name: str) -> dict[str, Loader]:
        return self.layer.loaders(name, self.part)


def _bias(size: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(size), requires_grad=False)


class _ColumnParallel(LinearLayer):
    """Projections of one input in one matrix product; each rank holds some rows of each projection's weight."""

    def __init__(self, in_features: int, parts: tuple[Cut, ...], device: Device, bias: bool) -> None:
        rows = sum(part.count for part in parts)
        bias_F = _bias(rows) if bias else None
        super().__init__(device.linear_method(rows, in_features), parts, Cut.whole(in_features), bias_F)

    def loaders(self, name: str, part: int = 0) -> dict[str, Loader]:
        rows = self.parts[part]
        first = sum(other.count for other in self.parts[:part])
        loaders = self.method.loaders(name, rows, self.columns, first)
        if (bias := self.bias) is not None:

            def load(source: WeightSlice) -> None:
                bias[first : first + rows.count].copy_(checked(source, rows.total)[(rows.slice,)])

            loaders[f"{name}.bias"] = load
        return loaders


class MergedColumnParallelLinear(_ColumnParallel):
    """Several column-parallel projections of one input, in one matrix product. Outputs stay cut."""

    def __init__(
        self,
        in_features: int,
        out_features: tuple[int, ...],
        group: TensorParallelGroup,
        device: Device,
        bias: bool = False,
    ) -> None:
        super().__init__(in_features, tuple(group.cut(out) for out in out_features), device, bias)

    def forward(self, x_TE: torch.Tensor, adapters: AdapterRows | None = None) -> torch.Tensor:
        return self.multiply(x_TE, adapters)


class QKVParallelLinear(_ColumnParallel):
    """Query, key and value projections in one product, cut by heads as `TensorParallelGroup.cut_heads` says."""

    def __init__(
        self,
        in_features: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        group: TensorParallelGroup,
        device: Device,
        bias: bool = False,
    ) -> None:
        heads, kv_heads = group.cut_heads(num_heads, num_kv_heads)
        kv = kv_heads.of(head_dim)
        super().__init__(in_features, (heads.of(head_dim), kv, kv), device, bias)
        self.num_heads, self.num_kv_heads, self.head_dim = heads.count, kv_heads.count, head_dim

    def forward(self, x_TE: torch.Tensor, adapters: AdapterRows | None = None) -> torch.Tensor:
        """q, k and v heads side by side: [T, num_heads + 2 * num_kv_heads, head_dim]."""
        return self.multiply(x_TE, adapters).view(x_TE.shape[0], -1, self.head_dim)


class RowParallelLinear(LinearLayer):
    """A projection cut by input features, after a column-parallel one; the ranks' results are summed.

    `columns` are this rank's input features: those that the projection before it puts out here.
    """

    def __init__(
        self, columns: Cut, out_features: int, group: TensorParallelGroup, device: Device, bias: bool = False
    ) -> None:
        # The results are summed, so only one rank may add the bias.
        own_bias = _bias(out_features) if bias and group.rank == 0 else None
        outputs = (Cut.whole(out_features),)
        super().__init__(device.linear_method(out_features, columns.count), outputs, columns, own_bias)
        self.group = group
        self._has_bias = bias

    def loaders(self, name: str, part: int = 0) -> dict[str, Loader]:
        loaders = self.method.loaders(name, self.parts[part], self.columns)
        if self._has_bias:
            loaders[f"{name}.bias"] = replicated_loader(self.bias) if self.bias is not None else not_here
        return loaders

    def forward(self, x_TF: torch.Tensor, adapters: AdapterRows | None = None) -> torch.Tensor:
        return self.group.all_reduce(self.multiply(x_TF, adapters))


class VocabularyCut:
    """A rank's rows of the vocabulary; all ranks' are padded to one number, which suits the kernels."""

    def __init__(self, vocab_size: int, group: TensorParallelGroup) -> None:
        self.rows = vocabulary_rows(vocab_size, group.size)
        first = min(group.rank * self.rows, vocab_size)
        self.own = Cut(vocab_size, first, min(first + self.rows, vocab_size) - first)

    def loaders(self, method: LinearMethod, name: str, hidden_size: int) -> dict[str, Loader]:
        return method.loaders(name, self.own, Cut.whole(hidden_size), padding=self.rows - self.own.count)


class VocabParallelEmbedding(nn.Module):
    """Token embeddings cut by vocabulary. A tied one takes the method of the head."""

    def __init__(self, vocab_size: int, hidden_size: int, group: TensorParallelGroup, device: Device) -> None:
        super().__init__()
        self.cut, self.hidden_size, self.group, self._device = (
            VocabularyCut(vocab_size, group),
            hidden_size,
            group,
            device,
        )
        self.method = device.embedding_method(self.cut.rows, hidden_size)

    def untie(self) -> None:
        self.method = self._device.embedding_method(self.cut.rows, self.hidden_size)

    def loaders(self, name: str) -> dict[str, Loader]:
        return self.cut.loaders(self.method, name, self.hidden_size)

    def forward(self, token_ids_T: torch.Tensor) -> torch.Tensor:
        if self.group.size == 1:
            return self.method.read_rows(token_ids_T)
        own = self.cut.own
        elsewhere_T = (token_ids_T < own.first) | (token_ids_T >= own.first + own.count)
        local_ids_T = (token_ids_T - own.first).masked_fill(elsewhere_T, 0)
        x_TE = self.method.read_rows(local_ids_T).masked_fill(elsewhere_T[:, None], 0)
        return self.group.all_reduce(x_TE)


class ParallelLMHead(LinearLayer):
    """From hidden states to the logits of the whole vocabulary, on rank 0; the others get None."""

    def __init__(self, vocab_size: int, hidden_size: int, group: TensorParallelGroup, device: Device) -> None:
        cut = VocabularyCut(vocab_size, group)
        super().__init__(device.linear_method(cut.rows, hidden_size, is_head=True), (cut.own,), Cut.whole(hidden_size))
        self.cut, self.vocab_size, self.hidden_size, self.group = cut, vocab_size, hidden_size, group

    def loaders(self, name: str, part: int = 0) -> dict[str, Loader]:
        return self.cut.loaders(self.method, name, self.hidden_size)

    def forward(self, x_BE: torch.Tensor) -> torch.Tensor | None:
        logits_BV = self.group.gather(self.multiply(x_BE))
        return None if logits_BV is None else logits_BV[:, : self.vocab_size]
