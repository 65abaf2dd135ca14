"""How a linear layer's weight is stored, loaded and multiplied by: one class a format, whatever the layer."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import nn

from tidewright.distributed.sharding import Cut
from tidewright.layers.weights import Loader, WeightSlice, checked
from tidewright.quantization.affine import AffineSource


class LinearMethod(nn.Module, ABC):
    """One rank's part of one weight_FE, F outputs by E inputs.

    The layer says which rows and columns are its own; only the method knows what they look like, in the checkpoint and
    in memory.
    """

    @abstractmethod
    def loaders(self, name: str, rows: Cut, columns: Cut, first: int = 0, padding: int = 0) -> dict[str, Loader]:
        """By names in the checkpoint, which calls the whole weight `name`.

        Its `rows` and `columns` become the rows from `first` on; `padding` rows behind them are zero.
        """

    def finish(self) -> None:
        """To be called when everything is loaded and stays: the weight may take the layout that is fastest."""

    @abstractmethod
    def multiply(self, x_TE: torch.Tensor, bias_F: torch.Tensor | None) -> torch.Tensor:
        """x w^T + bias."""

    @abstractmethod
    def read_rows(self, ids_T: torch.Tensor) -> torch.Tensor:
        """Rows of the weight, [T, E], as an embedding reads them."""


class PlainLinear(LinearMethod):
    """In the model's own type and order."""

    def __init__(self, out_features: int, in_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features), requires_grad=False)

    def loaders(self, name: str, rows: Cut, columns: Cut, first: int = 0, padding: int = 0) -> dict[str, Loader]:
        end = first + rows.count

        def load(source: WeightSlice) -> None:
            whole = checked(source, rows.total, columns.total)
            if isinstance(source, AffineSource):  # of a quantized checkpoint
                own = source.cut(rows.slice, columns.slice).dequantized()
            else:
                own = whole[rows.slice, columns.slice]
            self.weight[first:end].copy_(own)
            self.weight[end : end + padding].zero_()

        return {f"{name}.weight": load}

    def multiply(self, x_TE: torch.Tensor, bias_F: torch.Tensor | None) -> torch.Tensor:
        return F.linear(x_TE, self.weight, bias_F)

    def read_rows(self, ids_T: torch.Tensor) -> torch.Tensor:
        return F.embedding(ids_T, self.weight)
