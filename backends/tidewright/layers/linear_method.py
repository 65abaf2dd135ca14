"""How a linear layer's weight is stored, loaded and multiplied by: one class a format, whatever the layer."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import nn

from tidewright.distributed.sharding import Cut
from tidewright.layers.weights import Loader, WeightSlice, checked
from tidewright.quantization.affine import AffineSource, AffineWeight, Scheme, quantize_rtn


class LinearMethod(nn.Module, ABC):
    """One rank's part of one weight_FE, F outputs by E inputs.

    The layer says which rows and columns are its own; only the method knows what they look like, in the checkpoint and
    in memory.
    """

    pending_bytes = 0
    """That the weight will take once it is loaded, beside parameters: about, as the checkpoint may say otherwise."""

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


def read_part(source: WeightSlice, rows: Cut, columns: Cut, scheme: Scheme | None) -> torch.Tensor | AffineWeight:
    """A rank's part, quantized as the checkpoint has it, else by `scheme`, if there is one.

    Raises WeightShapeError or QuantizationError.
    """
    whole = checked(source, rows.total, columns.total)
    if isinstance(whole, AffineSource):
        return whole.cut(rows.slice, columns.slice)
    part = whole[rows.slice, columns.slice]
    return quantize_rtn(part, scheme) if scheme else part


class PlainLinear(LinearMethod):
    """In the model's own type and order; a quantized weight is dequantized as it is loaded.

    With a `scheme` the weight becomes what quantization by it makes of it: for devices that have no kernel for it.
    """

    def __init__(self, out_features: int, in_features: int, scheme: Scheme | None = None) -> None:
        super().__init__()
        self._scheme = scheme
        self.weight = nn.Parameter(torch.empty(out_features, in_features), requires_grad=False)

    def loaders(self, name: str, rows: Cut, columns: Cut, first: int = 0, padding: int = 0) -> dict[str, Loader]:
        end = first + rows.count

        def load(source: WeightSlice) -> None:
            part = read_part(source, rows, columns, self._scheme)
            self.weight[first:end].copy_(part.dequantized() if isinstance(part, AffineWeight) else part)
            self.weight[end : end + padding].zero_()

        return {f"{name}.weight": load}

    def multiply(self, x_TE: torch.Tensor, bias_F: torch.Tensor | None) -> torch.Tensor:
        return F.linear(x_TE, self.weight, bias_F)

    def read_rows(self, ids_T: torch.Tensor) -> torch.Tensor:
        return F.embedding(ids_T, self.weight)
