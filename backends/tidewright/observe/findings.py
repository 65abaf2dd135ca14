"""What is wrong with a running service, by its metrics and status: one rule each. No I/O and no clock.

A rule says what it saw in figures, and names the section of docs/troubleshooting.md that goes on from there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import IntEnum

from tidewright.observe.look import ENGINE, GATEWAY, STALE, Look, by_model, last_heartbeat
from tidewright.observe.scrape import Change, Scrape
from tidewright.served_models import decoder_of

UNHEALTHY = {
    "engine_silent": "its engine has said and computed nothing for seconds; after heartbeat_timeout another takes its "
    "place",
    "stuck": "a thread of its bridge has ended, or Triton takes none of its responses; only loading it again helps, "
    "which `tidewright serve` does",
    "draining": "it was asked to end, and takes no new requests",
}
OTHERWISE = "`tidewright health` says why"
OFTEN = 3  # restarts, the last of them recent
RECENT = 900.0  # seconds for which a restart is news
EXPIRY_SOON = 14 * 86400.0
QUICK = 0.1  # seconds; an event loop that is later than that delays everyone
NO_KEYS = "the key store is empty, so every API key is refused"
NO_DECODER = (
    "Triton has no model decoder: it was unloaded by request, or could not be loaded; `tidewright health` at its HTTP "
    "port says which, and how to load it again"
)
MODELS = {"": "decoder", "failsafe_": "failsafe", "fallback_": "fallback"}


class Severity(IntEnum):
    CRITICAL = 0
    """Users get errors, or will at once."""
    WARNING = 1
    """It degrades, or will."""
    INFO = 2
    """Of one caller, or history."""


CRITICAL, WARNING, INFO = Severity


@dataclass(frozen=True, order=True)
class Finding:
    severity: Severity
    where: str
    cause: str
    runbook: str
    """Anchor in docs/troubleshooting.md."""


Rule = Callable[[Look, Change], Iterator[tuple[Severity, str, str]]]
"""Yields severity, cause, anchor."""

_of_gateway: list[Rule] = []
_of_triton: list[Rule] = []


def diagnose(looks: list[Look]) -> list[Finding]:
    """What is wrong, the worst first."""
    found: list[Finding] = []
    for look in looks:
        if look.change is None:
            found.append(_without_metrics(look))
            continue
        rules = _of_gateway if look.is_gateway else _of_triton if look.is_triton else []
        for rule in rules:
            found += (
                Finding(severity, look.where, cause, runbook) for severity, cause, runbook in rule(look, look.change)
            )
    return sorted(set(found))


def _without_metrics(look: Look) -> Finding:
    """A gateway without keys gives its metrics to nobody, but its health to all."""
    if look.status.get("key_store_empty"):
        return Finding(CRITICAL, look.where, f"{NO_KEYS}, also to see its metrics", "no-keys")
    if look.status.get("status") == "ready":
        cause = f"it {look.trouble}; it takes requests, but nothing else of it could be looked at"
        return Finding(WARNING, look.where, cause, "endpoint-down")
    told = f"; {why}" if (why := look.status.get("not_ready")) else ""
    return Finding(CRITICAL, look.where, f"it {look.trouble}{told}", "endpoint-down")


def _gateway(rule: Rule) -> Rule:
    _of_gateway.append(rule)
    return rule


def _triton(rule: Rule) -> Rule:
    _of_triton.append(rule)
    return rule


def _grown(change: Change, name: str, label: str, **labels: str) -> list[tuple[str, float]]:
    """Growth per second by a label, the fastest first; nothing that stands still."""
    rates = ((value, rate) for value, rate in change.rates(name, label, **labels).items() if rate > 0)
    return sorted(rates, key=lambda pair: -pair[1])


@_gateway
def _replicas_down(look: Look, change: Change) -> Iterator[tuple[Severity, str, str]]:
    troubles = {one.get("address"): one.get("trouble") for one in look.status.get("replicas", ())}
    up = change.now.by(f"{GATEWAY}replica_up", "replica")
    down = [replica for replica, is_up in sorted(up.items()) if not is_up]
    usable = change.now.total(f"{GATEWAY}replicas_usable")
    severity, anchor = (WARNING, "replica-down") if usable else (CRITICAL, "no-replica-usable")
    for replica in down:
        yield severity, f"replica {replica} takes no requests: {troubles.get(replica) or 'see the log'}", anchor
    if not usable and not down:
        yield severity, "no replica is known: discovery has found none", "discovery-failing"


@_gateway
def _breakers(look: Look, change: Change) -> Iterator[tuple[Severity, str, str]]:
    for state in ("open", "half_open"):
        for replica, is_it in change.now.by(f"{GATEWAY}breaker_state", "replica", state=state).items():
            if is_it:
                yield WARNING, f"the breaker of replica {replica} is {state.replace('_', ' ')}", "breaker-open"


@_gateway
def _attempts(look: Look, change: Change) -> Iterator[tuple[Severity, str, str]]:
    for replica, _ in _grown(change, f"{GATEWAY}attempt_failures_total", "replica"):
        for outcome, rate in _grown(change, f"{GATEWAY}attempt_failures_total", "outcome", replica=replica):
            if outcome not in ("invalid", "cancelled", "request_timeout"):  # the callers'
                yield WARNING, f"attempts at {replica} fail, {rate:.1f}/s: {outcome}", "attempts-fail"


@_gateway
def _stores(look: Look, change: Change) -> Iterator[tuple[Severity, str, str]]:
    told = look.status.get("stores", {})
    if is_empty := bool(look.status.get("key_store_empty")):
        yield CRITICAL, NO_KEYS, "no-keys"
    for store, is_lost in change.now.by(f"{GATEWAY}store_lost", "store").items():
        if is_lost and not (is_empty and store == "keys"):
            yield CRITICAL, f"the store of {store} is lost: {told.get(store, 'see the log')}", "store-lost"


@_gateway
def _load(look: Look, change: Change) -> Iterator[tuple[Severity, str, str]]:
    waiting = sum(change.now.by(f"{GATEWAY}queue_length", "class").values())
    running, places = (change.now.total(f"{GATEWAY}{name}") for name in ("generations_running", "queue_places"))
    refused = dict(_grown(change, f"{GATEWAY}refusals_total", "limit"))
    overload = {
        limit: refused[limit] for limit in ("max_queue", "max_queue_share", "queue_timeout") if limit in refused
    }
    if waiting or overload:
        text = f"more load than places: {waiting:.0f} queued, {running:.0f} of {places:.0f} places taken"
        if overload:
            text += "; refused " + ", ".join(f"{rate:.1f}/s by {limit}" for limit, rate in overload.items())
        if busiest := _grown(change, f"{GATEWAY}key_requests_total", "key_id"):
            text += f"; busiest key {busiest[0][0]} ({busiest[0][1]:.1f} requests/s)"
        yield CRITICAL if overload else WARNING, text, "queue-growing"
    if rate := refused.get("max_connections"):
        yield (
            CRITICAL,
            f"connections are refused, {rate:.1f}/s: max_connections is reached",
            "connections-full",
        )


@_gateway
def _degraded(look: Look, change: Change) -> Iterator[tuple[Severity, str, str]]:
    if level := int(change.now.total(f"{GATEWAY}degradation_level")):
        name = ("", "answers are shortened", "only the fallback answers", "requests are refused")[min(level, 3)]
        signals = [signal for signal, is_it in change.now.by(f"{GATEWAY}degradation_reason", "signal").items() if is_it]
        yield CRITICAL, f"degraded, {name}, because of {', '.join(signals) or 'dwell'}", "degraded"


@_gateway
def _keys(look: Look, change: Change) -> Iterator[tuple[Severity, str, str]]:
    by_load = ("max_queue", "queue_timeout", "degradation", "max_connections", "max_body", "limits_unavailable")
    for key, _ in _grown(change, f"{GATEWAY}key_refusals_total", "key_id"):
        for limit, rate in _grown(change, f"{GATEWAY}key_refusals_total", "limit", key_id=key):
            if limit not in by_load:
                yield INFO, f"key {key} is refused {rate:.1f}/s by its limit {limit}", "key-limited"


@_gateway
def _errors(look: Look, change: Change) -> Iterator[tuple[Severity, str, str]]:
    for code, rate in _grown(change, f"{GATEWAY}requests_total", "code"):
        if code in ("", "cancelled", "rate_limit_exceeded"):
            continue
        statuses = ", ".join(status for status, _ in _grown(change, f"{GATEWAY}requests_total", "status", code=code))
        is_ours = statuses.startswith(("5", "2"))
        severity = WARNING if is_ours else INFO
        yield severity, f"requests end with {code} (status {statuses}), {rate:.1f}/s", f"error-{code.replace('_', '-')}"


@_gateway
def _fallback_serves(look: Look, change: Change) -> Iterator[tuple[Severity, str, str]]:
    if rate := change.rate(f"{GATEWAY}attempts_total", model="fallback"):
        yield WARNING, f"the fallback answers instead of the decoder, {rate:.1f}/s", "fallback-serves"


@_gateway
def _process(look: Look, change: Change) -> Iterator[tuple[Severity, str, str]]:
    lag = change.quantile(f"{GATEWAY}event_loop_lag_seconds", 0.9)
    if lag is not None and lag > QUICK:
        yield (
            WARNING,
            f"the gateway's event loop is late by {1000 * lag:.0f} ms: it lacks CPU",
            "event-loop-lag",
        )
    if stalled := change.now.total(f"{GATEWAY}websocket_stalled"):
        yield (
            INFO,
            f"{stalled:.0f} WebSocket clients grant no credit for output that waits",
            "websocket-stalled",
        )
    if rate := change.rate(f"{GATEWAY}discovery_failures_total"):
        yield WARNING, f"discovery of replicas fails, {rate:.1f}/s; those known are kept", "discovery-failing"
    for name, what, anchor in (
        ("log_lines_dropped_total", "log lines were dropped: is the disk full?", "log-lines-dropped"),
        ("spans_dropped_total", "spans were dropped: does the collector answer?", "spans-dropped"),
    ):
        if dropped := change.now.total(GATEWAY + name):
            yield WARNING if change.rate(GATEWAY + name) else INFO, f"{dropped:.0f} {what}", anchor


@_gateway
def _expiry(look: Look, change: Change) -> Iterator[tuple[Severity, str, str]]:
    for name, what, anchor in (
        ("certificate_expiry_timestamp_seconds", "the TLS certificate", "certificate-expires"),
        ("key_expiry_timestamp_seconds", "an API key", "key-expires"),
    ):
        at = change.now.total(GATEWAY + name)
        if at and at - change.now.unix < EXPIRY_SOON:
            days = (at - change.now.unix) / 86400
            severity = WARNING if days > 0 else CRITICAL
            yield severity, f"{what} expires in {days:.1f} days" if days > 0 else f"{what} has expired", anchor


@_triton
def _models(look: Look, change: Change) -> Iterator[tuple[Severity, str, str]]:
    of_models = by_model(change)
    for name, of_model in of_models.items():
        if name:
            yield from _model(of_model, ENGINE, decoder_of(name))
    change = of_models[""]
    for prefix, model in MODELS.items():
        seen = last_heartbeat(change.now, ENGINE + prefix)
        if not seen:
            if model == "decoder":
                yield CRITICAL, NO_DECODER, "decodermissing"
            continue
        yield from _model(change, ENGINE + prefix, model)


def _model(change: Change, prefix: str, model: str) -> Iterator[tuple[Severity, str, str]]:
    if (silent := change.now.unix - last_heartbeat(change.now, prefix)) > STALE:
        cause = f"the process of model {model} has been silent for {silent:.0f} s: it is dead, stopped or unloaded"
        yield CRITICAL, cause, "model-process-dead"
    elif model != "failsafe":
        yield from _engine(change, prefix, model)


def _engine(change: Change, prefix: str, model: str) -> Iterator[tuple[Severity, str, str]]:
    now = change.now
    if not now.total(f"{prefix}engine_up"):
        yield CRITICAL, f"the engine of {model} is down and being started again", "engine-down"
    elif not now.total(f"{prefix}healthy"):
        yield from _unhealthy(now, prefix, model)
    restarted = now.unix - now.total(f"{prefix}engine_restart_timestamp_seconds")
    if restarted < RECENT:
        times = now.total(f"{prefix}engine_restarts_total")
        cause = f"the engine of {model} died and was started again {restarted:.0f} s ago (restart {times:.0f})"
        if times >= OFTEN:
            yield CRITICAL, cause, "enginerestartsoften"
        else:
            yield INFO, cause, "engine-restarts"
    for reason, rate in _grown(change, f"{prefix}requests_finished_total", "reason"):
        if reason in ("engine_failed", "overloaded"):
            yield WARNING, f"{model} ends requests with {reason}, {rate:.1f}/s", "engine-errors"


def _unhealthy(now: Scrape, prefix: str, model: str) -> Iterator[tuple[Severity, str, str]]:
    causes = [cause for cause, is_it in now.by(f"{prefix}unhealthy", "cause").items() if is_it] or [""]
    for cause in causes:
        severity = WARNING if cause == "draining" else CRITICAL
        yield severity, f"model {model} is not healthy: {UNHEALTHY.get(cause, OTHERWISE)}", "decoder-unready"


@_triton
def _kv_caches(look: Look, change: Change) -> Iterator[tuple[Severity, str, str]]:
    for name, of_model in by_model(change).items():
        for severity, cause, anchor in _kv_cache(of_model):
            yield severity, f"model {name}: {cause}" if name else cause, anchor


def _kv_cache(change: Change) -> Iterator[tuple[Severity, str, str]]:
    now, preemptions = change.now, change.rate(f"{ENGINE}preemptions_total")
    usage, waiting, running, places = (
        now.total(ENGINE + name) for name in ("kv_usage_ratio", "requests_waiting", "requests_running", "batch_places")
    )
    if preemptions > 0 or (waiting and running < places):
        cause = (
            f"the KV cache is short: {usage:.0%} used, {preemptions:.1f} preemptions/s, {waiting:.0f} requests wait "
        )
        yield WARNING, f"{cause}although {running:.0f} of {places:.0f} places of the batch are taken", "kv-pressure"
    elif waiting:
        yield INFO, f"the engine's batch is full: {running:.0f} run, {waiting:.0f} wait", "batch-full"


@_triton
def _failures_in_triton(look: Look, change: Change) -> Iterator[tuple[Severity, str, str]]:
    for model, _ in _grown(change, "nv_inference_request_failure", "model"):
        for reason, rate in _grown(change, "nv_inference_request_failure", "reason", model=model):
            if reason not in ("CANCELED", "REJECTED"):
                yield INFO, f"Triton's model {model} fails requests, {rate:.1f}/s: {reason}", "triton-failures"
