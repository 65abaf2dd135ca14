"""What the engines do."""

from __future__ import annotations

from dashboard_panels.shapes import FULL, PERCENTILES, Dashboard, Panel, Query, Row

NOT_SENDING = ', phase!="send"'


def of_engine(metric: str, selector: str = "") -> str:
    return f'tidewright_{metric}{{instance=~"$instance"{selector}}}'


ENGINE = Dashboard(
    "engine",
    "Engine",
    "What the engines do: batch, KV cache, where a step's time goes, speculation, restarts.",
    (
        Row(
            "State",
            (
                Panel("Healthy", "none", (Query(of_engine("healthy")),), is_stat=True),
                Panel(
                    "Restarts, 1 hour",
                    "none",
                    (Query(f"increase({of_engine('engine_restarts_total')}[1h])"),),
                    thresholds=((0.5, "yellow"), (2.5, "red")),
                    is_stat=True,
                ),
                Panel(
                    "Heartbeat's age",
                    "s",
                    (Query(f"time() - {of_engine('heartbeat_timestamp_seconds')}"),),
                    "Of the model's Python process; Triton does not notice when it dies",
                    ((4, "red"),),
                    is_stat=True,
                ),
                Panel(
                    "Tokens a second",
                    "short",
                    (Query(f"rate({of_engine('generated_tokens_total')}[1m])"),),
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
                        Query(of_engine("batch_places"), "{{instance}} places"),
                        Query(of_engine("batch_places_allowed"), "{{instance}} places allowed"),
                        Query(of_engine("requests_running"), "{{instance}} running"),
                        Query(of_engine("requests_waiting"), "{{instance}} waiting"),
                    ),
                ),
                Panel(
                    "Tokens a step",
                    "short",
                    (
                        Query(
                            f"rate({of_engine('generated_tokens_total')}[1m])"
                            f" / (rate({of_engine('engine_steps_total')}[1m]) > 0)"
                        ),
                    ),
                    "Output tokens; about the number of sequences in the batch",
                ),
                Panel(
                    "Requests that ended, by reason",
                    "reqps",
                    (Query(f"sum by (reason) (rate({of_engine('requests_finished_total')}[1m]))", "{{reason}}"),),
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
                    (Query(f"sum by (phase) (rate({of_engine('step_seconds_total')}[1m]))", "{{phase}}"),),
                    "Seconds of each second; `send` has a thread of its own",
                    is_stacked=True,
                    is_share=False,
                ),
                Panel(
                    "Duration of a step, mean",
                    "s",
                    (
                        Query(
                            f"sum by (instance) (rate({of_engine('step_seconds_total', NOT_SENDING)}[1m]))"
                            f" / (sum by (instance) (rate({of_engine('engine_steps_total')}[1m])) > 0)"
                        ),
                    ),
                ),
                Panel(
                    "Between two tokens",
                    "s",
                    tuple(
                        Query(
                            f"histogram_quantile({q}, sum by (le) "
                            f"(rate({of_engine('inter_token_latency_seconds_bucket')}[1m])))",
                            name,
                        )
                        for q, name in PERCENTILES
                    ),
                ),
                Panel(
                    "Requests within latency targets",
                    "reqps",
                    (
                        Query(
                            f"sum by (target) (rate({of_engine('requests_within_targets_total')}[1m]))",
                            "{{target}}",
                        ),
                        Query(
                            f"sum by (limit) (rate({of_engine('requests_refused_early_total')}[1m]))",
                            "refused early: {{limit}}",
                        ),
                    ),
                ),
                Panel(
                    "Wait for the first step",
                    "s",
                    tuple(
                        Query(
                            f"histogram_quantile({q}, sum by (le) "
                            f"(rate({of_engine('request_queue_seconds_bucket')}[1m])))",
                            name,
                        )
                        for q, name in PERCENTILES
                    ),
                ),
            ),
        ),
        Row(
            "KV cache",
            (
                Panel("In use", "percentunit", (Query(of_engine("kv_usage_ratio")),), thresholds=FULL),
                Panel(
                    "Blocks",
                    "none",
                    (
                        Query(of_engine("kv_blocks"), "{{instance}} all"),
                        Query(of_engine("kv_blocks_free"), "{{instance}} free"),
                        Query(of_engine("kv_blocks_cached"), "{{instance}} free, content known"),
                    ),
                ),
                Panel("Preemptions", "short", (Query(f"rate({of_engine('preemptions_total')}[1m])"),), "A second"),
                Panel(
                    "Tokens that a step may have",
                    "none",
                    (Query(of_engine("step_tokens")),),
                    "Less than max_batched_tokens: a step ran out of memory",
                ),
                Panel(
                    "Steps out of memory",
                    "short",
                    (Query(f"increase({of_engine('steps_out_of_memory_total')}[5m])"),),
                    "In 5 minutes",
                ),
                Panel("Unused slots of used blocks", "none", (Query(of_engine("kv_slots_unused")),), "Fragmentation"),
            ),
        ),
        Row(
            "Memory",
            (
                Panel(
                    "By owner",
                    "bytes",
                    (
                        Query(f"sum by (owner) ({of_engine('memory_bytes')})", "{{owner}}"),
                        Query(f"sum({of_engine('memory_budget_bytes')})", "budget"),
                        Query(f"sum({of_engine('kv_cache_target_bytes')})", "KV cache, wanted"),
                    ),
                    "Of one rank of each replica",
                ),
                Panel("Budget in use", "percentunit", (Query(of_engine("memory_utilisation_ratio")),)),
                Panel(
                    "Reclaimed",
                    "bytes",
                    (
                        Query(
                            f"sum by (stage) (increase({of_engine('memory_reclaimed_bytes_total')}[5m]))", "{{stage}}"
                        ),
                    ),
                    "In 5 minutes, because memory was short. pool_tail: requests were preempted for it",
                ),
                Panel(
                    "KV cache resized",
                    "short",
                    (Query(f"increase({of_engine('kv_cache_resizes_total')}[5m])"),),
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
                    (Query('instance:tidewright_prefix_cache_hits:ratio_rate5m{instance=~"$instance"}'),),
                ),
                Panel(
                    "Evictions",
                    "short",
                    (Query(f"rate({of_engine('prefix_cache_evictions_total')}[1m])"),),
                    "Blocks a second",
                ),
                Panel(
                    "Drafted tokens that were right",
                    "percentunit",
                    (Query('instance:tidewright_speculative_tokens_accepted:ratio_rate5m{instance=~"$instance"}'),),
                ),
                Panel(
                    "Drafted tokens",
                    "short",
                    (
                        Query(f"rate({of_engine('speculative_tokens_drafted_total')}[1m])", "{{instance}} drafted"),
                        Query(f"rate({of_engine('speculative_tokens_accepted_total')}[1m])", "{{instance}} accepted"),
                    ),
                ),
            ),
        ),
        Row(
            "Restarts, failsafe and Triton",
            (
                Panel("Restarts", "none", (Query(f"changes({of_engine('engine_restarts_total')}[5m])"),)),
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
