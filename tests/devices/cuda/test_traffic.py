"""devices/cuda/traffic.py against arithmetic by hand, the footprint of the weights, and planning's roofline."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.gpu_roofline import MODELS, main
from tidewright.devices.cuda.traffic import Traffic, decode_step, rope_and_cache, step_seconds
from tidewright.planning import footprint
from tidewright.planning.gpus import GPUS
from tidewright.planning.plan import Engine, Load, Machine, make_plan
from tidewright.planning.roofline import estimate
from tidewright.planning.weight_formats import SCHEMES

LLAMA_8B = MODELS["8B"]
SLOW = replace(GPUS["H200"], bandwidth=1000.0, flops_16=100.0)


def test_a_kernel_is_as_slow_as_its_memory_or_its_arithmetic() -> None:
    assert Traffic("", weights=300, cache=600, activations=100, times=3).seconds(SLOW, "bfloat16") == 3
    assert Traffic("", weights=500, flops=200, times=2).seconds(SLOW, "bfloat16") == 4


def test_rotation_by_hand() -> None:
    """Two tokens, 3 heads of q and one each of k and v, 4 numbers each: 20 numbers in, and the same 20 out."""
    moved = rope_and_cache(2, 3, 1, 4, 2)
    assert moved.cache == 2 * (4 + 4) * 2
    assert moved.activations == 2 * (20 * 2 + 12 * 2 + 2 * 2 * 4 + 8 + 8)


@pytest.mark.parametrize("model", MODELS.values())
def test_a_step_reads_all_weights_once(model: footprint.DecoderConfig) -> None:
    step = decode_step(model, 1, 100)
    read = sum(kernel.weights * kernel.times for kernel in step)
    unread = 0 if model.tied_embeddings else footprint.head_values(model) * 2  # the embedding: a row of it
    assert read == footprint.weight_bytes(model, 2) - unread
    per_token = footprint.kv_block_bytes(model, 2, 16) / 16
    assert sum(kernel.cache * kernel.times for kernel in step) == 101 * per_token  # 100 read, one written


def test_quantized_weights_by_hand() -> None:
    """A weight of 4 bits in groups of 64 with offsets has 4.5 bits, one of 8 has 8, and outputs have 4 bytes each."""
    features = {"q, k and v": 6144, "output of attention": 4096, "gate and up": 28672, "down": 4096, "head": 128256}
    for name, bits in (("int8", 8), ("int4-g64", 4.5)):
        step = decode_step(LLAMA_8B, 1, 100, weights=SCHEMES[name])
        plain = decode_step(LLAMA_8B, 1, 100)
        for kernel, as_plain in zip(step, plain, strict=True):
            beside = 4 * features.get(kernel.kernel, 0)
            share = bits / 16 if beside else 1
            assert kernel.weights == as_plain.weights * share + beside
            assert replace(kernel, weights=0) == replace(as_plain, weights=0)


@pytest.mark.parametrize("rows", [1, 64])
def test_kernel_by_kernel_takes_a_little_longer_than_planning_says(rows: int) -> None:
    h200 = GPUS["H200"]
    plan = make_plan(LLAMA_8B, Load(context=4096, concurrent=rows, mean_tokens=2000), Machine(gpu=h200), Engine())
    planned = estimate(LLAMA_8B, plan, h200, Engine(), 2000, None)
    assert planned
    assert 1 < step_seconds(decode_step(LLAMA_8B, rows, 2000), h200) / planned.step_seconds < 1.05


def test_layers_with_a_window_read_no_more_than_it() -> None:
    full, windowed = LLAMA_8B.layers[0], replace(LLAMA_8B.layers[0], window=100)
    model = replace(LLAMA_8B, layers=(full, windowed, windowed, windowed))
    read = sum(k.cache * k.times for k in decode_step(model, 1, 1000) if k.kernel == "attention: decode")
    assert read == (1000 + 3 * 100) * 2 * 8 * 128 * 2


def test_filters_cost_passes_over_the_logits() -> None:
    with_filters, without = (
        sum(kernel.bytes for kernel in decode_step(LLAMA_8B, 4, 10, searches=searches)) for searches in (2, 0)
    )
    assert with_filters - without == 4 * 128256 * 4 * 16 * 2


def test_the_table_says_that_it_is_an_estimate(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--context", "500"])
    printed = capsys.readouterr().out
    assert "estimate" in printed
    assert [line.split()[:3] for line in printed.splitlines() if line.startswith(("1B", "8B"))] == [
        [model, weights, batch]
        for model in ("1B", "8B")
        for weights in ("bf16", "int8", "int4-g64")
        for batch in ("1", "16", "64", "256")
    ]
