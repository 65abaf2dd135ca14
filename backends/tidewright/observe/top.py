"""The screen of `tidewright top`: tables made of what changed between two scrapes. No I/O and no clock."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tidewright.observe.look import ENGINE, GATEWAY, STALE, Look, by_model, last_heartbeat
from tidewright.observe.scrape import Change

MAX_KEYS = 12
LEVELS = ("all features", "short answers", "fallback only", "refusing")


def screen(sources: Sequence[Look]) -> RenderableType:
    """All of it. A source without a change shows its trouble."""
    parts: list[RenderableType] = []
    for source in sources:
        if source.change is None:
            parts.append(Text(f"{source.where} {source.trouble}", style="bold red"))
        elif source.is_gateway:
            parts += [_service(source, source.change), _replicas(source.change), _keys(source.change)]
        elif not source.is_triton:
            parts.append(Text(f"{source.where} has no metrics of a gateway or Triton", style="bold red"))
    if engines := [source for source in sources if source.change and source.is_triton]:
        parts.append(_engines(engines))
    return Group(*parts)


def _service(source: Look, change: Change) -> Table:
    now = change.now
    outcomes = change.rates(f"{GATEWAY}request_outcomes_total", "outcome")
    total = sum(outcomes.values())
    errors = change.share(outcomes.get("failed", 0.0) + outcomes.get("overloaded", 0.0), total)
    places, running = now.total(f"{GATEWAY}queue_places"), now.total(f"{GATEWAY}generations_running")
    waiting = now.by(f"{GATEWAY}queue_length", "class")
    hits = change.rates(f"{GATEWAY}cache_requests_total", "state")
    level = int(now.total(f"{GATEWAY}degradation_level"))
    lost = [name for name, is_lost in now.by(f"{GATEWAY}store_lost", "store").items() if is_lost]
    facts: list[tuple[str, RenderableType]] = [
        ("requests/s", f"{total:.1f}"),
        ("errors", _percent(errors, bad=0.001)),
        ("limited/s", f"{outcomes.get('limited', 0.0):.1f}"),
        ("refused for load/s", f"{outcomes.get('overloaded', 0.0):.1f}"),
        ("TTFT p50 / p99", _quantiles(change, "time_to_first_token_seconds")),
        ("TPOT p50 / p99", _quantiles(change, "time_per_output_token_seconds")),
        ("prompt tokens/s", f"{change.rate(f'{GATEWAY}tokens_total', kind='prompt'):.0f}"),
        ("output tokens/s", f"{change.rate(f'{GATEWAY}tokens_total', kind='completion'):.0f}"),
        ("running / places", f"{running:.0f} / {places:.0f}"),
        ("queued high / normal / low", " / ".join(f"{waiting.get(name, 0):.0f}" for name in ("high", "normal", "low"))),
        ("streams open", f"{now.total(f'{GATEWAY}streams_open'):.0f}"),
        ("connections", f"{now.total(f'{GATEWAY}connections_open'):.0f}"),
        ("response cache", _percent(change.share(hits.get("hit", 0.0) + hits.get("shared", 0.0), sum(hits.values())))),
        ("event-loop lag p99", _quantiles(change, "event_loop_lag_seconds", (0.99,))),
    ]
    table = Table(title=f"gateway {source.where}", title_justify="left", show_header=False, expand=True)
    for (left, value), (right, other) in zip(facts[::2], facts[1::2], strict=True):
        table.add_row(left, value, right, other)
    if level:
        table.add_row("degraded", Text(LEVELS[min(level, 3)], style="bold red"), "", "")
    if lost:
        table.add_row("stores lost", Text(", ".join(lost), style="bold red"), "", "")
    return table


def _replicas(change: Change) -> Table:
    now, table = change.now, _table("replicas", "replica", "state", "breaker", "in flight", "attempts/s", "failures/s")
    attempts = change.rates(f"{GATEWAY}attempts_total", "replica")
    failures = change.rates(f"{GATEWAY}attempt_failures_total", "replica")
    for replica, up in sorted(now.by(f"{GATEWAY}replica_up", "replica").items()):
        states = now.by(f"{GATEWAY}breaker_state", "state", replica=replica)
        breaker = next((state for state, is_it in states.items() if is_it), "-")
        table.add_row(
            replica,
            Text("up", style="green") if up else Text("down", style="bold red"),
            breaker if breaker == "closed" else Text(breaker, style="bold red"),
            f"{now.total(f'{GATEWAY}replica_in_flight', replica=replica):.0f}",
            f"{attempts.get(replica, 0.0):.1f}",
            f"{failures.get(replica, 0.0):.1f}",
        )
    return table


def _keys(change: Change) -> Table:
    table = _table("keys", "key", "requests/s", "refused/s", "prompt tokens/s", "output tokens/s")
    requests = change.rates(f"{GATEWAY}key_requests_total", "key_id")
    refused = change.rates(f"{GATEWAY}key_refusals_total", "key_id")
    prompt = change.rates(f"{GATEWAY}key_tokens_total", "key_id", kind="prompt")
    output = change.rates(f"{GATEWAY}key_tokens_total", "key_id", kind="completion")
    busiest = sorted(requests, key=lambda key: (output.get(key, 0.0), requests[key]), reverse=True)
    for key in busiest[:MAX_KEYS]:
        figures = (requests[key], refused.get(key, 0.0), prompt.get(key, 0.0), output.get(key, 0.0))
        table.add_row(Text(key), *(f"{figure:.1f}" for figure in figures))
    return table


def _engines(sources: Sequence[Look]) -> Table:
    columns = ("state", "run", "wait", "KV", "hits", "tokens/s", "ms/step", "preempt/s", "restarts")
    table = _table("engines (hits: prompt tokens that the prefix cache had)", "Triton", *columns)
    rows = [
        (f"{source.where}/{name}" if name else source.where, change)
        for source in sources
        if source.change
        for name, change in by_model(source.change).items()
    ]
    for where, change in rows:
        now = change.now
        silent = now.unix - last_heartbeat(now)
        up = now.total(f"{ENGINE}engine_up") > 0
        if silent > STALE:
            state = Text("model process gone", style="bold red")
        else:
            state = Text("up", style="green") if up else Text("engine down", style="bold red")
        steps = change.rate(f"{ENGINE}engine_steps_total")
        busy = sum(
            rate for phase, rate in change.rates(f"{ENGINE}step_seconds_total", "phase").items() if phase != "send"
        )
        per_step = change.share(busy, steps)
        table.add_row(
            where,
            state,
            f"{now.total(f'{ENGINE}requests_running'):.0f}",
            f"{now.total(f'{ENGINE}requests_waiting'):.0f}",
            _percent(now.total(f"{ENGINE}kv_usage_ratio"), bad=0.95),
            _percent(
                change.share(
                    change.rate(f"{ENGINE}prefix_cache_hits_total"), change.rate(f"{ENGINE}prefix_cache_queries_total")
                )
            ),
            f"{change.rate(f'{ENGINE}generated_tokens_total'):.0f}",
            "-" if per_step is None else f"{1000 * per_step:.1f}",
            f"{change.rate(f'{ENGINE}preemptions_total'):.1f}",
            f"{now.total(f'{ENGINE}engine_restarts_total'):.0f}",
        )
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", expand=True)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right")
    return table


def _percent(share: float | None, bad: float | None = None) -> Text:
    """`bad`: above it, the figure is red."""
    if share is None:
        return Text("-")
    return Text(f"{share:.1%}", style="bold red" if bad is not None and share > bad else "")


def _quantiles(change: Change, name: str, qs: tuple[float, ...] = (0.5, 0.99)) -> str:
    found = (change.quantile(GATEWAY + name, q) for q in qs)
    return " / ".join("-" if seconds is None else f"{1000 * seconds:.0f} ms" for seconds in found)
