"""How many GPUs a model and a load need, and what a replica holds. Whole numbers, as in terraform/modules/sizing.

The memory of a GPU, after a share that stays free and what CUDA itself takes: weights, activations of the largest step,
and then for each sequence its KV blocks, what attention keeps beside them, and a row of logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tidewright.distributed.sharding import ShardingError, tensor_parallel_sizes
from tidewright.kv_cache.budget import blocks_of
from tidewright.models.config import DecoderConfig
from tidewright.planning import footprint
from tidewright.planning.gpus import DTYPES, KV_DTYPES, Gpu
from tidewright.planning.weight_formats import WeightFormats, formats_of

MIB = 2**20
RUNTIME_BYTES = 2**30
"""CUDA's context, its libraries, and what the allocator does not give back: an assumption."""
ROUNDING_BYTES = 3 * MIB
"""What rounding the KV cache down to whole MiB may cost at most."""
MAX_RUNNING = 4096  # as config.Settings bounds it
MAX_RANKS = 1024  # likewise


class PlanError(ValueError):
    """There is no such plan; the message says what would work."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """`context`: the longest sequence. `mean_tokens`: what a sequence takes on average, prompt and output."""

    context: int
    concurrent: int
    mean_tokens: int


@dataclass(frozen=True, kw_only=True)
class Machine:
    gpu: Gpu
    gpus_per_node: int = 8
    headroom: int = 5
    """Percent of a GPU's memory that stay free."""


@dataclass(frozen=True, kw_only=True)
class Engine:
    """Options of `tidewright serve` that memory depends on."""

    dtype: str = "bfloat16"
    kv_cache_dtype: str = "auto"
    quantization: str = "auto"
    quantize_head: str = "int8"
    stored: WeightFormats | None = None
    """Of a quantized checkpoint."""
    block_size: int = 16
    max_batched_tokens: int = 2048

    @property
    def value_bytes(self) -> int:
        return DTYPES[self.dtype]

    @property
    def formats(self) -> WeightFormats:
        return formats_of(self.quantization, self.quantize_head, self.value_bytes, self.stored)

    @property
    def kv_value_bytes(self) -> int:
        return self.value_bytes if self.kv_cache_dtype == "auto" else KV_DTYPES[self.kv_cache_dtype]


@dataclass(frozen=True, kw_only=True)
class Replica:
    """One at some tensor-parallel size. Bytes are those of its largest rank, that is of one GPU."""

    tensor_parallel_size: int
    usable: int
    """The GPU's memory without headroom and what CUDA takes."""
    weights: int
    tables: int
    step: int
    kv_per_token: int
    kv_per_sequence: int
    """Of a sequence of mean length."""
    rows_per_sequence: int
    """Logits, and what attention combines, of a sequence's newest token."""
    gathered_per_sequence: int
    """The copy of a layer's keys and values, where attention needs one."""
    max_sequences: int
    """Of mean length, that fit at a time; 0 if not even one of the longest does."""
    max_longest: int
    """Likewise of the longest."""

    @property
    def fixed(self) -> int:
        return self.weights + self.tables + self.step


@dataclass(frozen=True, kw_only=True)
class Plan:
    replica: Replica
    replicas: int
    gpus: int
    nodes: int
    nodes_per_replica: int
    running: int
    """Sequences of each replica at the planned load."""
    kv_cache: int
    """Bytes of each rank's pool."""
    kv_blocks: int
    sizes: tuple[int, ...]
    """Tensor-parallel sizes that this model can be cut into."""
    fitting: tuple[Replica, ...]
    """Those of them that were compared and hold at least one sequence."""


def possible_sizes(model: DecoderConfig) -> tuple[int, ...]:
    return tuple(size for size in tensor_parallel_sizes(model.num_heads, model.num_kv_heads) if _divides(model, size))


def make_replica(model: DecoderConfig, load: Load, machine: Machine, engine: Engine, size: int) -> Replica:
    """Raises ShardingError."""
    bytes_ = engine.value_bytes
    usable = machine.gpu.memory * (100 - machine.headroom) // 100 - RUNTIME_BYTES
    largest = footprint.largest_rank(model, bytes_, size, engine.formats)
    weights = footprint.weight_bytes(model, bytes_, largest, size, engine.formats)
    tables = footprint.table_bytes(model, load.context)
    logits = footprint.logits_bytes(model, bytes_, size)
    rows = logits + footprint.partial_bytes(model, load.context, size)
    step = footprint.step_bytes(model, bytes_, engine.max_batched_tokens, size) + footprint.SCORED_ROWS * logits
    block = footprint.kv_block_bytes(model, engine.kv_value_bytes, engine.block_size, size)
    left = max(0, usable - weights - tables - step - ROUNDING_BYTES)
    kv, longest = (blocks_of(tokens, engine.block_size) * block for tokens in (load.mean_tokens, load.context))
    layers = footprint.gathered_layers(model)
    gathered, longest_gathered = (layers * one // model.num_layers for one in (kv, longest))
    max_longest = left // (longest + longest_gathered + rows)
    # However many run, the pool can hold one of the longest.
    most = max(0, left - longest - longest_gathered) // rows
    return Replica(
        tensor_parallel_size=size,
        usable=usable,
        weights=weights,
        tables=tables,
        step=step,
        kv_per_token=block // engine.block_size,
        kv_per_sequence=kv,
        rows_per_sequence=rows,
        gathered_per_sequence=gathered,
        max_sequences=min(left // (kv + gathered + rows), most),
        max_longest=max_longest,
    )


def make_plan(
    model: DecoderConfig, load: Load, machine: Machine, engine: Engine, tensor_parallel_size: int | None = None
) -> Plan:
    """With the fewest GPUs, and of such plans that with the fewest ranks a replica.

    Raises:
        PlanError: the context is too long, the size is none, or the model does not fit.
    """
    if load.context > model.max_positions:
        raise PlanError(f"the context is {load.context}, but the model's limit is {model.max_positions} tokens")
    if load.mean_tokens > load.context:
        raise PlanError(
            f"prompt and output take {load.mean_tokens} tokens, which is more than the context of {load.context}"
        )
    if engine.dtype == "bfloat16" and not machine.gpu.has_bfloat16:
        raise PlanError(f"the {machine.gpu.name} does not compute in bfloat16; choose float16 or float32")
    if engine.quantization == "fp8" and not machine.gpu.has_float8:
        raise PlanError(f"the {machine.gpu.name} does not multiply fp8, and keeps such weights in 16 bits; choose int8")
    sizes = possible_sizes(model)
    if tensor_parallel_size is not None and tensor_parallel_size not in sizes:
        raise PlanError(
            f"tensor-parallel size {tensor_parallel_size} does not work for {model.num_heads} query heads and "
            f"{model.num_kv_heads} KV heads; these do: {_listed(sizes)}"
        )
    wanted = sizes if tensor_parallel_size is None else (tensor_parallel_size,)
    placed = [size for size in wanted if _is_placed(size, machine.gpus_per_node)]
    made = [make_replica(model, load, machine, engine, size) for size in placed]
    fitting = [replica for replica in made if replica.max_sequences]
    # Ranks on one host where that will do: between hosts each step waits for the network.
    if near := [replica for replica in fitting if replica.tensor_parallel_size <= machine.gpus_per_node]:
        fitting = near
    if not fitting:
        raise PlanError(_why_nothing_fits(model, load, machine, engine, made, wanted))
    best = min(fitting, key=lambda one: (_gpus(one, load), one.tensor_parallel_size))
    replicas = _replicas(best, load)
    running = -(-load.concurrent // replicas)
    kv_cache = _kv_cache(best, running, model)
    size = best.tensor_parallel_size
    return Plan(
        replica=best,
        replicas=replicas,
        gpus=replicas * size,
        nodes=_nodes(replicas, size, machine.gpus_per_node),
        nodes_per_replica=-(-size // machine.gpus_per_node),
        running=running,
        kv_cache=kv_cache,
        kv_blocks=kv_cache // (best.kv_per_token * engine.block_size),
        sizes=sizes,
        fitting=tuple(fitting),
    )


def _divides(model: DecoderConfig, size: int) -> bool:
    if size > MAX_RANKS:
        return False
    try:
        footprint.weight_bytes(model, 1, 0, size)
    except ShardingError:  # there are fewer features than ranks
        return False
    return True


def _is_placed(size: int, gpus_per_node: int) -> bool:
    """Several hosts have equally many ranks each."""
    return size <= gpus_per_node or size % gpus_per_node == 0


def _replicas(replica: Replica, load: Load) -> int:
    return -(-load.concurrent // min(replica.max_sequences, MAX_RUNNING))


def _gpus(replica: Replica, load: Load) -> int:
    return _replicas(replica, load) * replica.tensor_parallel_size


def _nodes(replicas: int, size: int, gpus_per_node: int) -> int:
    """A replica's ranks are on one host, unless it needs several whole ones."""
    if size > gpus_per_node:
        return replicas * (size // gpus_per_node)
    return -(-replicas // (gpus_per_node // size))


def _kv_cache(replica: Replica, running: int, model: DecoderConfig) -> int:
    """All that is left when `running` sequences have their rows: more than they need keeps prefixes."""
    left = replica.usable - replica.fixed - running * replica.rows_per_sequence
    return left * model.num_layers // (model.num_layers + footprint.gathered_layers(model)) // MIB * MIB


def _why_nothing_fits(
    model: DecoderConfig,
    load: Load,
    machine: Machine,
    engine: Engine,
    made: Sequence[Replica],
    wanted: Sequence[int],
) -> str:
    gpu, per_node = machine.gpu, machine.gpus_per_node
    if not made:
        return f"{wanted[0]} ranks can't be shared equally by hosts with {per_node} GPUs; change --gpus-per-node"
    least = min(made, key=lambda one: one.fixed)
    longest = blocks_of(load.context, engine.block_size) * engine.block_size * least.kv_per_token
    layers = footprint.gathered_layers(model)
    gathered = layers * longest // model.num_layers
    needed = least.fixed + longest + gathered + least.rows_per_sequence + ROUNDING_BYTES
    memory = -(-(needed + RUNTIME_BYTES) * 100 // (100 - machine.headroom))
    said = (
        f"the model does not fit: at tensor-parallel size {least.tensor_parallel_size} each GPU needs "
        f"{gib(memory)} for one sequence of {load.context} tokens, and has {gib(gpu.memory)}"
    )
    ways = []
    untried = [size for size in possible_sizes(model) if size not in {one.tensor_parallel_size for one in made}]
    for size in (one for one in untried if _is_placed(one, per_node)):
        if make_replica(model, load, machine, engine, size).max_sequences:
            ways.append(f"tensor-parallel size {size}")
            break
    ways.append(f"GPUs with at least {gib(memory)}")
    left = least.usable - least.fixed - least.rows_per_sequence - ROUNDING_BYTES
    per_token = least.kv_per_token + layers * least.kv_per_token // model.num_layers
    if (tokens := left // per_token // engine.block_size * engine.block_size) > 0:
        ways.append(f"a context of {tokens}")
    if engine.value_bytes > 2:
        ways.append("a dtype of two bytes")
    if engine.formats == WeightFormats.plain(engine.value_bytes):
        for name in ("int8", "int4-g64"):
            smaller = replace(engine, quantization=name)
            if make_replica(model, load, machine, smaller, least.tensor_parallel_size).max_sequences:
                ways.append(f"--quantization {name}")
                break
    return f"{said}. What would do: {', or '.join(ways)}"


def gib(count: int) -> str:
    """Rounded up: so much suffices."""
    return f"{-(-count * 10 // 2**30) / 10:.1f} GiB"


def _listed(sizes: Sequence[int]) -> str:
    return ", ".join(map(str, sizes))
