"""What traces cost the gateway. `python -m benchmarks.tracing`; CPU time of its process, so other load matters little.

A replica that answers at once stands behind it (benchmarks/echo_replica.py), and a receiver of OTLP beside it, both in
processes of their own. Gateways that keep no trace, one in a hundred and all of them run at the same time and take
turns, short ones, so that the machine's changes meet all alike; in each round the order is another.

overhead   CPU time of a short answer, and answers a second, at each ratio
encoding   a request's spans in OTLP: ours beside OpenTelemetry's SDK
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import random
import statistics
import time
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import psutil
import uvloop

from benchmarks.gateway import CALLERS, SHORT, chat
from benchmarks.gateway_load import HttpClient, closed_loop
from benchmarks.gateway_parts import Row, echoes, gateway, process, show
from tidewright.bench.machine import family, free_ports
from tidewright.tracing.otlp import encode, request_of
from tidewright.tracing.span import Attributes, Span, Trace
from tidewright.tracing.trace_context import new_span_id

RATIOS = {"no endpoint": None, "ratio 0": 0.0, "ratio 0.01": 0.01, "ratio 1": 1.0}
TARGETS = {"ratio 0.01": 0.02, "ratio 1": 0.05}
_ROOT: Attributes = {
    "http.request.method": "POST",
    "http.route": "/v1/chat/completions",
    "http.response.status_code": 200,
    "tidewright.request_id": "19a0a9fdb2785d29ab8bfe24",
    "tidewright.key_id": "anonymous",
    "tidewright.kept_because": "sampled",
    "gen_ai.provider.name": "tidewright",
    "gen_ai.operation.name": "chat",
    "gen_ai.request.model": "smollm2-135m",
    "gen_ai.usage.input_tokens": 40,
    "gen_ai.request.temperature": 1.0,
    "gen_ai.usage.output_tokens": 8,
}
_ATTEMPT: Attributes = {
    "tidewright.replica": "127.0.0.1:8001",
    "tidewright.model": "decoder",
    "tidewright.choice": 0,
    "tidewright.outcome": "success",
    "tidewright.tokens_before": 0,
    "gen_ai.usage.output_tokens": 8,
}


def receive(port: int) -> None:
    """Takes whatever comes."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()


def cpu_seconds(pid: int) -> float:
    return sum(sum(one.cpu_times()[:2]) for one in family(pid))


async def overhead(seconds: float, rounds: int) -> None:
    (port,) = free_ports(1)
    rng = random.Random(0)
    with ExitStack() as stack:
        stack.enter_context(process("benchmarks.tracing", "receive", "--port", str(port), port=port))
        (echo,) = stack.enter_context(echoes())
        running, clients = {}, {}
        for name, ratio in RATIOS.items():
            options = (
                {} if ratio is None else {"otlp_endpoint": f"http://127.0.0.1:{port}", "trace_sample_ratio": ratio}
            )
            running[name] = stack.enter_context(gateway([echo.url], **options))
            clients[name] = HttpClient(running[name].port)
            await clients[name].warm(CALLERS)
        costs: dict[str, list[float]] = {name: [] for name in RATIOS}
        rates: dict[str, list[float]] = {name: [] for name in RATIOS}
        ask = {name: functools.partial(client.generate, chat(SHORT), False, 1) for name, client in clients.items()}
        for name in RATIOS:
            await closed_loop(ask[name], CALLERS, 1)  # warm
        for _ in range(rounds):
            for name in rng.sample(list(RATIOS), len(RATIOS)):
                before = cpu_seconds(running[name].pid)
                load = await closed_loop(ask[name], CALLERS, seconds)
                await asyncio.sleep(1.2)  # what is exported late counts
                costs[name].append((cpu_seconds(running[name].pid) - before) / len(load.lasts))
                rates[name].append(load.rate)
        metrics = await running["ratio 1"].metrics()
        for client in clients.values():
            client.close()
    base, rows = costs["no endpoint"], []
    for name in RATIOS:
        # Of each round by itself: what slows the machine down for a while is in both.
        more = statistics.median(cost / plain - 1 for cost, plain in zip(costs[name], base, strict=True))
        least, least_more = min(costs[name]), min(costs[name]) / min(base) - 1
        target = TARGETS.get(name)
        asked = (f"< {target:.0%}", more < target) if target else ("", None)
        cost, rate = statistics.median(costs[name]), statistics.median(rates[name])
        rows.append(
            Row(
                name,
                f"{1e6 * cost:.0f} µs ({more:+.1%}), least {1e6 * least:.0f} µs ({least_more:+.1%}), {rate:.0f}/s",
                *asked,
            )
        )
    dropped = sum(value for labels, value in metrics.items() if labels[0] == "spans_dropped_total")
    below = f"at ratio 1: {metrics['spans_exported_total',]:.0f} spans exported, {dropped:.0f} dropped"
    title = f"CPU time of a short answer, {CALLERS} callers: medians of {rounds} rounds of {seconds:g} s in turns"
    show(title, rows, [below, f"load of the machine at the end: {psutil.getloadavg()[0]:.1f}"])


def encoding(rounds: int) -> None:
    """Both make their spans of the same values, and encode them."""
    from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.trace import SpanContext, SpanKind, TraceFlags

    trace_id, root_id, count = "4bf92f3577b34da6a3ce929d0e0e4736", new_span_id(), 200
    attributes: list[Attributes] = [_ROOT, {}, {}, {}, _ATTEMPT, {}]
    resource, flags = Resource({"service.name": "tidewright-gateway"}), TraceFlags(1)

    def ours() -> bytes:
        made = [
            Trace(trace_id, [Span("name", new_span_id(), root_id, 1.7e9, 1.7e9, one) for one in attributes])
            for _ in range(count)
        ]
        return request_of(map(encode, made), {})

    def theirs() -> bytes:
        parent = SpanContext(int(trace_id, 16), int(root_id, 16), False, flags)
        made = [
            ReadableSpan(
                "name",
                SpanContext(int(trace_id, 16), int(new_span_id(), 16), False, flags),
                parent,
                resource,
                one,
                kind=SpanKind.INTERNAL,
                start_time=int(1.7e18),
                end_time=int(1.7e18),
            )
            for _ in range(count)
            for one in attributes
        ]
        data: bytes = encode_spans(made).SerializeToString()
        return data

    taken: dict[str, list[float]] = {"ours": [], "OpenTelemetry's SDK": []}
    for _ in range(rounds):
        for name, make in zip(taken, (ours, theirs), strict=True):
            began = time.process_time()
            make()
            taken[name].append((time.process_time() - began) / count)
    rows = [Row(name, f"{1e6 * statistics.median(times):.0f} µs") for name, times in taken.items()]
    show(f"encoding of a request's {len(attributes)} spans, medians of {rounds} rounds", rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = ["overhead", "encoding"]
    parser.add_argument("what", nargs="*", default=what, metavar="WHAT")
    parser.add_argument("--seconds", type=float, default=3, help="that a turn lasts")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--port", type=int, default=4318, help="of the receiver alone (receive)")
    options = parser.parse_args()
    if "receive" in options.what:
        return receive(options.port)
    if "encoding" in options.what:
        encoding(20)
    if "overhead" in options.what:
        uvloop.run(overhead(options.seconds, options.rounds))


if __name__ == "__main__":
    main()
