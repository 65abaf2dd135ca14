"""API keys, limits, caches."""

from __future__ import annotations

from dashboard_panels.shapes import EACH_ENGINE, Dashboard, G, Panel, Query, Row, quantiles

TENANTS = Dashboard(
    "tenants",
    "Tenants and limits",
    "Who uses how much, and who is refused by which limit. The busiest keys have series of their own.",
    (
        Row(
            "Use",
            (
                Panel(
                    "Requests by key",
                    "reqps",
                    (Query(f"topk(10, sum by (key_id) (rate({G}key_requests_total[1m])))", "{{key_id}}"),),
                ),
                Panel(
                    "Tokens a second by key",
                    "short",
                    (Query(f"topk(10, sum by (key_id) (rate({G}key_tokens_total[1m])))", "{{key_id}}"),),
                ),
                Panel(
                    "Share of the output tokens",
                    "percentunit",
                    (
                        Query(
                            f'sum by (key_id) (rate({G}key_tokens_total{{kind="completion"}}[5m]))'
                            f" / ignoring (key_id) group_left ()"
                            f' (sum(rate({G}key_tokens_total{{kind="completion"}}[5m])) > 0)',
                            "{{key_id}}",
                        ),
                    ),
                    is_stacked=True,
                ),
            ),
        ),
        Row(
            "Refused and failed",
            (
                Panel(
                    "Refused, by limit",
                    "reqps",
                    (Query(f"sum by (limit) (rate({G}refusals_total[1m])) > 0", "{{limit}}"),),
                    is_stacked=True,
                ),
                Panel(
                    "Refused, by key and limit",
                    "reqps",
                    (
                        Query(
                            f"topk(10, sum by (key_id, limit) (rate({G}key_refusals_total[1m])) > 0)",
                            "{{key_id}} {{limit}}",
                        ),
                    ),
                ),
                Panel(
                    "Failed, by key",
                    "reqps",
                    (
                        Query(
                            "topk(10, sum by (key_id) "
                            f'(rate({G}key_requests_total{{outcome=~"failed|overloaded"}}[1m])) > 0)',
                            "{{key_id}}",
                        ),
                    ),
                ),
            ),
        ),
        Row(
            "LoRA adapters",
            (
                Panel(
                    "Requests by adapter",
                    "reqps",
                    (Query(f"topk(10, sum by (adapter) (rate({G}adapter_requests_total[1m])))", "{{adapter}}"),),
                ),
                Panel(
                    "Loaded, by replica",
                    "none",
                    (Query("tidewright_adapters_loaded", EACH_ENGINE),),
                ),
                Panel(
                    "Loads and unloads, 1 hour",
                    "none",
                    (
                        Query(
                            "sum by (model, change) (increase(tidewright_adapter_changes_total[1h]))",
                            "{{model}} {{change}}",
                        ),
                    ),
                ),
            ),
        ),
        Row(
            "Queue",
            (
                Panel(
                    "Queued by class",
                    "none",
                    (Query(f"sum by (class) ({G}queue_length)", "{{class}}"),),
                    is_stacked=True,
                ),
                Panel("Wait by class, p99", "s", (quantiles(f"{G}queue_wait_seconds", "class")[-1],)),
                Panel(
                    "Degradation: what holds the level",
                    "none",
                    (Query(f"max by (signal) ({G}degradation_reason)", "{{signal}}"),),
                ),
                Panel(
                    "Requests without their limits",
                    "reqps",
                    (Query(f"sum(rate({G}limits_unchecked_total[1m]))", "unchecked"),),
                ),
            ),
        ),
        Row(
            "Caches",
            (
                Panel(
                    "Response cache: hits and shared",
                    "percentunit",
                    (
                        Query(
                            f'sum(rate({G}cache_requests_total{{state=~"hit|shared"}}[5m]))'
                            f" / (sum(rate({G}cache_requests_total[5m])) > 0)",
                            "hits",
                        ),
                    ),
                ),
                Panel("Response cache", "bytes", (Query(f"{G}cache_bytes"),)),
                Panel(
                    "Prompt tokens that a prefix cache had",
                    "percentunit",
                    (
                        Query(
                            f"sum(rate({G}cached_tokens_total[5m]))"
                            f' / (sum(rate({G}tokens_total{{kind="prompt"}}[5m])) > 0)',
                            "cached",
                        ),
                    ),
                ),
            ),
        ),
    ),
)
