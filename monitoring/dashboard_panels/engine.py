"""What the engines do."""

from __future__ import annotations

from dashboard_panels.shapes import EACH_ENGINE, FULL, PERCENTILES, Dashboard, Panel, Query, Row

NOT_SENDING = ', phase!="send"'


def of_engine(metric: str, selector: str = "") -> str:
    return f'tidewright_{metric}{{instance=~"$instance"{selector}}}'


def each(expr: str, name: str = "") -> Query:
    return Query(expr, f"{EACH_ENGINE} {name}".rstrip())


def percentiles(histogram: str) -> tuple[Query, ...]:
    buckets = f"sum by (model, le) (rate({of_engine(f'{histogram}_bucket')}[1m]))"
    return tuple(Query(f"histogram_quantile({q}, {buckets})", f"{{{{model}}}} {name}") for q, name in PERCENTILES)


ENGINE = Dashboard(
    "engine",
    "Engine",
    "What the engines do: batch, KV cache, where a step's time goes, speculation, restarts.",
    (
        Row(
            "State",
            (
                Panel("Healthy", "none", (each(of_engine("healthy")),), is_stat=True),
                Panel(
                    "Restarts, 1 hour",
                    "none",
                    (each(f"increase({of_engine('engine_restarts_total')}[1h])"),),
                    thresholds=((0.5, "yellow"), (2.5, "red")),
                    is_stat=True,
                ),
                Panel(
                    "Heartbeat's age",
                    "s",
                    (each(f"time() - {of_engine('heartbeat_timestamp_seconds')}"),),
                    "Of the model's Python process; Triton does not notice when it dies",
                    ((4, "red"),),
                    is_stat=True,
                ),
                Panel(
                    "Tokens a second",
                    "short",
                    (each(f"rate({of_engine('generated_tokens_total')}[1m])"),),
                    is_stat=True,
                ),
            ),
        ),
        Row(
            "Batch",
            (
                Panel(
                    "Sequences",
                    "none",
                    (
                        each(of_engine("batch_places"), "places"),
                        each(of_engine("batch_places_allowed"), "places allowed"),
                        each(of_engine("requests_running"), "running"),
                        each(of_engine("requests_waiting"), "waiting"),
                    ),
                ),
                Panel(
                    "Tokens a step",
                    "short",
                    (
                        each(
                            f"rate({of_engine('generated_tokens_total')}[1m])"
                            f" / (rate({of_engine('engine_steps_total')}[1m]) > 0)"
                        ),
                    ),
                    "Output tokens; about the number of sequences in the batch",
                ),
                Panel(
                    "Requests that ended, by reason",
                    "reqps",
                    (
                        Query(
                            f"sum by (model, reason) (rate({of_engine('requests_finished_total')}[1m]))",
                            "{{model}} {{reason}}",
                        ),
                    ),
                    is_stacked=True,
                ),
            ),
        ),
        Row(
            "Steps",
            (
                Panel(
                    "Time by part of the step",
                    "percentunit",
                    (
                        Query(
                            f"sum by (model, phase) (rate({of_engine('step_seconds_total')}[1m]))",
                            "{{model}} {{phase}}",
                        ),
                    ),
                    "Seconds of each second; `send` has a thread of its own",
                    is_stacked=True,
                    is_share=False,
                ),
                Panel(
                    "Duration of a step, mean",
                    "s",
                    (
                        each(
                            f"sum by (instance, model) (rate({of_engine('step_seconds_total', NOT_SENDING)}[1m]))"
                            f" / (sum by (instance, model) (rate({of_engine('engine_steps_total')}[1m])) > 0)"
                        ),
                    ),
                ),
                Panel(
                    "Between two tokens",
                    "s",
                    percentiles("inter_token_latency_seconds"),
                ),
                Panel(
                    "Requests within latency targets",
                    "reqps",
                    (
                        Query(
                            f"sum by (model, target) (rate({of_engine('requests_within_targets_total')}[1m]))",
                            "{{model}} {{target}}",
                        ),
                        Query(
                            f"sum by (model, limit) (rate({of_engine('requests_refused_early_total')}[1m]))",
                            "{{model}} refused early: {{limit}}",
                        ),
                    ),
                ),
                Panel(
                    "Wait for the first step",
                    "s",
                    percentiles("request_queue_seconds"),
                ),
            ),
        ),
        Row(
            "KV cache",
            (
                Panel("In use", "percentunit", (each(of_engine("kv_usage_ratio")),), thresholds=FULL),
                Panel(
                    "Blocks",
                    "none",
                    (
                        each(of_engine("kv_blocks"), "all"),
                        each(of_engine("kv_blocks_free"), "free"),
                        each(of_engine("kv_blocks_cached"), "free, content known"),
                    ),
                ),
                Panel("Preemptions", "short", (each(f"rate({of_engine('preemptions_total')}[1m])"),), "A second"),
                Panel(
                    "Tokens that a step may have",
                    "none",
                    (each(of_engine("step_tokens")),),
                    "Less than max_batched_tokens: a step ran out of memory",
                ),
                Panel(
                    "Steps out of memory",
                    "short",
                    (each(f"increase({of_engine('steps_out_of_memory_total')}[5m])"),),
                    "In 5 minutes",
                ),
                Panel("Unused slots of used blocks", "none", (each(of_engine("kv_slots_unused")),), "Fragmentation"),
            ),
        ),
        Row(
            "Memory",
            (
                Panel(
                    "By owner",
                    "bytes",
                    (
                        Query(f"sum by (model, owner) ({of_engine('memory_bytes')})", "{{model}} {{owner}}"),
                        Query(f"sum by (model) ({of_engine('memory_budget_bytes')})", "{{model}} budget"),
                        Query(f"sum by (model) ({of_engine('kv_cache_target_bytes')})", "{{model}} KV cache, target"),
                        Query(f"sum by (model) ({of_engine('kv_cache_wanted_bytes')})", "{{model}} KV cache, needed"),
                    ),
                    "Of one rank of each replica",
                ),
                Panel("Budget in use", "percentunit", (each(of_engine("memory_utilisation_ratio")),)),
                Panel(
                    "Reclaimed",
                    "bytes",
                    (
                        Query(
                            f"sum by (model, stage) (increase({of_engine('memory_reclaimed_bytes_total')}[5m]))",
                            "{{model}} {{stage}}",
                        ),
                    ),
                    "In 5 minutes, because memory was short. pool_tail: requests were preempted for it",
                ),
                Panel(
                    "KV cache resized",
                    "short",
                    (each(f"increase({of_engine('kv_cache_resizes_total')}[5m])"),),
                    "In 5 minutes",
                ),
            ),
        ),
        Row(
            "Prefix cache and speculation",
            (
                Panel(
                    "Prompt tokens that the prefix cache had",
                    "percentunit",
                    (each('instance:tidewright_prefix_cache_hits:ratio_rate5m{instance=~"$instance"}'),),
                ),
                Panel(
                    "Evictions",
                    "short",
                    (each(f"rate({of_engine('prefix_cache_evictions_total')}[1m])"),),
                    "Blocks a second",
                ),
                Panel(
                    "Drafted tokens that were right",
                    "percentunit",
                    (each('instance:tidewright_speculative_tokens_accepted:ratio_rate5m{instance=~"$instance"}'),),
                ),
                Panel(
                    "Drafted tokens",
                    "short",
                    (
                        each(f"rate({of_engine('speculative_tokens_drafted_total')}[1m])", "drafted"),
                        each(f"rate({of_engine('speculative_tokens_accepted_total')}[1m])", "accepted"),
                    ),
                ),
            ),
        ),
        Row(
            "Restarts, failsafe and Triton",
            (
                Panel("Restarts", "none", (each(f"changes({of_engine('engine_restarts_total')}[5m])"),)),
                Panel(
                    "Served by",
                    "reqps",
                    (Query(f"sum by (by) (rate({of_engine('failsafe_requests_served_total')}[1m]))", "{{by}}"),),
                    "Requests through the model failsafe",
                    is_stacked=True,
                ),
                Panel(
                    "To the fallback, by cause",
                    "reqps",
                    (Query(f"sum by (reason) (rate({of_engine('failsafe_fallbacks_total')}[1m])) > 0", "{{reason}}"),),
                    is_stacked=True,
                ),
                Panel(
                    "Triton: failures by reason",
                    "reqps",
                    (
                        Query(
                            "sum by (model, reason) "
                            '(rate(nv_inference_request_failure{instance=~"$instance"}[1m])) > 0',
                            "{{model}} {{reason}}",
                        ),
                    ),
                    is_stacked=True,
                ),
            ),
        ),
    ),
    instances_of="tidewright_engine_up",
)
