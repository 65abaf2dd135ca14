"""A plan as people read it, and as machines do."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tidewright.models.config import DecoderConfig
from tidewright.planning import footprint
from tidewright.planning.plan import MIB, Engine, Load, Machine, Plan
from tidewright.planning.roofline import Throughput
from tidewright.quantization.hardware import INT8, of_card, on

RENDEZVOUS_PORT = 29400


@dataclass(frozen=True, kw_only=True)
class Report:
    name: str
    """Of the model, as `tidewright serve` takes it."""
    file: str
    architecture: str
    model: DecoderConfig
    load: Load
    lengths: tuple[int, int] | None
    machine: Machine
    engine: Engine
    """`stored`: as the checkpoint is quantized, if the GPU multiplies it so."""
    stored: str
    """The kind of the checkpoint's codes (quantization/hardware.py); empty: it is not quantized."""
    plan: Plan
    throughput: Throughput | None

    @property
    def weights(self) -> str:
        """What they are quantized as, and why; else what would be smaller."""
        if self.engine.quantization not in ("auto", "stored"):
            return "" if self.engine.quantization == "none" else self.engine.quantization
        card = of_card(f"the {self.machine.gpu.name}", self.machine.gpu.has_float8)
        if not self.stored:
            return f"--quantization {INT8}: {card.gain(INT8)}" if self.engine.value_bytes == 2 else ""
        return on(card, self.stored) if card.lacks(self.stored) else "as the checkpoint is quantized"

    @property
    def flags(self) -> dict[str, str]:
        """Of `tidewright serve` on each replica; what is its default already is left out."""
        size, nodes = self.plan.replica.tensor_parallel_size, self.plan.nodes_per_replica
        flags = {"model": self.name}
        if self.engine.dtype != Engine().dtype:
            flags["dtype"] = self.engine.dtype
        if self.engine.kv_cache_dtype != Engine().kv_cache_dtype:
            flags["kv-cache-dtype"] = self.engine.kv_cache_dtype
        for name in ("quantization", "quantize_head"):
            if (value := getattr(self.engine, name)) != getattr(Engine(), name):
                flags[name.replace("_", "-")] = value
        if size > 1:
            flags["tensor-parallel-size"] = str(size)
        if nodes > 1:
            flags |= {
                "nodes": str(nodes),
                "rendezvous": f"FIRST_HOST:{RENDEZVOUS_PORT}",
                "rendezvous-secret-file": "SECRET_FILE",
            }
        flags |= {
            "max-model-len": str(self.load.context),
            "max-running": str(self.plan.running),
            "kv-cache-memory": f"{self.plan.kv_cache // MIB}MiB",
        }
        for name in ("block_size", "max_batched_tokens"):
            if (value := getattr(self.engine, name)) != getattr(Engine(), name):
                flags[name.replace("_", "-")] = str(value)
        return flags

    @property
    def command(self) -> str:
        words = [word for name, value in self.flags.items() for word in (f"--{name}", value)]
        return shlex.join(["tidewright", "serve", *words])


def as_json(report: Report) -> dict[str, Any]:
    """Bytes, seconds and plain numbers. The names are an interface: docs/sizing.md."""
    model, plan, replica, throughput = report.model, report.plan, report.plan.replica, report.throughput
    gpu = report.machine.gpu
    return {
        "model": {
            "name": report.name,
            "config": report.file,
            "architecture": report.architecture,
            "parameters": footprint.parameters(model),
            "layers": model.num_layers,
            "query_heads": model.num_heads,
            "kv_heads": model.num_kv_heads,
            "head_dim": model.head_dim,
            "max_positions": model.max_positions,
            "dtype": report.engine.dtype,
            "kv_cache_dtype": report.engine.kv_cache_dtype,
            "quantization": report.engine.quantization,
            "quantize_head": report.engine.quantize_head,
        },
        "gpu": {"name": gpu.name, "memory_bytes": gpu.memory, "source": gpu.source},
        "load": {
            "context": report.load.context,
            "concurrent": report.load.concurrent,
            "mean_tokens": report.load.mean_tokens,
        },
        "per_gpu": {
            "usable_bytes": replica.usable,
            "weight_bytes": replica.weights,
            "rotary_table_bytes": replica.tables,
            "step_bytes": replica.step,
            "kv_bytes_per_token": replica.kv_per_token,
            "kv_bytes_per_sequence": replica.kv_per_sequence,
            "workspace_bytes_per_sequence": replica.gathered_per_sequence + replica.rows_per_sequence,
            "kv_cache_bytes": plan.kv_cache,
            "kv_blocks": plan.kv_blocks,
        },
        "tensor_parallel_size": replica.tensor_parallel_size,
        "tensor_parallel_sizes": list(plan.sizes),
        "max_sequences": replica.max_sequences,
        "max_longest_sequences": replica.max_longest,
        "replicas": plan.replicas,
        "sequences_per_replica": plan.running,
        "gpus": plan.gpus,
        "nodes": plan.nodes,
        "nodes_per_replica": plan.nodes_per_replica,
        "sizing_model": sizing_model(model),
        "serve": {"command": report.command, "flags": report.flags},
        "roofline_estimate": throughput
        and {
            "is_measured": False,
            "bound": throughput.bound,
            "step_seconds": throughput.step_seconds,
            "tokens_per_second": throughput.all_tokens_per_second,
            "tokens_per_second_per_sequence": throughput.tokens_per_second_of_one,
            "prompt_tokens_per_second": report.plan.replicas * throughput.prompt_tokens_per_second,
            "prompt_seconds": throughput.prompt_seconds,
            "requests_per_second": throughput.all_requests_per_second,
        },
    }


def sizing_model(model: DecoderConfig) -> dict[str, Any]:
    """The variable `model` of terraform/modules/sizing."""
    return {
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "layers": model.num_layers,
        "query_heads": model.num_heads,
        "kv_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "vocab_size": model.vocab_size,
        "max_positions": model.max_positions,
        "parameters": footprint.parameters(model),
        "tied_embeddings": model.tied_embeddings,
        "qkv_bias": model.qkv_bias,
        "output_bias": model.output_bias,
        "mlp_bias": model.mlp_bias,
        "qk_norm": model.qk_norm,
        "norms_after": model.norms_after,
        "float32_norms": model.norm_adds_one,
        "rotary_tables": footprint.rotary_tables(model),
    }


def print_report(report: Report, console: Console) -> None:
    model, plan, replica, gpu = report.model, report.plan, report.plan.replica, report.machine.gpu
    size, load = replica.tensor_parallel_size, report.load
    table = Table("", "", "", box=None, pad_edge=False, show_header=False)
    table.columns[1].justify = "right"
    for column in table.columns:
        column.overflow = "fold"

    def row(name: str, value: str, note: str = "") -> None:
        table.add_row(escape(name), escape(value), f"[dim]{escape(note)}[/]")

    billions = f"{footprint.parameters(model) / 1e9:.2f} billion parameters in {report.engine.dtype}"
    heads = f"{model.num_layers} layers, {model.num_heads} query and {model.num_kv_heads} KV heads"
    console.print(f"[bold]{escape(report.name)}[/] ({billions}; {heads} of {model.head_dim})", highlight=False)
    console.print(f"[dim]{escape(report.file)}[/]\n", highlight=False, soft_wrap=True)

    ranks = "" if size == 1 else f", the largest of {size} ranks"
    table.add_row(f"[bold]Each GPU[/] ({gpu.name}{ranks})", "", "")
    row("  memory", _gib(gpu.memory), gpu.source)
    row("  for the model", _gib(replica.usable), f"without {report.machine.headroom} % headroom and 1 GiB for CUDA")
    row("  weights", _gib(replica.weights), report.weights)
    row("  rotary tables", _gib(replica.tables), f"of {load.context} positions")
    row("  largest step", _gib(replica.step), f"{report.engine.max_batched_tokens} tokens; estimated from the shapes")
    workspace = replica.gathered_per_sequence + replica.rows_per_sequence
    row("  workspace", _gib(plan.running * workspace), f"of {plan.running} sequences: attention, logits; estimated")
    pool = f"{plan.kv_blocks} blocks, {plan.kv_blocks * report.engine.block_size} tokens"
    row("  KV cache", _gib(plan.kv_cache), pool)
    table.add_section()
    table.add_row("[bold]A sequence[/]", "", "")
    row("  KV cache per token", _kib(replica.kv_per_token), "on each GPU" if size > 1 else "")
    row("  KV cache", _gib(replica.kv_per_sequence), f"of {load.mean_tokens} tokens")
    table.add_section()
    table.add_row("[bold]A replica[/]", "", "")
    row("  tensor-parallel size", str(size), f"of {', '.join(map(str, plan.sizes))} that work")
    longest = "" if load.mean_tokens == load.context else f"; {replica.max_longest} of {load.context}"
    row("  sequences that fit", str(replica.max_sequences), f"of {load.mean_tokens} tokens{longest}")
    table.add_section()
    table.add_row(f"[bold]For {load.concurrent} at a time[/]", "", "")
    row("  replicas", str(plan.replicas), f"with {plan.running} sequences each")
    row("  GPUs", str(plan.gpus))
    hosts = f"with {report.machine.gpus_per_node} GPUs each"
    row("  nodes", str(plan.nodes), hosts if plan.nodes_per_replica == 1 else f"{hosts}; a replica takes several")
    _add_throughput(table, report)
    console.print(table, highlight=False)
    console.print("\n[bold]Serve each replica with[/]")
    console.print(f"  {escape(report.command)}", highlight=False, soft_wrap=True)
    if plan.nodes_per_replica > 1:
        console.print("  and `tidewright worker` on the others of its hosts: docs/distributed.md", highlight=False)


def _add_throughput(table: Table, report: Report) -> None:
    table.add_section()
    throughput = report.throughput
    if throughput is None:
        table.add_row("[bold]Throughput[/]", "", "[dim]not estimated: give --bandwidth and --tflops[/]")
        return
    table.add_row("[bold]Roofline, an upper bound that is estimated[/]", "", "[dim]nothing here was measured[/]")
    rates = [
        ("  output", f"{throughput.all_tokens_per_second:,.0f} tokens/s", f"of all; bound by {throughput.bound}"),
        ("  output of one", f"{throughput.tokens_per_second_of_one:,.0f} tokens/s", "while all decode"),
        ("  prompts", f"{report.plan.replicas * throughput.prompt_tokens_per_second:,.0f} tokens/s", "of all"),
    ]
    if report.lengths and throughput.prompt_seconds and throughput.all_requests_per_second:
        prompt, output = report.lengths
        rates.append(("  one prompt alone", f"{throughput.prompt_seconds * 1e3:,.1f} ms", f"of {prompt} tokens"))
        requests = f"with {prompt} tokens in and {output} out"
        rates.append(("  requests", f"{throughput.all_requests_per_second:,.1f} /s", requests))
    for name, value, note in rates:
        table.add_row(name, value, f"[dim]{note}[/]")


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 / 10 else f"{count / 2**20:.1f} MiB"


def _kib(count: int) -> str:
    return f"{count / 2**10:.1f} KiB"
