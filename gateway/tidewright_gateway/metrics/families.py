"""The gateway's own metrics: name, type, labels, meaning.

Names follow https://prometheus.io/docs/practices/naming/: base units, `_total` for counters.
"""

from __future__ import annotations

from tidewright.metrics import PREFIX, Label, MetricSpec
from tidewright.resilience.breaker import TRANSITIONS, State
from tidewright.resilience.degradation import Level
from tidewright.resilience.outcome import Outcome
from tidewright.resilience.retry import NoRetry
from tidewright.tracing.exporter import DROPS

GATEWAY_PREFIX = f"{PREFIX}gateway_"

_REQUEST_BUCKETS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 120.0, 300.0, 600.0)
_TOKEN_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 5.0)
_OVERHEAD_BUCKETS = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5)
_LAG_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0)

LIMITS = (
    *("requests_per_second", "concurrent", "tokens_per_minute", "tokens_per_day", "limits_unavailable"),
    *("max_queue", "max_queue_share", "queue_timeout", "degradation", "max_connections", "max_body"),
    *("ws_max_generations", "ws_unsent_bytes", "ws_live_bytes"),
)
"""What can refuse a request that is valid."""
OUTCOMES = ("ok", "limited", "overloaded", "client_error", "failed", "disconnected")
"""limited: by its caller's own limits (429); overloaded: by the load (503); failed: 5xx, or a stream with an error."""
PRIORITY_CLASSES = ("high", "normal", "low")
STORES = ("keys", "limits", "responses")
SIGNALS = ("kv_cache", "queue", "wait", "breaker", "dwell")

_path = Label("path")
_key = Label("key_id")
_replica = Label("replica")
_model = Label("model", ("decoder", "fallback"))
_class = Label("class", PRIORITY_CLASSES)
_failures = Label("outcome", tuple(outcome.label for outcome in Outcome if outcome is not Outcome.SUCCESS))

GATEWAY = (
    MetricSpec("info", "gauge", "1; its labels say what runs", (Label("version"), Label("model"))),
    MetricSpec("log_lines_dropped_total", "counter", "Lines of the log and the access log that could not be written"),
    # Requests.
    MetricSpec(
        "requests_total",
        "counter",
        "Requests that ended. `path`: the route, `other` for paths without one; `code`: the error's code, also of a "
        "stream that ended with one, else empty",
        (_path, Label("status"), Label("code")),
    ),
    MetricSpec(
        "request_outcomes_total",
        "counter",
        "Requests to the API (paths under /v1, /tokenize and /detokenize) that ended, for error rates. limited: by a "
        "limit of the caller; overloaded: refused for the load; failed: 5xx, or a stream that ended with an error",
        (Label("outcome", OUTCOMES),),
    ),
    MetricSpec("requests_active", "gauge", "Requests that run or wait"),
    MetricSpec(
        "request_duration_seconds", "histogram", "From arrival to the last byte", (_path,), buckets=_REQUEST_BUCKETS
    ),
    MetricSpec(
        "time_to_first_token_seconds",
        "histogram",
        "From arrival to the first token (TTFT), of requests that generate",
        buckets=_REQUEST_BUCKETS,
    ),
    MetricSpec(
        "time_per_output_token_seconds",
        "histogram",
        "Mean time between the tokens of a request after its first (TPOT); one value a request",
        buckets=_TOKEN_BUCKETS,
    ),
    MetricSpec(
        "overhead_seconds",
        "histogram",
        "Time that the gateway itself took, until it sent the request on or queued it",
        buckets=_OVERHEAD_BUCKETS,
    ),
    MetricSpec(
        "tokens_total",
        "counter",
        "Tokens of requests that ended",
        (Label("kind", ("prompt", "completion")),),
    ),
    MetricSpec("cached_tokens_total", "counter", "Prompt tokens that an engine's prefix cache had"),
    MetricSpec("streams_open", "gauge", "Streams open now", (Label("kind", ("sse", "websocket")),)),
    # LoRA adapters.
    MetricSpec(
        "adapter_requests_total",
        "counter",
        "Requests that name a LoRA adapter; `_other` sums all but the first 64 names",
        (Label("adapter"),),
    ),
    # Keys.
    MetricSpec(
        "key_requests_total",
        "counter",
        "Requests by API key, without scrapes and health checks; `_other` sums all but the busiest (`busiest_keys`)",
        (_key, Label("outcome", OUTCOMES)),
    ),
    MetricSpec(
        "key_tokens_total",
        "counter",
        "Tokens by API key; `_other` sums all but the busiest (`busiest_keys`)",
        (_key, Label("kind", ("prompt", "completion"))),
    ),
    MetricSpec(
        "key_refusals_total",
        "counter",
        "Requests refused by a limit, by API key; `_other` sums all but the busiest (`busiest_keys`)",
        (_key, Label("limit", LIMITS)),
    ),
    MetricSpec(
        "key_expiry_timestamp_seconds", "gauge", "When the next API key expires, in Unix time; 0 if none is to expire"
    ),
    # Admission.
    MetricSpec("refusals_total", "counter", "Requests refused by a limit", (Label("limit", LIMITS),)),
    MetricSpec(
        "limits_unchecked_total", "counter", "Requests served or refused without their limits, as the store was lost"
    ),
    MetricSpec("queue_length", "gauge", "Generations queued, by priority class", (_class,)),
    MetricSpec(
        "queue_wait_seconds",
        "histogram",
        "Time that generations were queued until they got a place or gave up",
        (_class,),
        buckets=_REQUEST_BUCKETS,
    ),
    MetricSpec("queue_places", "gauge", "Generations that may run at once"),
    MetricSpec("generations_running", "gauge", "Generations that hold a place"),
    MetricSpec(
        "degradation_level",
        "gauge",
        f"Of the ladder: {', '.join(f'{level.value} {level.name.lower()}' for level in Level)}",
    ),
    MetricSpec("smaller_variant", "gauge", "1 while a smaller variant of the first model answers its new requests"),
    MetricSpec("degradation_reason", "gauge", "1 if this signal holds the level", (Label("signal", SIGNALS),)),
    MetricSpec(
        "store_lost",
        "gauge",
        "1 if the store of keys, limits or responses can't be used as it should",
        (Label("store", STORES),),
    ),
    # Cache.
    MetricSpec(
        "cache_requests_total",
        "counter",
        "Generations, by what the response cache did",
        (Label("state", ("hit", "shared", "miss", "bypass")),),
    ),
    MetricSpec("cache_bytes", "gauge", "Size of the response cache"),
    # Replicas.
    MetricSpec("replicas_usable", "gauge", "Replicas that take requests"),
    MetricSpec("replica_up", "gauge", "1 if it takes requests", (_replica,)),
    MetricSpec("replica_load_stale", "gauge", "1 if it did not report its load lately", (_replica,)),
    MetricSpec("replica_in_flight", "gauge", "Generations of this gateway at it", (_replica,)),
    MetricSpec(
        "breaker_state",
        "gauge",
        "1 for the state that the replica's circuit breaker is in",
        (_replica, Label("state", tuple(state.value for state in State))),
    ),
    MetricSpec(
        "breaker_transitions_total",
        "counter",
        "Changes of the state of the replica's circuit breaker",
        (_replica, Label("change", tuple(f"{old.value}_{new.value}" for old, new in TRANSITIONS))),
    ),
    MetricSpec("attempts_total", "counter", "Generations that a replica was asked for", (_replica, _model)),
    MetricSpec("attempt_failures_total", "counter", "Attempts that failed", (_replica, _model, _failures)),
    MetricSpec("streams_moved_total", "counter", "Streams that resumed at another replica"),
    MetricSpec("retries_total", "counter", "Attempts made again after a failure"),
    MetricSpec(
        "retries_refused_total",
        "counter",
        "Retries not made, by reason",
        (Label("reason", tuple(reason.value for reason in NoRetry)),),
    ),
    MetricSpec("retry_budget", "gauge", "Retries that may be made now"),
    MetricSpec(
        "generation_probes_total",
        "counter",
        "Probe tokens that a replica was asked for, by outcome",
        (_replica, Label("outcome", tuple(outcome.label for outcome in Outcome))),
    ),
    MetricSpec("discovery_failures_total", "counter", "Discoveries of replicas, by DNS or file, without a result"),
    # Traces.
    MetricSpec("spans_exported_total", "counter", "Spans handed to `otlp_endpoint`"),
    MetricSpec("spans_dropped_total", "counter", "Spans not exported, by reason", (Label("reason", DROPS),)),
    # The process.
    MetricSpec("connections_open", "gauge", "HTTP and WebSocket connections open"),
    MetricSpec("websocket_connections", "gauge", "WebSocket connections open"),
    MetricSpec("websocket_credits", "gauge", "Tokens that WebSocket clients have granted and not yet got"),
    MetricSpec("websocket_stalled", "gauge", "WebSocket generations that have output and no credit to send it"),
    MetricSpec("websocket_unsent_bytes", "gauge", "Output of WebSocket generations that was not sent yet"),
    MetricSpec(
        "event_loop_lag_seconds",
        "histogram",
        "How late the event loop ran a timer, four times a second",
        buckets=_LAG_BUCKETS,
    ),
    MetricSpec(
        "certificate_expiry_timestamp_seconds",
        "gauge",
        "When the TLS certificate expires, in Unix time; 0 without TLS",
    ),
)
