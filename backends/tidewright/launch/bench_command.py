"""`tidewright bench` and `tidewright bench sweep`: starts what is to be measured, and keeps what came out."""

from __future__ import annotations

import contextlib
import json
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import Progress

from tidewright.bench import chart, compare, machine, peers, sweep, tables
from tidewright.bench.targets import EngineTarget, Target, TargetError, TransformersTarget, TritonTarget, running_server
from tidewright.bench.workloads import WORKLOADS, parse_mix, token_ids
from tidewright.bridge.engine_process import EngineStartError
from tidewright.cache import EMBEDDED_MODEL
from tidewright.config import Settings
from tidewright.launch.errors import LaunchError
from tidewright.launch.prepare import prepare
from tidewright.launch.quantize import SCHEMES, quantize

LLAMA_CPP, TRANSFORMERS = "llama.cpp", "transformers"
SERVERS: dict[str, Callable[[Path], peers.Peer]] = {"vllm": peers.vllm, LLAMA_CPP: peers.llama_cpp}


def _names(allowed: tuple[str, ...]) -> Callable[[click.Context, click.Parameter, str], list[str]]:
    def read(context: click.Context, parameter: click.Parameter, value: str) -> list[str]:
        names = [name for name in value.split(",") if name]
        if unknown := [name for name in names if name not in allowed]:
            raise click.BadParameter(f"{unknown[0]!r} is none of {', '.join(allowed)}")
        return names

    return read


_model = click.option("--model", default=EMBEDDED_MODEL, show_default=True, help="Model to measure.")
_output = click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("benchmarks/results"),
    show_default=True,
    help="Folder for the results.",
)


@click.group(invoke_without_command=True)
@click.option("--repetitions", type=click.IntRange(1), default=5, show_default=True, help="Runs of each workload.")
@click.option("--starts", type=click.IntRange(1), default=3, show_default=True, help="Server starts to time.")
@click.option(
    "--against",
    default="vllm,llama.cpp,transformers",
    show_default=True,
    callback=_names((*SERVERS, TRANSFORMERS)),
    help='Systems to measure beside ours; "" for none. vllm and llama.cpp come by: make bench-peers.',
)
@click.option(
    "--quantization",
    "quantizations",
    default="",
    metavar="LIST",
    callback=_names((*SCHEMES, peers.STORED)),
    help="Also measure ours with these weights, and vllm and llama.cpp with such: int8,int4-g64,stored.",
)
@_model
@_output
@click.pass_context
def bench(
    context: click.Context,
    repetitions: int,
    starts: int,
    against: list[str],
    quantizations: list[str],
    model: str,
    output: Path,
) -> None:
    """Measure this machine, ours beside others in one run.

    Every workload is greedy, ignores EOS and takes random token ids, new in each repetition:

    \b
      W1  one request, 128 tokens in, 128 out
      W2  16 at once, 128 in, 64 out
      W3  16 at once sharing 512 tokens, 16 of their own, 32 out
      W4  one request, 1024 in, 1 out

    Server against server, as a client sees them; the systems take turns, and a run begins when the cores are idle.
    Settings of our server come from TIDEWRIGHT_* as in `tidewright serve`. A JSON file of all figures is written.
    Takes half an hour on two slow cores; other work on the machine spoils the figures.

    \b
    Examples:
      tidewright bench --repetitions 2 --against transformers
      tidewright bench --against llama.cpp --quantization int8,int4-g64,stored
      TIDEWRIGHT_SPECULATIVE_TOKENS=4 tidewright bench
    """
    if context.invoked_subcommand:
        return
    console = Console()
    with _tidy_end(), contextlib.ExitStack() as stack:
        model_dir = prepare(model)
        settings = _settings()
        seconds = []
        for _ in range(starts - 1):
            with running_server(settings, model_dir) as (_, start):
                seconds.append(start)
        server, start = stack.enter_context(running_server(settings, model_dir))
        engine = stack.enter_context(contextlib.closing(EngineTarget(settings, model_dir)))
        systems = Systems(stack, console)
        systems.start({name: _plain_peer(name, model_dir) for name in against})
        columns = {}
        ports = {compare.OURS: settings.grpc_port}
        for quantization in quantizations:
            quantized, name = _settings(quantization=quantization), f"{compare.OURS} {quantization}"
            stack.enter_context(running_server(quantized, model_dir))
            ports[name] = quantized.grpc_port
            makers = {
                f"{peer} {quantization}": _quantized_peer(peer, quantization, model, model_dir, console)
                for peer in against
                if peer in SERVERS
            }
            columns[quantization] = {"ours": name, "peers": systems.start(makers)}
        # Last: gRPC does not like processes to be started once it has a stream.
        ours = [
            stack.enter_context(contextlib.closing(TritonTarget(f"127.0.0.1:{port}", name=name)))
            for name, port in ports.items()
        ]
        progress = stack.enter_context(Progress(console=console))
        targets: list[Target] = [ours[0], engine, *ours[1:], *systems.targets.values()]
        measured = compare.measure(targets, repetitions, token_ids(model_dir), progress, WORKLOADS)
        progress.stop()
        report = {
            "machine": machine.description(),
            **_formats(settings),
            "repetitions": repetitions,
            "missing": systems.missing,
            "quantized": columns,
            **compare.report(measured),
            "start": {
                "start to first token through Triton, s": statistics.median([*seconds, start]),
                "model load alone, s": engine.ready.load_seconds if engine.ready else float("nan"),
            },
            tables.MEMORY: machine.server_memory(server.pid or 0),
        }
        tables.print_comparison(report, console)
        _write(report, output, "bench", console)


@bench.command("sweep")
@click.option("--rates", help="Arrivals a second, as in 0.5,1,2.  [default: parts of our own capacity]")
@click.option("--requests", "count", type=click.IntRange(2), default=64, show_default=True, help="Requests a rate.")
@click.option("--mix", default="128:64", show_default=True, help="Tokens in:out; several kinds as 128:64,1024:16.")
@click.option("--seed", default=0, show_default=True, help="Same seed, same arrivals.")
@click.option("--ttft-goal", default=1.0, show_default=True, help="Seconds to the first token that goodput allows.")
@click.option("--tpot-goal", default=0.2, show_default=True, help="Seconds a further token that goodput allows.")
@click.option("--against", default="", callback=_names(tuple(SERVERS)), help="Also measure: vllm,llama.cpp.")
@_model
@_output
def sweep_command(
    rates: str | None,
    count: int,
    mix: str,
    seed: int,
    ttft_goal: float,
    tpot_goal: float,
    against: list[str],
    model: str,
    output: Path,
) -> None:
    """Measure latency over load: requests arrive by chance at several rates.

    Arrivals are Poisson: independent of each other and of how busy the server is, as users are. Times count from
    the moment of arrival. TTFT is the time to the first token, TPOT the mean time of each further one; goodput counts
    the requests that met both goals. Past the capacity, waiting grows with every request: look for the knee.
    Writes a JSON file and a PNG chart.

    \b
    Examples:
      tidewright bench sweep
      tidewright bench sweep --rates 0.5,1,1.5 --requests 100 --against vllm
      tidewright bench sweep --mix 128:64,1024:16 --ttft-goal 0.5
    """
    try:
        kinds = parse_mix(mix)
        numbers = _rates(rates)
    except ValueError as error:
        raise click.ClickException(str(error)) from None
    console = Console()
    goal = sweep.Goal(ttft_goal, tpot_goal)
    with _tidy_end(), contextlib.ExitStack() as stack:
        model_dir = prepare(model)
        settings = _settings()
        stack.enter_context(running_server(settings, model_dir))
        systems = Systems(stack, console)
        systems.start({name: _plain_peer(name, model_dir) for name in against})
        ours = stack.enter_context(contextlib.closing(TritonTarget(f"127.0.0.1:{settings.grpc_port}")))
        progress = stack.enter_context(Progress(console=console))
        targets = [ours, *systems.targets.values()]
        measured = sweep.sweep(targets, kinds, numbers, count, seed, token_ids(model_dir), goal, progress)
        progress.stop()
        report = {
            "machine": machine.description(),
            **_formats(settings),
            "mix": mix,
            "requests": count,
            "seed": seed,
            "goal": asdict(goal),
            "missing": systems.missing,
            **measured,
        }
        tables.print_sweep(report, console)
        file = _write(report, output, "sweep", console)
        title = f"{model_dir.name}, {mix} tokens in:out, {report['machine']['cpu']}, {report['machine']['cores']} cores"
        chart.draw(report["points"], title, file.with_suffix(".png"))
        console.print(f"Drawn in {file.with_suffix('.png')}", highlight=False, soft_wrap=True)


def _rates(text: str | None) -> list[float]:
    try:
        rates = [float(rate) for rate in (text or "").split(",") if rate]
    except ValueError:
        rates = [0.0]
    if any(not 0 < rate < float("inf") for rate in rates):
        raise ValueError(f"rates are numbers above 0, as in 0.5,1,2, not {text}")
    return rates


@contextlib.contextmanager
def _tidy_end() -> Iterator[None]:
    """SIGTERM ends as Ctrl-C does, through every `with`, so that no server is left; known failures are one line."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    except (LaunchError, EngineStartError, TargetError) as error:
        raise click.ClickException(str(error)) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _settings(**changes: Any) -> Settings:
    ports = dict(zip(("http_port", "grpc_port", "metrics_port"), machine.free_ports(3), strict=True))
    return Settings(**ports, **changes)  # type: ignore[arg-type]


def _formats(settings: Settings) -> dict[str, str]:
    """Of our server's numbers, and of what it is measured beside."""
    names = ("dtype", "quantization", "quantize_head", "kv_cache_dtype")
    return {name: getattr(settings, name) for name in names}


Maker = Callable[[], tuple[str, AbstractContextManager[Target]]]
"""A system's name, and how it is started; raises if it is not there."""


class Systems:
    """The other systems: those that run, by their names, and of those that don't, why."""

    def __init__(self, stack: contextlib.ExitStack, console: Console) -> None:
        self._stack, self._console = stack, console
        self.targets: dict[str, Target] = {}
        self.missing: dict[str, str] = {}

    def start(self, makers: Mapping[str, Maker]) -> list[str]:
        """The names of those that run now; one that ran already is not started again."""
        found = []
        for name, make in makers.items():
            with self._console.status(f"Starting {name} (vLLM's very first start takes minutes)"):
                try:
                    running_as, system = make()
                    if running_as not in self.targets:
                        self.targets[running_as] = self._stack.enter_context(system)
                    found.append(running_as)
                except ImportError as error:
                    self.missing[name] = f"{error}; to compare with it: pip install 'tidewright[bench]'"
                # Such as a folder that transformers can't read.
                except (TargetError, LaunchError, OSError, ValueError) as error:
                    self.missing[name] = str(error)
        return found


def _plain_peer(name: str, model_dir: Path) -> Maker:
    if name == TRANSFORMERS:
        return lambda: (TRANSFORMERS, contextlib.closing(TransformersTarget(model_dir)))
    return lambda: _running(SERVERS[name](model_dir))


def _running(peer: peers.Peer) -> tuple[str, AbstractContextManager[Target]]:
    return peer.name, peers.running(peer)


def _quantized_peer(name: str, quantization: str, model: str, model_dir: Path, console: Console) -> Maker:
    """With weights of about the same precision; of vLLM, in a checkpoint that we make of the same model."""
    if name == LLAMA_CPP:
        return lambda: _running(peers.llama_cpp(model_dir, quantization))

    def make() -> tuple[str, AbstractContextManager[Target]]:
        peers.vllm(model_dir)  # is it installed?
        if quantization not in peers.VLLM_SCHEMES:
            raise peers.PeerMissingError(f"vLLM has no weights like {quantization} on a CPU")
        scheme = peers.VLLM_SCHEMES[quantization]
        folder = peers.peers_dir() / f"{model_dir.name}-{scheme}"
        checkpoint = quantize(model, scheme, folder, console, head="keep")
        return _running(peers.vllm(model_dir, checkpoint, scheme))

    return make


def _write(report: dict[str, Any], folder: Path, kind: str, console: Console) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{kind}-{time.strftime('%Y%m%d-%H%M%S')}.json"
    file.write_text(json.dumps(report, indent=2) + "\n")
    console.print(f"Written to {file}", highlight=False, soft_wrap=True)
    return file
