"""The measurements of gpu_card.py: `python -m benchmarks.gpu_parts 135M|1B|8B FILE [--model NAME] [--dry-run]`.

FILE has at any time what was measured so far, so that a part that runs out of time has said something.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_roofline import BATCHES, SHAPES
from tidewright.bench.compare import FIGURES, spread
from tidewright.bench.sweep import Goal, summary
from tidewright.bench.targets import EngineTarget, Notes, Target
from tidewright.bench.workloads import WORKLOADS, Outcome, Request, Run, poisson_requests, token_ids
from tidewright.cache import EMBEDDED_MODEL, ModelNotPreparedError, find_prepared
from tidewright.config import Settings
from tidewright.devices.cuda.traffic import decode_step
from tidewright.engine import model_runner
from tidewright.engine.engine import Engine
from tidewright.engine.messages import EngineConfig, Submit
from tidewright.engine.model_runner import ModelRunner
from tidewright.engine.plan import Draw, ScheduledSequence, StepPlan
from tidewright.models.families import read_config
from tidewright.schema import SamplingParams

ROOT = Path(__file__).parent.parent
GREEDY = SamplingParams(temperature=0, seed=0, ignore_eos=True)
SHARE_GOAL = 85  # % of the bandwidth of a copy, in decode
RATE, P50_GOAL, P99_GOAL = 1000, 30, 50  # requests a second; ms from a request's arrival to its 16th token
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
TINY = SMALL | {"num_key_value_heads": 1, "head_dim": 16, "vocab_size": 512, "max_position_embeddings": 4096}


class Report:
    def __init__(self, file: Path) -> None:
        self._file, self._figures = file, list[dict[str, Any]]()

    def add(self, label: str, value: float | str, unit: str = "", goal: str = "", met: bool = False) -> None:
        figure: dict[str, Any] = {"label": label, "value": value, "unit": unit}
        self._figures.append(figure | ({"goal": goal, "met": met} if goal else {}))
        self._file.write_text(json.dumps(self._figures, indent=1))


class InProcess:
    """An engine in this process, with the interface of the targets of `tidewright bench`."""

    name = "engine in this process"

    def __init__(self, engine: Engine) -> None:
        self.engine, self.used = engine, 0

    def run(self, requests: Sequence[Request]) -> list[Outcome]:
        notes, first = Notes(requests), self.used
        self.used += len(requests)
        sent = ended = 0
        while ended < len(requests):
            now = time.perf_counter() - notes.began
            while sent < len(requests) and requests[sent].at <= now:
                sampling = SamplingParams(temperature=0, max_tokens=requests[sent].max_tokens, ignore_eos=True, seed=0)
                assert self.engine.submit(Submit(first + sent, requests[sent].prompt, sampling)) is None
                sent += 1
            if not self.engine.has_work:
                notes.wait_for(sent)
                continue
            outputs = self.engine.step()
            at = time.perf_counter()
            for output in outputs:
                notes.take(output.request_id - first, at, len(output.token_ids))
                ended += output.finish_reason is not None
        return notes.outcomes({})

    def close(self) -> None:
        pass


@contextmanager
def random_weights() -> Iterator[None]:
    """Engines that are made inside have random weights, made on their device, whatever their folder holds."""
    model_class, load_weights = model_runner.model_class, model_runner.load_weights

    def filled(model_json: dict[str, Any]) -> Callable[..., Any]:
        def make(*arguments: Any) -> Any:
            model = model_class(model_json)(*arguments)
            with torch.no_grad():
                for weight in model.parameters():
                    weight.normal_(std=0.02) if weight.dim() > 1 else weight.fill_(1)
            return model

        return make

    model_runner.model_class = filled  # type: ignore[assignment]
    model_runner.load_weights = lambda *_: None  # type: ignore[assignment]
    try:
        yield
    finally:
        model_runner.model_class, model_runner.load_weights = model_class, load_weights


def random_engine(shape: dict[str, Any], running: int, length: int, is_dry: bool) -> Engine:
    with tempfile.TemporaryDirectory() as name, random_weights():
        (Path(name) / "config.json").write_text(json.dumps(shape | {"eos_token_id": 0}))
        config = EngineConfig(
            model_dir=name,
            max_model_len=length,
            max_running=running,
            max_waiting=10**6,
            **({"device": "cpu", "threads": 1, "kv_cache_memory": "16MiB"} if is_dry else {"device": "cuda"}),
        )
        return Engine(config)


def workloads(report: Report, target: Target, ids: Sequence[int], is_dry: bool) -> None:
    """W1 to W4 as `tidewright bench` has them."""
    runs: dict[str, list[Run]] = {}
    rounds = 1 if is_dry else 3
    for name in ("W1", "W2", "W3", "W4"):
        for number in range(rounds + 1):
            requests = WORKLOADS[name].requests(random.Random(f"{number} {name}"), ids)
            if is_dry:
                requests = [Request(one.prompt[::16], -(-one.max_tokens // 16)) for one in requests]
            run = Run.of(requests, target.run(requests))
            if number:  # the first is for warming up
                runs.setdefault(name, []).append(run)
        for label, workload, figure, _ in FIGURES:
            if workload == name and not (is_dry and runs[name][0].outcomes[0].token_seconds == 0 and "decode" in label):
                what, _, unit = label.partition(", ")
                report.add(what, spread(map(figure, runs[name]))["median"], unit)


def open_loop(report: Report, target: Target, ids: Sequence[int], is_dry: bool) -> None:
    """Requests that arrive independently of each other and of the answers."""
    rate, seconds = (40, 0.5) if is_dry else (RATE, 10)
    burst = [Request(random.Random(i).choices(ids, k=64), 16) for i in range(16 if is_dry else 512)]
    target.run(burst)  # for warming up
    requests = poisson_requests([(64, 16)], rate, int(rate * seconds), 0, ids)
    figures = summary(requests, target.run(requests), Goal(1, 1))
    where = f"{rate} requests/s, 64 in, 16 out"
    report.add(f"{where}: served", figures["achieved, requests/s"], "requests/s")
    for percentile, goal in (("p50", P50_GOAL), ("p99", P99_GOAL)):
        took = figures["end to end, ms"][percentile]
        report.add(f"{where}: end to end {percentile}", took, "ms", f"under {goal} ms", took < goal)
    report.add(f"{where}: first token p50", figures["TTFT, ms"]["p50"], "ms")


def copy_bandwidth(device: torch.device, size: int, times: int) -> float:
    """Bytes a second that a large copy reads and writes."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    sink = torch.empty_like(source)
    waited = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for _ in range(3):
        sink.copy_(source)
    waited()
    began = time.perf_counter()
    for _ in range(times):
        sink.copy_(source)
    waited()
    return 2 * size * times / (time.perf_counter() - began)


def decode_seconds(runner: ModelRunner, first_id: int, rows: int, context: int, steps: int, block_size: int) -> float:
    """Of a step that decodes one token for each of `rows` sequences of `context` tokens, whose cache holds zeros."""
    warm = 1 + steps // 2
    size = -(-(context + warm + steps) // block_size)
    if rows * size > runner.num_blocks:
        raise MemoryError(f"{rows} sequences need {rows * size} blocks, the cache has {runner.num_blocks}")
    tables = torch.randperm(runner.num_blocks, generator=torch.Generator().manual_seed(0)).tolist()

    def plan(step: int) -> StepPlan:
        at = context + step
        sequences = tuple(
            ScheduledSequence(
                first_id + row,
                at - 1,
                (17,),
                tuple(tables[row * size : (row + 1) * size]) if step == 0 else (),
                (Draw(first_id + row, GREEDY, at),),
                first_block=size if step else 0,
            )
            for row in range(rows)
        )
        return StepPlan(sequences, ended=tuple(range(first_id)) if step == 0 else ())

    launched = deque([runner.launch(plan(0))])
    for step in range(1, warm + steps):
        if step == warm:
            launched[-1].result()
            began = time.perf_counter()
        launched.append(runner.launch(plan(step)))
        launched.popleft().result()
    launched.pop().result()
    return (time.perf_counter() - began) / steps


def shares(report: Report, target: InProcess, shape: dict[str, Any], is_dry: bool) -> None:
    runner = target.engine.runner
    assert isinstance(runner, ModelRunner)
    device, config = runner.device.torch_device, target.engine.config
    bandwidth = copy_bandwidth(device, 2**20 if is_dry else 2**31, 20)
    report.add("bandwidth of a copy", bandwidth / 1e9, "GB/s")
    context, steps = (40, 4) if is_dry else (2000, 30)
    model = read_config(shape)
    for rows in (1, 2) if is_dry else BATCHES:
        try:
            seconds = decode_seconds(runner, target.used, rows, context, steps, config.block_size)
        except (MemoryError, torch.OutOfMemoryError) as error:
            report.add(f"decode of {rows}", f"no memory: {error}"[:80])
            continue
        target.used += rows
        moved = sum(kernel.bytes * kernel.times for kernel in decode_step(model, rows, context + steps))
        share = 100 * moved / seconds / bandwidth
        report.add(f"decode of {rows}, contexts of {context}: step", 1000 * seconds, "ms")
        report.add(f"decode of {rows}, contexts of {context}: tokens", rows / seconds, "tokens/s")
        goal = f"at least {SHARE_GOAL} %"
        report.add(f"decode of {rows}: share of that bandwidth", share, "%", goal, share >= SHARE_GOAL)


def model_folder(name: str) -> Path | None:
    """With weights: as named, or `benchmarks/model`, or from the cache; None if there is none."""
    beside = ROOT / "benchmarks" / "model"
    try:
        return find_prepared(name or (str(beside) if beside.is_dir() else EMBEDDED_MODEL))
    except ModelNotPreparedError:
        if name:
            raise
        return None


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=[*SHAPES])
    parser.add_argument("file", type=Path)
    parser.add_argument("--model", default="")
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args(arguments)
    report, is_dry = Report(options.file), options.dry_run
    if not is_dry:
        properties = torch.cuda.get_device_properties(0)
        report.add("GPU", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB")
        report.add("torch", torch.__version__)
    shape = SHAPES["1B"] | TINY if is_dry else SHAPES[options.part]
    folder = None
    if options.part == "135M" and (options.model or not is_dry):
        folder = model_folder(options.model)
    if folder:
        report.add("model", folder.name)
        dry = {"device": "cpu", "threads": 1, "kv_cache_memory": "64MiB"} if is_dry else {"device": "cuda"}
        # Kernels are compiled in the first steps, which takes longer than an engine may usually be silent.
        settings = Settings(max_running=512, max_waiting=10**5, heartbeat_timeout=120, **dry)
        served: Target = EngineTarget(settings, folder)
        ids = token_ids(folder)
    else:
        report.add("model", "random weights")
        length = 512 if is_dry else 2304
        served = InProcess(random_engine(shape, 32 if is_dry else 256, length, is_dry))
        ids = range(100, shape["vocab_size"])
    try:
        workloads(report, served, ids, is_dry)
        if options.part == "135M":
            open_loop(report, served, ids, is_dry)
        if isinstance(served, InProcess):
            shares(report, served, shape, is_dry)
    finally:
        served.close()


if __name__ == "__main__":
    main()
