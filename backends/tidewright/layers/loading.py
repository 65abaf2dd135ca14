"""Gives every weight of a model folder to the layer that it belongs to.

Peak memory is one tensor more than the model: files are memory-mapped, each layer reads only its part.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from tidewright.layers.weights import Loader
from tidewright.quantization.affine import AffineSource
from tidewright.quantization.checkpoint import CheckpointError, Source, open_checkpoint

__all__ = ["CheckpointError", "load_weights"]


@torch.inference_mode()
def load_weights(
    folder: Path, loaders: Mapping[str, Loader], ignored: frozenset[str] = frozenset(), prefer_plain: bool = True
) -> None:
    """Gives every weight in `folder` to the loader of its name; `prefer_plain` is for `open_checkpoint`.

    Raises:
        CheckpointError: files or weights are missing, unexpected (and not `ignored`), or of a wrong shape.
    """
    loaded: set[str] = set()
    with open_checkpoint(folder, prefer_plain) as weights:
        for stored, source in weights.items():
            # A model saved without its head, as embedding models are, has names without the prefix.
            name = stored if stored in loaders or stored in ignored else f"model.{stored}"
            if name in loaders:
                _load(stored, loaders[name], source)
            elif name not in ignored and not _is_filler(stored, weights):
                raise CheckpointError(f"{folder}: this architecture has no weight named {stored}")
            loaded.add(name)
    if missing := sorted(set(loaders) - loaded):
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise CheckpointError(f"{folder}: the checkpoint lacks {shown}")


def _is_filler(name: str, weights: Mapping[str, Source]) -> bool:
    """A bias of zeros: AutoGPTQ gives one to every layer that it quantizes, also where the architecture has none."""
    bias, weight = weights[name], weights.get(f"{name.removesuffix('bias')}weight")
    if not name.endswith(".bias") or not isinstance(weight, AffineSource) or isinstance(bias, AffineSource):
        return False
    return len(bias.get_shape()) == 1 and not bias[(slice(None),)].any()


def _load(name: str, loader: Loader, source: Source) -> None:
    try:
        loader(source)  # type: ignore[arg-type]  # layers of plain weights refuse what is quantized
    except ValueError as error:
        raise CheckpointError(f"weight {name}: {error}") from error
