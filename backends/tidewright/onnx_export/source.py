"""The model that is exported, as the engine computes it in float32 with the reference attention."""

from __future__ import annotations

from pathlib import Path

import torch

from tidewright.attention.reference import ReferenceAttention
from tidewright.devices.cpu.device import CpuDevice
from tidewright.distributed.group import ALONE
from tidewright.engine.plan import ScheduledSequence, StepPlan
from tidewright.kv_cache.storage import KVCache, KVCacheShape
from tidewright.layers.loading import load_weights
from tidewright.models.families import read_config
from tidewright.models.folder import read_json
from tidewright.models.registry import model_class
from tidewright.step.buffers import StepBuffers, StepLimits

LONGEST = 256
"""Tokens that `logits` and `greedy` can see."""
_CPU = torch.device("cpu")


class SourceModel:
    """Raises ModelConfigError or CheckpointError."""

    def __init__(self, folder: Path) -> None:
        config = read_json(folder / "config.json")
        self.architecture = model_class(config)
        self.config = read_config(config)
        longest = min(self.config.max_positions, LONGEST)
        self._device = CpuDevice(ReferenceAttention(longest, _CPU))
        self.decoder = self.architecture(self.config, self.config.max_positions, ALONE, self._device).eval()
        load_weights(folder, self.decoder.loaders(), self.decoder.ignored_weights())
        sizes = (self.config.num_layers, self.config.num_kv_heads, self.config.head_dim)
        self._buffers = StepBuffers(StepLimits(1, longest, longest, longest), _CPU)
        self._cache = KVCache(KVCacheShape(*sizes, longest, torch.float32), 1, self._device.memory)

    def pack(self) -> None:
        """To be called when the weights are written: it computes faster then, and they can't be read any more."""
        self._device.finish(self.decoder)

    @torch.inference_mode()
    def logits(self, token_ids: list[int], start: int = 0) -> torch.Tensor:
        """logits_TV after each token; those before `start` are in the cache from the call before."""
        # The one sequence that there is has one block to itself.
        batch = self._buffers.fill(StepPlan((ScheduledSequence(0, start, tuple(token_ids), new_blocks=(0,)),)))
        logits_TV = self.decoder.logits(self._device.forward(self.decoder, batch, self._cache))
        assert logits_TV is not None  # there is one rank
        return logits_TV

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        tokens = [int(self.logits(prompt)[-1].argmax())]
        while len(tokens) < count:
            tokens.append(int(self.logits(tokens[-1:], len(prompt) + len(tokens) - 1)[-1].argmax()))
        return tokens
