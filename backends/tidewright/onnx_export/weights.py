"""Writes a graph and its weights: always in a file beside it, because a graph of more than 2 GiB can't be read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper
from onnx.external_data_helper import set_external_data

from tidewright.onnx_export.int8 import codes_name, quantize, scales_name

_ALIGNMENT = 4096  # of a tensor in the file: a page, so that it can be mapped

Progress = Callable[[int, int], None]


def model_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by the names that the graph uses. A rotation's tables repeat: half of each is enough."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, table in tensors.items():
        if name.startswith("rotaries."):
            half = table.shape[1] // 2
            # The second half of the sines is the one without the minus.
            tensors[name] = table[:, half:]
    return tensors


def write_model(
    graph: onnx.ModelProto, tensors: Mapping[str, torch.Tensor], file: Path, progress: Progress
) -> tuple[Path, Path]:
    """Writes `file`, and the weights into another beside it; returns both. Ends with onnx's own check of them."""
    used = {name for node in graph.graph.node for name in node.input}
    data = file.with_name(f"{file.name}.data")
    with data.open("wb") as stream:
        for done, (name, tensor) in enumerate(tensors.items()):
            for part, array in _arrays(name, tensor, used):
                graph.graph.initializer.append(_append(stream, part, array, data.name))
            progress(done + 1, len(tensors))
    onnx.save(graph, file)
    onnx.checker.check_model(str(file))
    return file, data


def bytes_needed(tensors: Mapping[str, torch.Tensor], graph: onnx.ModelProto) -> int:
    """An upper bound of what `write_model` puts on the disk."""
    used = {name for node in graph.graph.node for name in node.input}
    size = sum(tensor.numel() * (4 if name in used else 1.25) for name, tensor in tensors.items())
    return int(size) + len(tensors) * 2 * _ALIGNMENT


def _arrays(name: str, tensor: torch.Tensor, used: set[str]) -> Iterator[tuple[str, np.ndarray]]:
    array = tensor.detach().numpy()
    if name in used:
        yield name, array
    if codes_name(name) in used:
        codes, scales = quantize(array)
        yield codes_name(name), codes
        yield scales_name(name), scales


def _append(stream: BinaryIO, name: str, array: np.ndarray, location: str) -> TensorProto:
    stream.write(bytes(-stream.tell() % _ALIGNMENT))
    offset = stream.tell()
    stream.write(np.ascontiguousarray(array).data)
    kind = helper.np_dtype_to_tensor_dtype(array.dtype)
    proto = TensorProto(name=name, data_type=kind, dims=array.shape, raw_data=b"-")  # what has raw data may be external
    set_external_data(proto, location, offset, array.nbytes)
    proto.ClearField("raw_data")
    return proto
