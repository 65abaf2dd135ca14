"""The model that is exported, as the engine computes it in float32 with the reference attention."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from tidewright.attention.reference import ReferenceAttention
from tidewright.distributed.group import ALONE
from tidewright.kv_cache.storage import KVCacheShape, allocate_kv_cache
from tidewright.layers.loading import load_weights
from tidewright.layers.tensor_parallel import PackableLinear
from tidewright.models.families import read_config
from tidewright.models.folder import read_json
from tidewright.models.registry import model_class

LONGEST = 256
"""Tokens that `logits` and `greedy` can see."""
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class _Span:
    """Tokens of the one sequence that there is, which has one block to itself."""

    start: int
    count: int
    block_table: tuple[int, ...] = (0,)


class SourceModel:
    """Raises ModelConfigError or CheckpointError."""

    def __init__(self, folder: Path) -> None:
        config = read_json(folder / "config.json")
        self.architecture = model_class(config)
        self.config = read_config(config)
        longest = min(self.config.max_positions, LONGEST)
        self._attention = ReferenceAttention(longest, _CPU)
        self.decoder = self.architecture(self.config, self.config.max_positions, ALONE, self._attention).eval()
        load_weights(folder, self.decoder.loaders(), self.decoder.ignored_weights())
        sizes = (self.config.num_layers, self.config.num_kv_heads, self.config.head_dim)
        self._cache = allocate_kv_cache(KVCacheShape(*sizes, longest, torch.float32), 1, _CPU)

    def pack(self) -> None:
        """To be called when the weights are written: it computes faster then, and they can't be read any more."""
        for module in self.decoder.modules():
            if isinstance(module, PackableLinear):
                module.pack()

    @torch.inference_mode()
    def logits(self, token_ids: list[int], start: int = 0) -> torch.Tensor:
        """logits_TV after each token; those before `start` are in the cache from the call before."""
        span = _Span(start, len(token_ids))
        positions_T = torch.arange(start, start + span.count)
        metadata = self._attention.prepare([span])
        logits_TV = self.decoder.logits(self.decoder(torch.tensor(token_ids), positions_T, self._cache, metadata))
        assert logits_TV is not None  # there is one rank
        return logits_TV

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        tokens = [int(self.logits(prompt)[-1].argmax())]
        while len(tokens) < count:
            tokens.append(int(self.logits(tokens[-1:], len(prompt) + len(tokens) - 1)[-1].argmax()))
        return tokens
