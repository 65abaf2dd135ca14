"""Throughput by the roofline: what the GPU's memory and arithmetic would allow if nothing else took time.

An upper bound from data sheets, no measurement: kernels reach a part of it, and ranks, sampling and streams cost more.
"""

from __future__ import annotations

from dataclasses import dataclass

from tidewright.models.config import DecoderConfig
from tidewright.planning.footprint import head_bytes, head_values, layer_bytes, layer_values
from tidewright.planning.gpus import Gpu
from tidewright.planning.plan import Engine, Plan


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """`bound`: what a decoding step waits for. Rates are of one replica unless they say otherwise."""

    bound: str
    step_seconds: float
    tokens_per_second: float
    tokens_per_second_of_one: float
    all_tokens_per_second: float
    """Of all replicas."""
    prompt_tokens_per_second: float
    """Of short prompts: attention is left out."""
    prompt_seconds: float | None
    """Of one prompt, computed alone."""
    all_requests_per_second: float | None
    """Of all replicas; None without the lengths of prompt and output."""


def estimate(
    model: DecoderConfig, plan: Plan, gpu: Gpu, engine: Engine, mean_context: int, lengths: tuple[int, int] | None
) -> Throughput | None:
    """None if the GPU's speeds are not known. `mean_context`: tokens that a sequence has on average while it decodes.

    `lengths`: tokens of prompt and output.
    """
    flops = gpu.flops(engine.dtype)
    if gpu.bandwidth is None or flops is None:
        return None
    size = plan.replica.tensor_parallel_size
    layers = layer_values(model, size)
    matrices = layers + head_values(model, size)
    of_layers = layer_bytes(model, engine.formats, size)
    read = of_layers + head_bytes(model, engine.formats, size) + plan.running * mean_context * plan.replica.kv_per_token
    # Each query head multiplies with all keys, and weighs all values.
    attention = 4 * model.num_layers * -(-model.num_heads // size) * model.head_dim  # for a token of context
    memory = read / gpu.bandwidth
    arithmetic = plan.running * (2 * matrices + attention * mean_context) / flops
    step = max(memory, arithmetic)
    prompt_seconds = rate = None
    if lengths:
        prompt, output = lengths
        seconds = prompt * (2 * layers + attention * prompt / 2) / flops  # on average a token sees half of them
        prompt_seconds = max(seconds, of_layers / gpu.bandwidth)
        rate = plan.replicas / (seconds + output * step / plan.running)
    return Throughput(
        bound="memory bandwidth" if memory >= arithmetic else "arithmetic",
        step_seconds=step,
        tokens_per_second=plan.running / step,
        tokens_per_second_of_one=1 / step,
        all_tokens_per_second=plan.replicas * plan.running / step,
        prompt_tokens_per_second=flops / (2 * layers),
        prompt_seconds=prompt_seconds,
        all_requests_per_second=rate,
    )
