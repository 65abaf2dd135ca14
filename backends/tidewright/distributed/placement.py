"""Which device, and how much of its memory, a rank takes on its host."""

from __future__ import annotations

import msgspec
import torch

from tidewright.engine.messages import EngineConfig


def place(config: EngineConfig, local_rank: int) -> EngineConfig:
    """The configuration for one of `config.local_ranks` ranks on this host.

    GPUs are taken in order, from the one that `device` names, or the first. On a CPU the ranks divide the share of
    memory that the KV cache may take, and the cores (step_threads.py).
    """
    if config.local_ranks == 1 and config.tensor_parallel_size == 1:
        return config
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda"):
        _, _, first = device.partition(":")
        return msgspec.structs.replace(config, device=f"cuda:{int(first or 0) + local_rank}")
    memory = config.kv_cache_memory
    if memory.endswith("%"):
        memory = f"{float(memory[:-1]) / config.local_ranks:g}%"
    return msgspec.structs.replace(config, device=device, kv_cache_memory=memory)
