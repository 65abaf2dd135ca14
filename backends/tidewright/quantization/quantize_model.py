"""Makes a quantized copy of a model folder, a layer at a time: each is a file of its own, complete or not there.

What an interrupted run has finished, the next one takes as it is.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from tidewright.layers.weights import WeightSlice
from tidewright.quantization.affine import AffineSource, AffineWeight, QuantizationError, Scheme, joined, quantize_rtn
from tidewright.quantization.calibration import CalibrationRun
from tidewright.quantization.checkpoint import INDEX_FILE, Source, open_checkpoint
from tidewright.quantization.compressed_tensors import compressed_tensors_weights
from tidewright.quantization.compressed_tensors_writer import quantization_config, scale_dtype, stored_tensors
from tidewright.quantization.gptq_solver import InputProducts, quantize_gptq
from tidewright.quantization.methods import quantization_of

_LAYER = re.compile(r"(?:model\.)?layers\.(\d+)\.")
_EMBEDDING, _HEAD = "model.embed_tokens", "lm_head"
_CHUNK = 1 << 19  # weights that are rounded at once: rounding takes several times their memory


@dataclass(frozen=True)
class Recipe:
    scheme: Scheme
    head: Scheme | None
    """Of embedding and head; None leaves them as they are."""
    calibration: tuple[int, ...] = ()
    """A text's token ids: layers are quantized by GPTQ. Without, by rounding to nearest."""


class QuantizationRun:
    def __init__(self, folder: Path, target: Path, recipe: Recipe) -> None:
        """From `folder` into `target`, which may hold what an earlier run with the same recipe has finished."""
        self._folder, self._target, self._recipe = folder, target, recipe
        self._config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        bf16 = str(self._config.get("dtype") or self._config.get("torch_dtype")) == "bfloat16"
        self._dtype = torch.bfloat16 if bf16 else torch.float32

    @torch.inference_mode()
    def run(self, on_progress: Callable[[int, int], None]) -> None:
        """`on_progress` hears how many weights are done, and of how many.

        Raises:
            QuantizationError: the model is quantized already, or can't be by this scheme.
            CheckpointError, ModelConfigError: it is not readable.
        """
        with open_checkpoint(self._folder) as weights:
            self.check(weights)
            units, run = _units(list(weights)), None
            total, done = sum(_count(source) for source in weights.values()), 0
            for number, names in enumerate(units):
                file = self._target / f"model-{number + 1:05}-of-{len(units):05}.safetensors"
                layer = _LAYER.match(names[0])
                if self._recipe.calibration and layer and run is None:
                    run = CalibrationRun(self._folder, list(self._recipe.calibration), _whole_names(weights))
                if not file.is_file():
                    inputs = run.inputs(int(layer[1]), _whole_names(weights)) if run and layer else {}
                    _save(self._quantized(names, weights, inputs), file)
                if run and layer:
                    with _opened(file, self.quantization_config) as quantized:
                        run.pass_layer(int(layer[1]), _whole_names(quantized))
                done += sum(_count(weights[name]) for name in names)
                on_progress(done, total)
            self._finish()

    def bytes_needed(self) -> int:
        """That the weights take once they are written. Raises as `run`."""
        with open_checkpoint(self._folder) as weights:
            self.check(weights)
            return sum(self._stored_bytes(name, source) for name, source in weights.items())

    def _stored_bytes(self, name: str, source: Source) -> int:
        scheme = self._scheme_of(name, source)
        if scheme is None:
            assert not isinstance(source, AffineSource)
            first = source[tuple(slice(0, 1) for _ in source.get_shape())]
            return _count(source) * first.element_size()
        rows, columns = source.get_shape()
        groups = rows * (-(-columns // scheme.group_size) if scheme.group_size else 1)
        of_group = scale_dtype(scheme, self._dtype).itemsize + (0 if scheme.symmetric else scheme.weight_bits / 8)
        return math.ceil(rows * columns * scheme.weight_bits / 8 + groups * of_group)

    def check(self, weights: Mapping[str, Source]) -> None:
        """Raises QuantizationError: the model is quantized already, or can't be by this scheme."""
        found = quantization_of(self._config)
        if found or any(isinstance(source, AffineSource) for source in weights.values()):
            how = found["quant_method"] if found else "a GGUF file"
            raise QuantizationError(f"the model is quantized already ({how}); take the model that it was made from")
        if misfits := sorted({name for name, scheme in self._schemes(weights) if not _fits(weights[name], scheme)}):
            widths = {weights[name].get_shape()[1] for name in misfits}
            sizes = [size for size in (32, 64, 128) if all(width % size == 0 for width in widths)]
            instead = ", ".join(f"int4-g{size}" for size in sizes) or "int8"
            raise QuantizationError(
                f"groups of {self._recipe.scheme.group_size} don't divide the inputs of {misfits[0]} "
                f"({weights[misfits[0]].get_shape()[1]}); take {instead}"
            )

    def _schemes(self, weights: Mapping[str, Source]) -> Iterator[tuple[str, Scheme]]:
        for name, source in weights.items():
            if (scheme := self._scheme_of(name, source)) is not None:
                yield name, scheme

    def _scheme_of(self, name: str, source: Source) -> Scheme | None:
        if len(source.get_shape()) != 2 or not name.endswith(".weight"):
            return None
        return self._recipe.scheme if _LAYER.match(name) else self._recipe.head

    @property
    def quantization_config(self) -> dict:
        # A tied head is the embedding; the name is for readers that make a layer of it first.
        tied = bool(self._config.get("tie_word_embeddings"))
        head = self._recipe.head
        plain = [_HEAD] if head is None or tied else []
        return quantization_config(self._recipe.scheme, head, plain)

    def _quantized(
        self, names: list[str], weights: Mapping[str, Source], inputs: Mapping[str, InputProducts]
    ) -> dict[str, torch.Tensor]:
        tensors: dict[str, torch.Tensor] = {}
        for name in names:
            source, layer = weights[name], name.removesuffix(".weight")
            assert not isinstance(source, AffineSource)
            scheme = self._scheme_of(name, source)
            if scheme is None:
                tensors[name] = source[tuple(slice(None) for _ in source.get_shape())].clone()
                continue
            rows, columns = source.get_shape()
            try:
                if (products := inputs.get(_whole(layer))) is not None:
                    weight = quantize_gptq(source[0:rows, 0:columns], products, scheme)
                else:
                    weight = _rounded(source, scheme)
            except QuantizationError as error:
                raise QuantizationError(f"{name}: {error}") from None
            tensors |= stored_tensors(layer, weight, scheme, scale_dtype(scheme, self._dtype))
        return tensors

    def _finish(self) -> None:
        places: dict[str, str] = {}
        size = 0
        for file in sorted(self._target.glob("model-*.safetensors")):
            with safe_open(file, framework="pt") as opened:
                places |= dict.fromkeys(opened.keys(), file.name)
            size += file.stat().st_size
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
        (self._target / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        config = {**self._config, "quantization_config": self.quantization_config}
        (self._target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _whole(name: str) -> str:
    """A model saved without its head, as embedding models are, has names without the prefix."""
    return name if name.startswith(("model.", f"{_HEAD}.")) else f"model.{name}"


def _whole_names(weights: Mapping[str, Source]) -> dict[str, Source]:
    return {_whole(name): source for name, source in weights.items()}


def _rounded(source: WeightSlice, scheme: Scheme) -> AffineWeight:
    """Rounded to nearest, some rows at a time, as if at once."""
    rows, columns = source.get_shape()
    step = max(_CHUNK // columns, 1)
    return joined(
        [quantize_rtn(source[first : min(first + step, rows), 0:columns], scheme) for first in range(0, rows, step)]
    )


def _units(names: list[str]) -> list[list[str]]:
    """Weights by decoder layer, in order, then the others."""
    layers: dict[int, list[str]] = {}
    others = []
    for name in names:
        if found := _LAYER.match(name):
            layers.setdefault(int(found[1]), []).append(name)
        else:
            others.append(name)
    return [layers[number] for number in sorted(layers)] + ([others] if others else [])


def _fits(source: Source, scheme: Scheme) -> bool:
    return not scheme.group_size or source.get_shape()[1] % scheme.group_size == 0


def _count(source: Source) -> int:
    count = 1
    for size in source.get_shape():
        count *= size
    return count


def _save(tensors: dict[str, torch.Tensor], file: Path) -> None:
    partial = file.with_suffix(".partial")
    try:
        save_file(tensors, partial, metadata={"format": "pt"})
    except SafetensorError as error:  # which hides what the system said
        for code in (errno.ENOSPC, errno.EDQUOT):
            if f"os error {code})" in str(error):
                raise OSError(code, os.strerror(code), str(partial)) from error
        raise
    partial.chmod(0o644)  # the library makes files for their owner alone
    os.replace(partial, file)


@contextmanager
def _opened(file: Path, config: dict) -> Iterator[Mapping[str, Source]]:
    """The weights of one finished file."""
    with safe_open(file, framework="pt") as opened:
        tensors = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
        quantized = {f"{name}.weight": weight for name, weight in compressed_tensors_weights(tensors, config).items()}
        yield {**tensors, **quantized}
