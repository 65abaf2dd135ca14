"""What users get."""

from __future__ import annotations

from dashboard_panels.shapes import EACH_ENGINE, FAILING, FULL, Dashboard, G, Panel, Query, Row, quantiles

SERVICE = Dashboard(
    "service",
    "Service",
    "What users get: is the objective of 99.9 % met, how fast are answers, how full is the service?",
    (
        Row(
            "Now",
            (
                Panel(
                    "Failed, 5 minutes",
                    "percentunit",
                    (Query("job:tidewright_gateway_failures:ratio_rate5m", "failed"),),
                    "5xx, broken streams, and refusals for the load; not errors and limits of the caller",
                    FAILING,
                    is_stat=True,
                ),
                Panel(
                    "Error budget left, 3 days",
                    "percentunit",
                    (Query("1 - job:tidewright_gateway_failures:ratio_rate3d / 0.001", "left"),),
                    "Of 0.1 %. Negative: more requests failed than may",
                    is_stat=True,
                ),
                Panel(
                    "Requests",
                    "reqps",
                    (Query("sum(job_outcome:tidewright_gateway_requests:rate1m)", "all"),),
                    is_stat=True,
                ),
                Panel(
                    "Output tokens",
                    "short",
                    (Query('sum(job_kind:tidewright_gateway_tokens:rate1m{kind="completion"})', "a second"),),
                    is_stat=True,
                ),
                Panel("Replicas usable", "none", (Query(f"min({G}replicas_usable)", "usable"),), is_stat=True),
                Panel(
                    "Alerts",
                    "none",
                    (Query('count(ALERTS{alertstate="firing"}) or vector(0)', "firing"),),
                    "Firing now",
                    ((1, "red"),),
                    is_stat=True,
                ),
            ),
        ),
        Row(
            "Objective",
            (
                Panel(
                    "Share of requests that failed, by window",
                    "percentunit",
                    tuple(
                        Query(f"job:tidewright_gateway_failures:ratio_rate{window}", window)
                        for window in ("5m", "1h", "6h", "3d")
                    ),
                    "The windows of the burn-rate alerts; the line is the objective",
                    ((0.001, "red"),),
                    is_share=False,
                ),
                Panel(
                    "Requests by outcome",
                    "reqps",
                    (Query("sum by (outcome) (job_outcome:tidewright_gateway_requests:rate1m)", "{{outcome}}"),),
                    is_stacked=True,
                ),
                Panel(
                    "Errors by code",
                    "reqps",
                    (Query(f'sum by (code) (rate({G}requests_total{{code!=""}}[1m])) > 0', "{{code}}"),),
                    "docs/troubleshooting.md has a row for each",
                    is_stacked=True,
                ),
            ),
        ),
        Row(
            "Latency",
            (
                Panel("Time to first token", "s", quantiles(f"{G}time_to_first_token_seconds")),
                Panel("Time per output token", "s", quantiles(f"{G}time_per_output_token_seconds")),
                Panel(
                    "Duration by path, p99",
                    "s",
                    (
                        Query(
                            "histogram_quantile(0.99, sum by (path, le) "
                            f"(rate({G}request_duration_seconds_bucket[5m])))",
                            "{{path}}",
                        ),
                    ),
                ),
            ),
        ),
        Row(
            "Saturation",
            (
                Panel(
                    "Generations: running, queued, places",
                    "none",
                    (
                        Query(f"sum({G}generations_running)", "running"),
                        Query(f"sum({G}queue_length)", "queued"),
                        Query(f"sum({G}queue_places)", "places"),
                    ),
                ),
                Panel("Wait in the queue", "s", quantiles(f"{G}queue_wait_seconds")),
                Panel(
                    "KV cache in use",
                    "percentunit",
                    (Query("tidewright_kv_usage_ratio", EACH_ENGINE),),
                    thresholds=FULL,
                ),
                Panel(
                    "Degradation level",
                    "none",
                    (Query(f"{G}degradation_level", "level"), Query(f"{G}smaller_variant", "smaller variant")),
                    "0 all features, 1 short answers, 2 fallback only, 3 shed; 1 while a smaller variant answers",
                ),
            ),
        ),
        Row(
            "Traffic",
            (
                Panel(
                    "Tokens a second",
                    "short",
                    (Query("sum by (kind) (job_kind:tidewright_gateway_tokens:rate1m)", "{{kind}}"),),
                ),
                Panel(
                    "Streams open", "none", (Query(f"sum by (kind) ({G}streams_open)", "{{kind}}"),), is_stacked=True
                ),
                Panel(
                    "Response cache",
                    "reqps",
                    (Query(f"sum by (state) (rate({G}cache_requests_total[1m]))", "{{state}}"),),
                    is_stacked=True,
                ),
            ),
        ),
    ),
)
