"""observe/top.py: what the screen shows of given metrics."""

from __future__ import annotations

import io
import time

from rich.console import Console

from tidewright.observe.look import Look
from tidewright.observe.scrape import Change, Scrape, parse
from tidewright.observe.top import screen
from tidewright_gateway.metrics import Metrics

TRITON = """
# TYPE nv_inference_count counter
nv_inference_count{{model="decoder"}} 1
# TYPE tidewright_engine_up gauge
tidewright_engine_up {up}
# TYPE tidewright_heartbeat_timestamp_seconds gauge
tidewright_heartbeat_timestamp_seconds {seen}
# TYPE tidewright_kv_usage_ratio gauge
tidewright_kv_usage_ratio 0.96
# TYPE tidewright_engine_steps_total counter
tidewright_engine_steps_total {steps}
# TYPE tidewright_step_seconds_total counter
tidewright_step_seconds_total{{phase="forward"}} {busy}
tidewright_step_seconds_total{{phase="send"}} 1000
"""


def shown(*sources: Look) -> str:
    console = Console(width=120, file=io.StringIO())
    with console.capture() as captured:
        console.print(screen(sources))
    return captured.get()


def triton(up: int = 1, seen: float | None = None) -> Look:
    seen = time.time() if seen is None else seen
    texts = (TRITON.format(up=up, seen=seen, steps=steps, busy=busy) for steps, busy in ((10, 1.0), (110, 1.5)))
    before, now = (parse(text, at) for at, text in enumerate(texts))
    return Look("http://t:8002/metrics", Change(before, now))


def test_the_gateways_figures() -> None:
    metrics = Metrics()
    before = parse(metrics.text().decode(), 0.0)
    for number, (status, code, limit) in enumerate([(200, "", ""), (503, "overloaded", "max_queue")] * 2):
        metrics.began()
        metrics.ended("/v1/chat/completions", status, 0.1, f"key{number % 2}", code, limit)
    metrics.tokens("key0", 30, 0, 50)
    metrics.first_token(0.15)
    metrics.replica_is("a:1", True)
    metrics.replica_is("b:1", False)
    metrics.degraded(2, {})
    text = shown(Look("http://g:8080/metrics", Change(before, parse(metrics.text().decode(), 2.0))))
    for part in ("gateway g:8080", "fallback only", "50.0%"):
        assert part in text, text
    rows = {line.split("│")[1].strip(): line.split() for line in text.splitlines() if line.count("│") > 2}
    assert rows["a:1"][3] == "up"
    assert rows["b:1"][3] == "down"
    assert "2.0" in rows["requests/s"]
    assert "25.0" in rows["key0"]  # output tokens a second
    assert "1.0" in rows["key1"]


def test_an_engine_that_is_well_down_or_gone() -> None:
    well = shown(triton())
    assert "5.0" in well.split("t:8002")[1]  # ms of a step, without what overlaps it
    assert "96.0%" in well
    assert "up" in well
    assert "engine down" in shown(triton(up=0))
    assert "model process gone" in shown(triton(seen=time.time() - 60))


def test_each_of_several_models_has_a_row() -> None:
    look = triton()
    assert look.change is not None
    both = [Scrape(one.at, {**one.samples}, one.unix) for one in (look.change.before, look.change.now)]
    for scrape, up in zip(both, (1, 0), strict=True):
        for name, value in (("engine_up", up), ("heartbeat_timestamp_seconds", time.time())):
            series = {**scrape.samples[f"tidewright_{name}"], frozenset({("model", "small")}): value}
            scrape.samples[f"tidewright_{name}"] = series  # type: ignore[index]
    text = shown(Look(look.url, Change(*both)))
    rows = {line.split("│")[1].strip(): line for line in text.splitlines() if line.count("│") > 2}
    assert "engine down" in rows["t:8002/small"]
    assert "engine down" not in rows["t:8002"]


def test_endpoints_that_give_nothing_are_named() -> None:
    other = parse("# TYPE x counter\nx 1\n", 0.0)
    text = shown(Look("http://a:1/metrics", None, "can't be reached"), Look("http://b:1/metrics", Change(other, other)))
    assert "a:1 can't be reached" in text
    assert "b:1 has no metrics of a gateway or Triton" in text
