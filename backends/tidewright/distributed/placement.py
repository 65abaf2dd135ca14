"""Which device, and how much of its memory, a rank takes on its host."""

from __future__ import annotations

import msgspec
import torch

from tidewright.devices.visible_gpus import check_visible
from tidewright.distributed.gpu_choice import gpus_of
from tidewright.engine.messages import EngineConfig
from tidewright.kv_cache.budget import AUTO_CPU, AUTO_GPU, part_of


def resolve(config: EngineConfig) -> EngineConfig:
    """On rank 0: "auto" becomes the kind that this host has. The other ranks are told, as all need the same kind."""
    if config.is_onnx or config.device != "auto":  # onnxruntime knows itself which GPUs it can use
        return config
    return msgspec.structs.replace(config, device="cuda" if torch.cuda.is_available() else "cpu")


def place(config: EngineConfig, local_rank: int) -> EngineConfig:
    """The configuration for one of `config.local_ranks` ranks on this host.

    Of the memory for KV caches, and of the budget, it gets its model's share. On a CPU the ranks divide the part of the
    free memory that the KV cache may take, and the cores (step_threads.py).

    Raises:
        DeviceError: this host lacks a GPU for one of its ranks, whichever.
        GpuChoiceError: `device` names too few, or too many.
    """
    config = resolve(config)
    ranks, is_gpu = config.local_ranks, config.device.startswith("cuda")
    memory = config.kv_cache_memory
    if (share := config.kv_cache_share) < 1:
        if config.memory_budget != "auto":  # of which an automatic KV cache is what is left
            config = msgspec.structs.replace(config, memory_budget=part_of(config.memory_budget, share))
        elif memory == "auto":
            memory = AUTO_GPU if is_gpu else AUTO_CPU
        memory = memory if memory == "auto" else part_of(memory, share)
        config = msgspec.structs.replace(config, kv_cache_memory=memory, kv_cache_share=1.0, memory_share=share)
    if is_gpu and not config.is_onnx:
        gpus = gpus_of(config.device, ranks)
        whose = f"the {ranks} ranks of this host need" if ranks > 1 else f"device {config.device!r} needs"
        check_visible(gpus, whose)
        return msgspec.structs.replace(config, device=f"cuda:{gpus[local_rank]}")
    if memory.endswith("%") and ranks > 1:
        memory = part_of(memory, 1 / ranks)
    return msgspec.structs.replace(config, kv_cache_memory=memory)


def take_place(config: EngineConfig, local_rank: int) -> EngineConfig:
    """`place`, and its GPU is this thread's current one from here on.

    To be called before anything else touches CUDA: kernels, streams, graphs and NCCL go to the current device, and each
    other one that is touched keeps a context of some hundred MiB.
    """
    placed = place(config, local_rank)
    if placed.device.startswith("cuda") and not placed.is_onnx:
        torch.cuda.set_device(placed.device)
    return placed
