"""`tidewright plan`: memory, GPUs and flags for a model and a load, from its config.json alone."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import click

from tidewright.cache import EMBEDDED_MODEL
from tidewright.kv_cache.budget import parse_memory
from tidewright.launch.terminal import output_console
from tidewright.planning.gpus import DTYPES, GB, GPUS, KV_DTYPES, TFLOPS, Gpu, find_gpu
from tidewright.planning.plan import Engine, Load, Machine, PlanError, make_plan
from tidewright.planning.weight_formats import SCHEMES, kind_of, stored_formats
from tidewright.quantization.hardware import of_card

PIPE_WIDTH = 120  # characters, where the output is no terminal
MAX_TOKENS = 1 << 27
MAX_CONCURRENT = 1_000_000
MAX_MEMORY = 1 << 44  # bytes of a GPU


class _Amount(click.ParamType):
    name = "amount"

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        try:
            if "%" in value:
                raise ValueError(f"{value!r} is a share; write an amount, e.g. 80GiB")
            amount = parse_memory(value, 0)
        except ValueError as error:
            self.fail(str(error), param, context)
        if not 1 << 30 <= amount <= MAX_MEMORY:
            self.fail(f"{value!r} is no memory of a GPU; it must be 1GiB to 16384GiB", param, context)
        return amount


class _Finite(click.FloatRange):
    """Also refuses NaN."""

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> float:
        number: float = super().convert(value, param, context)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a number", param, context)
        return number


_TOKENS = click.IntRange(1, MAX_TOKENS)


@click.command()
@click.option(
    "--model", default=EMBEDDED_MODEL, show_default=True, help="Prepared name, folder, config.json or hub id."
)
@click.option("--gpu", "gpu_name", metavar="NAME", help=f"One of {', '.join(GPUS)}, or any name with --gpu-memory.")
@click.option("--gpu-memory", type=_Amount(), help="Of each GPU, e.g. 80GiB, as nvidia-smi shows it.")
@click.option("--bandwidth", type=_Finite(1, 1e6), metavar="GB/S", help="Of the GPU's memory, for the estimate.")
@click.option("--tflops", type=_Finite(0.1, 1e6), help="Of the GPU in the chosen dtype, without sparsity.")
@click.option("--context", type=_TOKENS, help="Longest prompt plus output.  [default: the model's limit]")
@click.option(
    "--concurrent", type=click.IntRange(1, MAX_CONCURRENT), default=1, show_default=True, help="Sequences at a time."
)
@click.option("--prompt-tokens", type=_TOKENS, help="Mean length of prompts, with --output-tokens.")
@click.option("--output-tokens", type=_TOKENS, help="Mean length of answers.")
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="bfloat16", show_default=True, help="As of serve.")
@click.option(
    "--kv-cache-dtype",
    type=click.Choice(["auto", *KV_DTYPES]),
    default="auto",
    show_default=True,
    help="As of serve; auto is --dtype.",
)
@click.option(
    "--quantization",
    type=click.Choice(["auto", "none", "stored", *SCHEMES]),
    default="auto",
    show_default=True,
    help="As of serve; auto is what config.json says.",
)
@click.option(
    "--quantize-head",
    type=click.Choice(["int8", "same", "keep"]),
    default="int8",
    show_default=True,
    help="As of serve.",
)
@click.option("--tensor-parallel-size", type=click.IntRange(1, 1024), help="GPUs per replica.  [default: the cheapest]")
@click.option("--gpus-per-node", type=click.IntRange(1, 128), default=8, show_default=True, help="GPUs of each host.")
@click.option("--headroom", type=click.IntRange(0, 90), default=5, show_default=True, help="Percent kept free.")
@click.option(
    "--max-batched-tokens", type=click.IntRange(1, 1 << 20), default=2048, show_default=True, help="As of serve."
)
@click.option("--block-size", type=click.IntRange(1, 256), default=16, show_default=True, help="As of serve.")
@click.option("--json", "as_machine", is_flag=True, help="Print one JSON object: bytes, seconds, plain numbers.")
def plan(
    model: str,
    gpu_name: str | None,
    gpu_memory: int | None,
    bandwidth: float | None,
    tflops: float | None,
    context: int | None,
    concurrent: int,
    prompt_tokens: int | None,
    output_tokens: int | None,
    dtype: str,
    kv_cache_dtype: str,
    quantization: str,
    quantize_head: str,
    tensor_parallel_size: int | None,
    gpus_per_node: int,
    headroom: int,
    max_batched_tokens: int,
    block_size: int,
    as_machine: bool,
) -> None:
    """Say what a model and a load need: memory, GPUs, replicas, and the flags of `tidewright serve`.

    Only config.json is read; no weights, GPU or torch are needed. Memory is counted as the engine counts it; throughput
    is an upper bound from the GPU's data sheet. Sequences are planned with the whole --context, or with the mean
    lengths of prompt and output if these are given: if all are long at a time, some then wait or are preempted.
    Of several models in one server, plan each alone, with its part of the GPU as --gpu-memory.

    \b
    Examples:
      tidewright plan --gpu H200 --context 8192 --concurrent 200
      tidewright plan --model ./my-model --gpu L4 --concurrent 50 --prompt-tokens 1500 --output-tokens 300
      tidewright plan --model ./config.json --gpu H100 --tensor-parallel-size 4 --context 32768
      tidewright plan --model org/name --gpu-memory 96GiB --bandwidth 1600 --tflops 250
      tidewright plan --gpu A100-80GB --concurrent 500 --json | jq .replicas
    """
    from tidewright.models.config import ModelConfigError
    from tidewright.models.families import architecture, read_config
    from tidewright.planning.report import Report, as_json, print_report
    from tidewright.planning.roofline import estimate
    from tidewright.planning.source import read_model_config

    if (prompt_tokens is None) != (output_tokens is None):
        raise click.UsageError("--prompt-tokens and --output-tokens go together")
    gpu = _gpu(gpu_name, gpu_memory, bandwidth, tflops)
    try:
        file, config = read_model_config(model)
        shapes = read_config(config)
        longest = context or shapes.max_positions
        lengths = (prompt_tokens, output_tokens) if prompt_tokens and output_tokens else None
        load = Load(context=longest, concurrent=concurrent, mean_tokens=sum(lengths) if lengths else longest)
        machine = Machine(gpu=gpu, gpus_per_node=gpus_per_node, headroom=headroom)
        stored = stored_formats(config, DTYPES[dtype])
        if quantization == "stored" and stored is None:
            raise PlanError(f"{file} says nothing of quantized weights; choose the --quantization nearest to theirs")
        stored_kind = kind_of(stored.layers) if stored else ""
        is_multiplied = not of_card(gpu.name, gpu.has_float8).lacks(stored_kind)
        engine = Engine(
            dtype=dtype,
            kv_cache_dtype=kv_cache_dtype,
            quantization=quantization,
            quantize_head=quantize_head,
            stored=stored if is_multiplied else None,
            block_size=block_size,
            max_batched_tokens=max_batched_tokens,
        )
        made = make_plan(shapes, load, machine, engine, tensor_parallel_size)
    except (ModelConfigError, PlanError) as error:
        raise click.ClickException(str(error)) from None
    # While it decodes, a sequence has its prompt and on average half of its output; without lengths, half of all.
    mean_context = lengths[0] + lengths[1] // 2 if lengths else longest // 2
    report = Report(
        name=str(Path(model).parent) if Path(model).is_file() else model,  # as serve takes it
        file=file,
        architecture=architecture(config),
        model=shapes,
        load=load,
        lengths=lengths,
        machine=machine,
        engine=engine,
        stored=stored_kind,
        plan=made,
        throughput=estimate(shapes, made, gpu, engine, max(1, mean_context), lengths),
    )
    if as_machine:
        click.echo(json.dumps(as_json(report), indent=2))
    else:
        console = output_console(PIPE_WIDTH)
        with console.capture() as printed:
            print_report(report, console)
        # Without the spaces that fill up a table's cells.
        click.echo("\n".join(line.rstrip() for line in printed.get().splitlines()))


def _gpu(name: str | None, memory: int | None, bandwidth: float | None, tflops: float | None) -> Gpu:
    """The GPU of that name with what is said of it otherwise, or one that is only described."""
    known = find_gpu(name) if name else None
    if known is None and memory is None:
        said = f"GPU {name!r} is not known" if name else "say which GPU"
        raise click.UsageError(
            f"{said}: --gpu with one of {', '.join(GPUS)}, or --gpu-memory (and --bandwidth, --tflops)"
        )
    speeds = bandwidth and bandwidth * GB, tflops and tflops * TFLOPS
    if known is None:
        assert memory is not None
        return Gpu(name or "GPU", memory, speeds[0], speeds[1], speeds[1], True, "as given")
    if memory is None and speeds == (None, None):
        return known
    return Gpu(
        known.name,
        memory or known.memory,
        speeds[0] or known.bandwidth,
        speeds[1] or known.flops_16,
        speeds[1] or known.flops_32,
        known.has_bfloat16,
        f"as given; else {known.source}",
    )
