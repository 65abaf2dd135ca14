"""planning/plan.py: what it promises of any model and load, and that what its errors advise does work."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as some

from helpers.checkpoints import SIZES
from helpers.model_shapes import LLAMA_8B, LLAMA_70B
from tidewright.engine.engine import Engine as RealEngine
from tidewright.engine.messages import EngineConfig
from tidewright.kv_cache.budget import blocks_of
from tidewright.models.config import DecoderConfig
from tidewright.models.families import read_config
from tidewright.models.folder import read_json
from tidewright.planning.gpus import GPUS, Gpu, find_gpu
from tidewright.planning.plan import (
    MAX_RUNNING,
    Engine,
    Load,
    Machine,
    Plan,
    PlanError,
    Replica,
    make_plan,
    make_replica,
)

GIB = 2**30
SMALL = read_config({"architectures": ["LlamaForCausalLM"], **SIZES})


def gpu(memory: int) -> Gpu:
    return Gpu("test", memory, None, None, None, True, "none")


def load(context: int, concurrent: int = 1, mean_tokens: int = 0) -> Load:
    return Load(context=context, concurrent=concurrent, mean_tokens=mean_tokens or context)


def plan(model: DecoderConfig, gpu_name: str, wanted: Load, size: int | None = None, **machine: int) -> Plan:
    return make_plan(model, wanted, Machine(gpu=GPUS[gpu_name], **machine), Engine(), size)


def test_llama_8b_on_an_h200() -> None:
    """By hand: 8.03 billion weights of 2 bytes; 32 layers * 2 * 8 heads * 128 * 2 bytes = 128 KiB a token."""
    made = plan(LLAMA_8B, "H200", load(8192, 200))
    assert made.replica.weights == 2 * 8_030_261_248
    assert made.replica.kv_per_token == 128 * 1024
    assert made.replica.kv_per_sequence == GIB
    # 141 GB less 5 % and 1 GiB is 123.7 GiB; the weights take 15 GiB: 107 sequences of 1 GiB and their workspace fit.
    assert 105 <= made.replica.max_sequences <= 108
    assert (made.replicas, made.running, made.gpus, made.nodes) == (2, 100, 2, 1)


def test_quantized_llama_8b_on_an_h200() -> None:
    """By hand: a byte for each weight of the matrices, 4 bytes for each of their outputs; norms as they were."""
    machine, wanted = Machine(gpu=GPUS["H200"]), load(8192, 200)
    plain = make_plan(LLAMA_8B, wanted, machine, Engine()).replica
    made = make_plan(LLAMA_8B, wanted, machine, Engine(quantization="int8")).replica
    norms = (2 * 32 + 1) * 4096
    outputs = 32 * (6144 + 4096 + 28672 + 4096) + 2 * 128256
    assert made.weights == 8_030_261_248 - norms + 4 * outputs + 2 * norms
    assert made.max_sequences - plain.max_sequences in (7, 8)  # 7.5 GiB less, and a sequence takes 1 GiB
    four = make_plan(LLAMA_8B, wanted, machine, Engine(quantization="int4-g64", quantize_head="same")).replica
    assert four.weights == pytest.approx(made.weights * 4.5 / 8, rel=0.01)
    with pytest.raises(PlanError, match=r"the A10 does not multiply fp8, .*; choose int8"):
        make_plan(LLAMA_8B, wanted, Machine(gpu=GPUS["A10"]), Engine(quantization="fp8"))


def test_a_model_that_only_fits_quantized_is_told_so() -> None:
    with pytest.raises(PlanError, match=r"or --quantization int8$"):
        plan(LLAMA_8B, "A10", load(65536), 1)
    assert make_plan(LLAMA_8B, load(65536), Machine(gpu=GPUS["A10"]), Engine(quantization="int8"), 1)


def test_llama_70b_needs_several_gpus() -> None:
    made = plan(LLAMA_70B, "H100", load(8192, 30))
    assert made.replica.tensor_parallel_size in (2, 4, 8)
    assert made.replica.tensor_parallel_size * GPUS["H100"].memory > 2 * 70e9
    with pytest.raises(PlanError, match="does not fit: at tensor-parallel size 1"):
        plan(LLAMA_70B, "H100", load(8192), 1)


def test_a_replica_over_several_hosts_takes_them_whole() -> None:
    made = plan(LLAMA_70B, "L4", load(2048, 4), gpus_per_node=4)
    assert made.replica.tensor_parallel_size == 8
    assert (made.nodes_per_replica, made.nodes) == (2, 2 * made.replicas)


def test_ranks_stay_on_one_host_if_that_will_do() -> None:
    """Eight ranks on two hosts would hold all in one replica, with fewer GPUs."""
    wanted = load(32768, 40)
    near, far = (plan(LLAMA_70B, "H100", wanted, size, gpus_per_node=4) for size in (None, 8))
    assert near.replica.tensor_parallel_size == 4
    assert (far.gpus, far.nodes_per_replica) == (8, 2)
    assert near.gpus > far.gpus


def test_shorter_sequences_need_fewer_gpus() -> None:
    long, short = (plan(LLAMA_8B, "H100", load(8192, 500, mean), 1) for mean in (8192, 1024))
    assert short.gpus < long.gpus
    assert short.replica.max_longest == long.replica.max_longest > 0


layers = some.integers(1, 6)
models = some.builds(
    lambda count, kv, group, dim, hidden, features, vocab, tied: replace(
        SMALL,
        layers=SMALL.layers[:1] * count,
        num_kv_heads=kv,
        num_heads=kv * group,
        head_dim=dim,
        hidden_size=hidden,
        intermediate_size=features,
        vocab_size=vocab,
        tied_embeddings=tied,
        max_positions=1 << 20,
    ),
    layers,
    some.integers(1, 9),
    some.integers(1, 6),
    some.sampled_from([8, 64, 128, 256]),
    some.integers(8, 4096),
    some.integers(8, 9000),
    some.integers(100, 200_000),
    some.booleans(),
)
contexts = some.integers(1, 100_000)
memories = some.integers(GIB + GIB // 16, 64 * GIB)


@given(models, contexts, some.floats(0, 1), some.integers(1, 20_000), memories, some.integers(1, 16), some.booleans())
def test_what_is_planned_has_room(
    model: DecoderConfig, context: int, share: float, concurrent: int, memory: int, per_node: int, wide: bool
) -> None:
    wanted = load(context, concurrent, max(1, int(share * context)))
    engine = Engine(dtype="float32" if wide else "bfloat16")
    machine = Machine(gpu=gpu(memory), gpus_per_node=per_node)
    try:
        made = make_plan(model, wanted, machine, engine)
    except PlanError as error:
        check_advice(str(error), model, wanted, machine, engine)
        return
    replica = made.replica
    assert made.replicas * made.running >= concurrent
    assert made.running <= min(replica.max_sequences, MAX_RUNNING)
    # The pool has the blocks of all, and of one of the longest.
    size = engine.block_size
    assert made.kv_blocks >= made.running * blocks_of(wanted.mean_tokens, size)
    assert made.kv_blocks >= blocks_of(context, size)
    workspace = made.running * (replica.rows_per_sequence + replica.gathered_per_sequence)
    assert replica.fixed + workspace + made.kv_cache <= replica.usable
    assert made.nodes * per_node >= made.gpus
    # No other size that is compared takes fewer.
    for other in made.fitting:
        assert made.gpus <= _gpus(other, wanted)


def _gpus(replica: Replica, wanted: Load) -> int:
    return -(-wanted.concurrent // min(replica.max_sequences, MAX_RUNNING)) * replica.tensor_parallel_size


def check_advice(said: str, model: DecoderConfig, wanted: Load, machine: Machine, engine: Engine) -> None:
    ways = 0
    if found := re.search(r"GPUs with at least ([\d.]+) GiB", said):
        enough = replace(machine, gpu=gpu(int(float(found[1]) * GIB) + 1))
        assert make_plan(model, wanted, enough, engine).replica.max_longest
        ways += 1
    if found := re.search(r"a context of (\d+)", said):
        make_plan(model, load(int(found[1]), wanted.concurrent), machine, engine)
        ways += 1
    assert ways, said


def test_advice_of_another_size_works() -> None:
    with pytest.raises(PlanError, match=r"What would do: tensor-parallel size (\d+),") as caught:
        plan(LLAMA_70B, "H100", load(8192), 1)
    found = re.search(r"tensor-parallel size (\d+),", str(caught.value).partition("do: ")[2])
    assert found
    assert plan(LLAMA_70B, "H100", load(8192), int(found[1]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"context": 200_000}, "the context is 200000, but the model's limit is 131072 tokens"),
        ({"context": 100, "mean_tokens": 101}, "take 101 tokens, which is more than the context of 100"),
        ({"context": 100, "size": 12}, r"size 12 does not work .* these do: 1, 2, 3, 4, 5, 6, 7, 8, 16, 32"),
        ({"context": 100, "size": 32, "gpus_per_node": 5}, "32 ranks can't be shared equally by hosts with 5 GPUs"),
        ({"context": 100, "gpu": "T4"}, "the T4 does not compute in bfloat16; choose float16"),
    ],
)
def test_what_can_not_be_planned(arguments: dict[str, int], message: str) -> None:
    words = {"gpu": "H100", "size": None, "mean_tokens": 0, "gpus_per_node": 8, **arguments}
    wanted = load(words["context"], 1, words["mean_tokens"])
    with pytest.raises(PlanError, match=message):
        plan(LLAMA_8B, words["gpu"], wanted, words["size"], gpus_per_node=words["gpus_per_node"])


def test_a_real_engine_takes_the_plan(model_dir: Path) -> None:
    """It has as many blocks as the plan said, and takes sequences of the whole context."""
    model = read_config(read_json(model_dir / "config.json"))
    wanted, small = load(1024, 8), Machine(gpu=gpu(int(2.2 * GIB)))
    made = make_plan(model, wanted, small, Engine())
    engine = RealEngine(
        EngineConfig(
            model_dir=str(model_dir),
            device="cpu",
            kv_cache_memory=f"{made.kv_cache // 2**20}MiB",
            max_model_len=wanted.context,
            max_running=made.running,
        )
    )
    assert engine.runner.num_blocks == made.kv_blocks
    assert engine.runner.max_model_len == wanted.context


def test_gpus_are_found_by_any_spelling() -> None:
    assert find_gpu("h200") is find_gpu("NVIDIA H200") is GPUS["H200"]
    assert find_gpu("a100-80gb") is GPUS["A100-80GB"]
    assert find_gpu("H300") is None


def test_more_ranks_hold_less_each() -> None:
    machine = Machine(gpu=GPUS["H100"])
    ones = [make_replica(LLAMA_70B, load(4096), machine, Engine(), size) for size in (1, 2, 4, 8)]
    weights = [one.weights for one in ones]
    assert weights == sorted(weights, reverse=True)
    assert weights[0] / weights[3] == pytest.approx(8, rel=0.01)
