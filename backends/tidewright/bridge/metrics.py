"""The metrics of engine and bridge, and their samples for Triton's /metrics."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from tidewright.bridge.adapters import ADAPTER_CHANGES
from tidewright.bridge.stats import REQUEST_BUCKETS, TARGETS, TOKEN_BUCKETS, Histogram
from tidewright.bridge.traces import EXPORTED
from tidewright.engine.messages import STEP_PHASES
from tidewright.memory.account import OWNERS
from tidewright.memory.reclaim import STAGES
from tidewright.metrics import HEARTBEAT, PREFIX, Label, MetricSpec, Samples, heartbeat
from tidewright.schema import DRAINING, FINISH_REASONS, STUCK
from tidewright.tracing.exporter import DROPS

if TYPE_CHECKING:
    from tidewright.bridge.bridge import Bridge

UNHEALTHY = ("engine_down", "engine_silent", "stuck", "draining")
FALLBACK_PREFIX = f"{PREFIX}fallback_"

METRICS = (
    HEARTBEAT,
    MetricSpec("engine_up", "gauge", "1 while an engine process takes requests"),
    MetricSpec("healthy", "gauge", "1 while `tidewright health` finds nothing wrong with the model"),
    MetricSpec(
        "unhealthy",
        "gauge",
        "1 for what is wrong, if `healthy` is 0. engine_down: no engine is up; engine_silent: it says and computes "
        "nothing; stuck: a thread of the bridge has ended, or Triton takes no response; draining: it is asked to end",
        (Label("cause", UNHEALTHY),),
    ),
    MetricSpec("engine_restarts_total", "counter", "Times that the engine process was started again"),
    MetricSpec("engine_restart_timestamp_seconds", "gauge", "When that was last, in Unix time; 0 if it never was"),
    MetricSpec("requests_active", "gauge", "Requests in flight in the bridge"),
    MetricSpec("requests_running", "gauge", "Sequences in the engine's current batch"),
    MetricSpec("batch_places", "gauge", "Sequences that a batch may have (`max_running`)"),
    MetricSpec("batch_places_allowed", "gauge", "Of these, that may be taken now: all, or fewer to keep `tpot_target`"),
    MetricSpec("requests_waiting", "gauge", "Sequences waiting for a place in the batch"),
    MetricSpec(
        "requests_finished_total",
        "counter",
        "Requests that ended, each counted once; with n > 1 as timeout if one sequence timed out, else as length if "
        "one ended so, else as stop",
        (Label("reason", FINISH_REASONS),),
    ),
    MetricSpec(
        "requests_within_targets_total",
        "counter",
        "Goodput: requests that ended with `stop` or `length` and met their `ttft_target` (with the first token), "
        "their `tpot_target` (on average over a sequence), or both. One without a target meets it",
        (Label("target", TARGETS),),
    ),
    MetricSpec(
        "requests_refused_early_total",
        "counter",
        "Requests refused because their first token was expected after this limit",
        (Label("limit", ("timeout", "ttft_target")),),
    ),
    MetricSpec(
        "request_queue_seconds",
        "histogram",
        "From the engine's receipt of a request to its first step; counted with the first token",
        buckets=REQUEST_BUCKETS,
    ),
    MetricSpec(
        "time_to_first_token_seconds",
        "histogram",
        "From arrival to the first token's response, or to when it could have left if the request does not stream",
        buckets=REQUEST_BUCKETS,
    ),
    MetricSpec(
        "inter_token_latency_seconds",
        "histogram",
        "Between two tokens of a sequence; tokens that leave in one response share the time since the last one",
        buckets=TOKEN_BUCKETS,
    ),
    MetricSpec(
        "request_latency_seconds",
        "histogram",
        "From arrival to the last response, of requests that ended with an answer and not an error",
        buckets=REQUEST_BUCKETS,
    ),
    MetricSpec("engine_steps_total", "counter", "Steps of the engine"),
    MetricSpec(
        "step_seconds_total",
        "counter",
        "Time of the engine by part of the step; send has its own thread and overlaps the others",
        (Label("phase", STEP_PHASES),),
    ),
    MetricSpec("prompt_tokens_total", "counter", "Prompt tokens of requests that got their first token"),
    MetricSpec("generated_tokens_total", "counter", "Tokens generated"),
    MetricSpec("preemptions_total", "counter", "Sequences pushed out of the batch for lack of KV blocks or memory"),
    MetricSpec(
        "step_tokens",
        "gauge",
        "Tokens that a step may compute: `max_batched_tokens`, or less once a step ran out of memory",
    ),
    MetricSpec(
        "steps_out_of_memory_total", "counter", "Steps that ran out of memory, and were computed in smaller ones"
    ),
    MetricSpec("kv_blocks", "gauge", "Blocks of the KV cache"),
    MetricSpec("kv_blocks_free", "gauge", "Blocks of the KV cache that no request uses"),
    MetricSpec("kv_blocks_cached", "gauge", "Free blocks whose content the prefix cache can still find"),
    MetricSpec("kv_usage_ratio", "gauge", "Share of the KV cache's blocks that requests use, 0 to 1"),
    MetricSpec(
        "memory_bytes",
        "gauge",
        "Memory of one rank by owner: weights; workspace, what the largest step takes; adapters; blocks of the KV "
        "cache that requests use, that only the prefix cache has, and that nobody has",
        (Label("owner", OWNERS),),
    ),
    MetricSpec("memory_budget_bytes", "gauge", "What all owners together may have (`memory_budget`)"),
    MetricSpec(
        "memory_utilisation_ratio",
        "gauge",
        "Share of the budget without cached and free blocks of the KV cache, 0 to 1",
    ),
    MetricSpec("kv_cache_target_bytes", "gauge", "The KV cache's size whenever there is memory for it"),
    MetricSpec(
        "kv_cache_wanted_bytes",
        "gauge",
        "KV cache that requests use, and that those which wait would use now: more than there is means that they wait "
        "for memory",
    ),
    MetricSpec("kv_cache_resizes_total", "counter", "Times that the KV cache grew or shrank while requests ran"),
    MetricSpec(
        "memory_reclaimed_bytes_total",
        "counter",
        "Memory that was taken back because it was short, by what gave it, in the order in which it is asked: "
        "free_blocks of the KV cache, idle_adapters, pool_tail, for which requests were preempted",
        (Label("stage", STAGES),),
    ),
    MetricSpec("kv_slots_unused", "gauge", "Fragmentation: token slots of used blocks that hold no token"),
    MetricSpec("prefix_cache_queries_total", "counter", "Prompt tokens looked up in the prefix cache"),
    MetricSpec("prefix_cache_hits_total", "counter", "Prompt tokens that the prefix cache had"),
    MetricSpec("prefix_cache_evictions_total", "counter", "Cached blocks given away for other content"),
    MetricSpec("speculative_tokens_drafted_total", "counter", "Tokens guessed by speculative decoding"),
    MetricSpec("speculative_tokens_accepted_total", "counter", "Guessed tokens that were right"),
    MetricSpec("adapters_loaded", "gauge", "LoRA adapters that requests can have"),
    MetricSpec(
        "adapter_changes_total",
        "counter",
        "Loads and unloads of LoRA adapters by the engine, also those after a restart; failed: not loaded",
        (Label("change", ADAPTER_CHANGES),),
    ),
    MetricSpec(
        "spans_exported_total", "counter", "Spans of requests without the gateway that were handed to `otlp_endpoint`"
    ),
    MetricSpec(
        "spans_dropped_total", "counter", "Such spans that were not exported, by reason", (Label("reason", DROPS),)
    ),
)


def samples(bridge: Bridge) -> Samples:
    yield from heartbeat()
    stats, trouble, is_up = bridge.engine_stats, bridge.trouble, bridge.engine_up
    single: dict[str, float] = {
        "engine_up": int(is_up),
        "healthy": int(not trouble),
        "engine_restarts_total": bridge.engine_restarts,
        "engine_restart_timestamp_seconds": bridge.engine_restarted_at,
        "requests_active": bridge.active,
        "requests_running": stats.running,
        "batch_places": bridge.batch_places,
        "batch_places_allowed": stats.may_run,
        "requests_waiting": stats.waiting,
        "engine_steps_total": stats.steps,
        "prompt_tokens_total": stats.prompt_tokens,
        "generated_tokens_total": stats.generated_tokens,
        "preemptions_total": stats.preemptions,
        "step_tokens": stats.step_tokens,
        "steps_out_of_memory_total": stats.steps_out_of_memory,
        "kv_blocks": stats.blocks_total,
        "kv_blocks_free": stats.blocks_free,
        "kv_blocks_cached": stats.blocks_cached,
        "kv_usage_ratio": stats.kv_usage,
        "memory_budget_bytes": stats.memory.budget,
        "memory_utilisation_ratio": stats.memory.utilisation,
        "kv_cache_target_bytes": stats.memory.kv_target,
        "kv_cache_wanted_bytes": stats.memory.kv_wanted,
        "kv_cache_resizes_total": stats.cache_resizes,
        "kv_slots_unused": stats.slots_unused,
        "prefix_cache_queries_total": stats.prefix_queries,
        "prefix_cache_hits_total": stats.prefix_hits,
        "prefix_cache_evictions_total": stats.prefix_evictions,
        "speculative_tokens_drafted_total": stats.tokens_drafted,
        "speculative_tokens_accepted_total": stats.tokens_accepted,
        "adapters_loaded": sum(adapter.state == "loaded" for adapter in bridge.adapters),
    }
    for name, value in single.items():
        yield name, "", value
    for change in ADAPTER_CHANGES:
        yield "adapter_changes_total", change, bridge.adapter_counts[change]
    found = _cause(trouble, is_up)
    for cause in UNHEALTHY:
        yield "unhealthy", cause, int(cause == found)
    for reason, count in bridge.request_stats.read_finished().items():
        yield "requests_finished_total", reason, count
    for target, count in bridge.request_stats.read_within().items():
        yield "requests_within_targets_total", target, count
    yield "requests_refused_early_total", "timeout", stats.refused_by_timeout
    yield "requests_refused_early_total", "ttft_target", stats.refused_by_target
    for owner in OWNERS:
        yield "memory_bytes", owner, getattr(stats.memory, owner)
    for stage in STAGES:
        yield "memory_reclaimed_bytes_total", stage, stats.reclaimed.get(stage, 0)
    for phase in STEP_PHASES:
        yield "step_seconds_total", phase, getattr(stats, f"{phase}_seconds")
    if bridge.traces:
        spans = bridge.traces.read_spans()
        yield "spans_exported_total", "", spans[EXPORTED]
        for reason in DROPS:
            yield "spans_dropped_total", reason, spans[reason]
    for name, histogram in bridge.request_stats.read_histograms().items():
        yield from _series(name, histogram)


def _cause(trouble: str, is_up: bool) -> str:
    """One of UNHEALTHY; empty if there is no trouble."""
    if not trouble:
        return ""
    if trouble == DRAINING:
        return "draining"
    if trouble.startswith(STUCK):
        return "stuck"
    return "engine_silent" if is_up else "engine_down"


def _series(name: str, histogram: Histogram) -> Samples:
    """From the widest bucket down: a scrape between two of our calls still finds none above a wider one."""
    cumulative = list(itertools.accumulate(histogram.counts))
    yield f"{name}_count", "", cumulative[-1]
    yield f"{name}_sum", "", histogram.total
    yield f"{name}_bucket", "+Inf", cumulative[-1]
    for bound, count in reversed(list(zip(histogram.bounds, cumulative, strict=False))):
        yield f"{name}_bucket", f"{bound:g}", count
