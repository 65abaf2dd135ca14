"""Tensors that write ONNX nodes instead of computing: the model classes run over them once, and the graph is there.

They know what the classes in models/ call, no more. What is new there is named by an error, and translated here.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import helper, numpy_helper

from tidewright.onnx_export.int8 import BLOCK, DOMAIN, blocks, codes_name, scales_name

ROWS = 0
"""The size of a first dimension that is known only when the graph runs; to ONNX's Reshape it means "as it was"."""


class UntranslatableError(NotImplementedError):
    """A model calls a function of torch that has no translation into ONNX yet."""


@dataclass
class Graph:
    """Nodes in the order of the calls. Weights stand in them by name only, so none has to be in memory."""

    names: dict[int, str]
    """The weight's name by the `id` of its tensor; what modules share is one weight here, too."""
    int8: bool
    """Matrix products and the embedding take weights of 8 bits (int8.py)."""
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[str, onnx.TensorProto] = field(default_factory=dict)

    def call(self, operator: str, *inputs: Operand, outputs: int = 1, domain: str = "", **attributes: Any) -> list[str]:
        """Adds a node and returns the names of its outputs."""
        names = [f"{operator}_{len(self.nodes)}" + (f"_{i}" if outputs > 1 else "") for i in range(outputs)]
        self.nodes.append(
            helper.make_node(operator, [self._name(x) for x in inputs], names, domain=domain, **attributes)
        )
        return names

    def one(self, operator: str, *inputs: Operand, **attributes: Any) -> str:
        """A node with one output."""
        return self.call(operator, *inputs, **attributes)[0]

    def weight(self, tensor: torch.Tensor) -> str:
        return self.names[id(tensor)]

    def _name(self, operand: Operand) -> str:
        if isinstance(operand, str):
            return operand
        if isinstance(operand, Symbol):
            return operand.name
        if isinstance(operand, torch.Tensor):
            return self.weight(operand)
        array = np.asarray(operand)
        name = "_".join(["constant", str(array.dtype), *map(str, array.shape), *map(str, array.flat)])
        self.constants.setdefault(name, numpy_helper.from_array(array, name))
        return name


class Symbol:
    """A float32 tensor of the graph (or the row of token ids). Only its first dimension may be unknown: `ROWS`."""

    dtype = torch.float32
    is_cpu = False  # what the C++ kernels ask for: they take addresses, which there are none of

    def __init__(self, graph: Graph, name: str, shape: Sequence[int]) -> None:
        self.graph, self.name, self.shape = graph, name, tuple(shape)

    def __len__(self) -> int:
        """Too many for what only few rows may take: the graph has to do for any number of them."""
        return sys.maxsize

    def __add__(self, other: Symbol) -> Symbol:
        return self.then("Add", other)

    def __mul__(self, other: Symbol | float) -> Symbol:
        return self.then("Mul", _operand(other))

    __rmul__ = __mul__

    def __truediv__(self, other: float) -> Symbol:
        return self.then("Div", _operand(other))

    def __getitem__(self, index: tuple[slice, slice]) -> Symbol:
        """The first columns of each row: the head cuts off its vocabulary's padding."""
        rows, columns = index
        if rows != slice(None) or columns != slice(None, columns.stop):
            raise UntranslatableError(f"a slice {index} has no translation into ONNX")
        size = min(columns.stop, self.shape[1])
        if size == self.shape[1]:
            return self
        ends = (np.array([0]), np.array([size]), np.array([1]))
        return self.then("Slice", *ends, shape=(self.shape[0], size))

    def view(self, *shape: int) -> Symbol:
        known = math.prod(size for size in shape if size > 0)
        missing = math.prod(self.shape[1:]) // known
        return self.then("Reshape", np.array(shape), shape=[missing if size == -1 else size for size in shape])

    def flatten(self, first: int) -> Symbol:
        return self.view(*self.shape[:first], -1)

    def chunk(self, count: int, dim: int) -> list[Symbol]:
        return self.split([self.shape[dim] // count] * count, dim)

    def tensor_split(self, places: tuple[int, ...], dim: int) -> list[Symbol]:
        return self.split(np.diff([0, *places, self.shape[dim]]).tolist(), dim)

    def split(self, sizes: list[int], dim: int) -> list[Symbol]:
        axis = dim % len(self.shape)
        names = self.graph.call("Split", self, np.array(sizes), outputs=len(sizes), axis=axis)
        shapes = [(*self.shape[:axis], size, *self.shape[axis + 1 :]) for size in sizes]
        return [Symbol(self.graph, name, shape) for name, shape in zip(names, shapes, strict=True)]

    def then(self, operator: str, *others: Operand, shape: Sequence[int] | None = None, **attributes: Any) -> Symbol:
        """The result of a node that takes this first; of the same shape, unless told."""
        name = self.graph.one(operator, self, *others, **attributes)
        return Symbol(self.graph, name, self.shape if shape is None else shape)

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: object, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Symbol:
        if function not in _TRANSLATIONS:
            raise UntranslatableError(f"torch's {function.__name__} has no translation into ONNX")
        return _TRANSLATIONS[function](*args, **(kwargs or {}))


Operand = Symbol | torch.Tensor | np.ndarray | np.generic | str


def _operand(value: Symbol | float) -> Operand:
    return value if isinstance(value, Symbol) else np.float32(value)


def _linear(x: Symbol, weight_FE: torch.Tensor, bias_F: torch.Tensor | None = None) -> Symbol:
    features, depth = weight_FE.shape
    shape = (*x.shape[:-1], features)
    if not x.graph.int8:
        # Gemm takes the weight as torch lays it out, so that a tied head shares the embedding's.
        return x.then("Gemm", weight_FE, *([] if bias_F is None else [bias_F]), shape=shape, transB=1)
    name = x.graph.weight(weight_FE)
    sizes = {"K": depth, "N": features, "bits": 8, "block_size": BLOCK}
    # accuracy_level 4: activations become int8, too, each block of each row by itself.
    out = x.then(
        "MatMulNBits", codes_name(name), scales_name(name), shape=shape, domain=DOMAIN, accuracy_level=4, **sizes
    )
    return out if bias_F is None else out.then("Add", bias_F)


def _embedding(token_ids: Symbol, weight_VE: torch.Tensor, **unused: Any) -> Symbol:
    size, graph = weight_VE.shape[1], token_ids.graph
    shape = (*token_ids.shape, size)
    if not graph.int8:
        return Symbol(graph, graph.one("Gather", weight_VE, token_ids), shape)
    name, padded = graph.weight(weight_VE), blocks(size) * BLOCK
    codes = graph.one("Reshape", codes_name(name), np.array([0, padded]))
    axes = {"gather_axis": 0, "quantize_axis": 1, "block_size": BLOCK, "bits": 8}
    rows = graph.one("GatherBlockQuantized", codes, token_ids, scales_name(name), domain=DOMAIN, **axes)
    if padded != size:
        rows = graph.one("Slice", rows, np.array([0]), np.array([size]), np.array([-1]))
    return Symbol(graph, rows, shape)


def _rms_norm(x: Symbol, shape: Sequence[int], weight: torch.Tensor, eps: float) -> Symbol:
    return x.then("RMSNormalization", weight, axis=-1, epsilon=eps)


def _cat(parts: Sequence[Symbol], dim: int) -> Symbol:
    shape = list(parts[0].shape)
    shape[dim] = sum(part.shape[dim] for part in parts)
    return parts[0].then("Concat", *parts[1:], shape=shape, axis=dim)


_TRANSLATIONS: dict[Callable[..., Any], Callable[..., Symbol]] = {
    F.linear: _linear,
    F.embedding: _embedding,
    F.rms_norm: _rms_norm,
    F.silu: lambda x, inplace: x * x.then("Sigmoid"),
    F.gelu: lambda x, approximate: x.then("Gelu", approximate=approximate),
    torch.cat: _cat,
    torch.tanh: lambda x: x.then("Tanh"),
}
