"""Replicas as the gateways see them, and the gateways themselves."""

from __future__ import annotations

from dashboard_panels.shapes import Dashboard, G, Panel, Query, Row, quantiles

REPLICAS = Dashboard(
    "replicas",
    "Replicas and gateway",
    "Who serves: replicas as the gateways see them, retries and failover, and the gateways' own health.",
    (
        Row(
            "Replicas",
            (
                Panel("Takes requests", "none", (Query(f"min by (replica) ({G}replica_up)", "{{replica}}"),)),
                Panel(
                    "Breaker not closed",
                    "none",
                    (
                        Query(
                            f'max by (replica, state) ({G}breaker_state{{state!="closed"}})',
                            "{{replica}} {{state}}",
                        ),
                    ),
                ),
                Panel("In flight", "none", (Query(f"sum by (replica) ({G}replica_in_flight)", "{{replica}}"),)),
                Panel(
                    "Attempts",
                    "reqps",
                    (Query(f"sum by (replica, model) (rate({G}attempts_total[1m]))", "{{replica}} {{model}}"),),
                ),
            ),
        ),
        Row(
            "Failures",
            (
                Panel(
                    "Failed attempts",
                    "reqps",
                    (
                        Query(
                            f"sum by (replica, outcome) (rate({G}attempt_failures_total[1m])) > 0",
                            "{{replica}} {{outcome}}",
                        ),
                    ),
                    is_stacked=True,
                ),
                Panel(
                    "Retries and moved streams",
                    "reqps",
                    (
                        Query(f"sum(rate({G}retries_total[1m]))", "retries"),
                        Query(f"sum(rate({G}streams_moved_total[1m]))", "streams moved"),
                        Query(f"sum by (reason) (rate({G}retries_refused_total[1m])) > 0", "refused: {{reason}}"),
                    ),
                ),
                Panel("Retry budget", "none", (Query(f"{G}retry_budget"),)),
                Panel(
                    "Probe tokens that failed",
                    "reqps",
                    (
                        Query(
                            "sum by (replica, outcome) "
                            f'(rate({G}generation_probes_total{{outcome!="success"}}[1m])) > 0',
                            "{{replica}} {{outcome}}",
                        ),
                    ),
                ),
            ),
        ),
        Row(
            "Gateways",
            (
                Panel("Time that the gateway adds", "s", quantiles(f"{G}overhead_seconds")),
                Panel("Event loop's lag", "s", quantiles(f"{G}event_loop_lag_seconds", window="1m")),
                Panel(
                    "CPU",
                    "percentunit",
                    (Query('rate(process_cpu_seconds_total{job="gateway"}[1m])'),),
                    "Cores; not with several workers",
                    is_share=False,
                ),
                Panel("Memory", "bytes", (Query('process_resident_memory_bytes{job="gateway"}'),)),
            ),
        ),
        Row(
            "Connections",
            (
                Panel("Open", "none", (Query(f"{G}connections_open"),)),
                Panel("Requests active", "none", (Query(f"{G}requests_active"),)),
                Panel(
                    "WebSocket",
                    "none",
                    (
                        Query(f"{G}websocket_connections", "{{instance}} connections"),
                        Query(f"{G}websocket_stalled", "{{instance}} without credits"),
                        Query(f"{G}websocket_credits", "{{instance}} credits"),
                    ),
                ),
                Panel("WebSocket output unsent", "bytes", (Query(f"{G}websocket_unsent_bytes"),)),
            ),
        ),
        Row(
            "Stores, discovery, logs, traces, certificates",
            (
                Panel("Stores lost", "none", (Query(f"sum by (store) ({G}store_lost)", "{{store}}"),)),
                Panel("Failed discoveries", "none", (Query(f"increase({G}discovery_failures_total[5m])"),)),
                Panel(
                    "Log lines and spans dropped",
                    "none",
                    (
                        Query(f"increase({G}log_lines_dropped_total[5m])", "{{instance}} log lines"),
                        Query(f"sum by (instance) (increase({G}spans_dropped_total[5m]))", "{{instance}} spans"),
                        Query("sum by (instance) (increase(tidewright_spans_dropped_total[5m]))", "{{instance}} spans"),
                    ),
                ),
                Panel(
                    "Spans exported",
                    "short",
                    (Query(f"sum by (instance) (rate({G}spans_exported_total[1m]))"),),
                    "A second",
                ),
                Panel(
                    "Expires in",
                    "s",
                    (
                        Query(f"({G}certificate_expiry_timestamp_seconds > 0) - time()", "{{instance}} certificate"),
                        Query(f"({G}key_expiry_timestamp_seconds > 0) - time()", "{{instance}} next API key"),
                    ),
                ),
            ),
        ),
    ),
)
