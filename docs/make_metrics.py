"""Writes docs/metrics.md from the catalogue of metrics: `python docs/make_metrics.py`."""

from __future__ import annotations

from pathlib import Path

from tidewright.metrics import MetricSpec
from tidewright_gateway.metrics.catalogue import CATALOGUE, FALLBACK_PREFIX

PAGE = Path(__file__).with_name("metrics.md")

HEAD = """# Metrics

Made from the catalogue in `tidewright_gateway/metrics/catalogue.py` by `python docs/make_metrics.py`.

| endpoint | who measures | prefix |
|---|---|---|
| the gateway's `/metrics` (port 8080, `--gateway-port`), for keys with the role admin | the gateway | `tidewright_gateway_`, `process_` |
| Triton's `/metrics` (port 8002, `--metrics-port`) | engine and bridge | `tidewright_` |
| | the same of the model `fallback`, with `--fallback` | `tidewright_fallback_` |
| | failsafe | `tidewright_failsafe_` |
| | Triton itself | `nv_` |

```bash
curl -s http://127.0.0.1:8080/metrics | grep tidewright_gateway_request_outcomes_total
curl -s http://127.0.0.1:8002/metrics | grep tidewright_kv_usage_ratio
```

`tidewright top` shows the most important ones live in a terminal (`--once` prints them for a script or a ticket).

Where one Triton serves [several models](serving.md#several-models), the series of engines beside the first have the label
`model` as well, and the gateway's view of a replica for such a model has `replica="HOST:PORT/NAME"`.

A counter never falls, except when its process is started again. A label shown without values takes any. Values of labels
are bounded: paths are those of routes, error codes those of [serving.md](serving.md), and of the API keys the
`busiest_keys` busiest have series of their own; a key that falls behind loses its series, and the sum `_other` takes on.
With several workers (`workers`), the gateway's metrics are those of all, `process_` is left out, and the busiest keys are
chosen only until each worker has shown four times `busiest_keys`: series of several processes can't be removed.
"""

SECTIONS = {
    "tidewright_gateway_": ("Gateway", ""),
    "process_": ("Process of the gateway", ""),
    "tidewright_": (
        "Engine and bridge",
        """They are copied into Triton's metrics four times a second; the engine's own come with its heartbeat
(`heartbeat_interval`, every 0.2 s), so they lag by up to 0.45 s. When the engine is started again its counters go on.
What an engine did after its last heartbeat and before its death is not counted.

A histogram `x` is the usual three series, `x_bucket{le="…"}` (cumulative, up to `+Inf`), `x_sum` and `x_count`, and
`histogram_quantile` works on them. Triton's metric calls take one value each, too costly for one a token, so the bridge
adds up and the series are counters: their `# TYPE` line says `counter`, and in a scrape that falls between two calls
`_sum` may be ahead of or behind `_count` by a refresh.

A request that never got a token (refused, cancelled or timed out while it waited) is in none of the histograms, so under
overload look at `requests_finished_total` and `requests_waiting` too. All latencies are the bridge's: from Triton's call to
it to the response handed to Triton, without the network and Triton's own queue.""",
    ),
    "tidewright_failsafe_": ("Failsafe", "How it decides is in [resilience.md](resilience.md)."),
    "nv_": (
        "Triton",
        "On a machine without a GPU, times in microseconds; `reason` is `CANCELED`, `REJECTED`, `BACKEND` or `OTHER`. "
        "Triton's own\ndocumentation has the rest.",
    ),
}

TAIL = """
## Queries

```promql
# share of requests that failed or were refused for the load, over 5 minutes
sum(rate(tidewright_gateway_request_outcomes_total{outcome=~"failed|overloaded"}[5m]))
  / sum(rate(tidewright_gateway_request_outcomes_total[5m]))

# p99 time to first token over 5 minutes
histogram_quantile(0.99, sum by (le) (rate(tidewright_gateway_time_to_first_token_seconds_bucket[5m])))

# tokens a second by API key
sum by (key_id) (rate(tidewright_gateway_key_tokens_total[5m]))

# share of prompt tokens that the prefix cache had
rate(tidewright_prefix_cache_hits_total[5m]) / rate(tidewright_prefix_cache_queries_total[5m])

# cores' worth of time in each part of the step
sum by (phase) (rate(tidewright_step_seconds_total[5m]))

# drafts of speculative decoding that were accepted
rate(tidewright_speculative_tokens_accepted_total[5m]) / rate(tidewright_speculative_tokens_drafted_total[5m])
```
"""


def page() -> str:
    parts = [HEAD]
    for prefix, specs in CATALOGUE.items():
        if prefix == FALLBACK_PREFIX:  # the same as the engine's
            continue
        title, text = SECTIONS[prefix]
        parts.append(f"\n## {title}\n\n" + (f"{text}\n\n" if text else "") + _table(prefix, specs))
    return "".join([*parts, TAIL])


def _table(prefix: str, specs: tuple[MetricSpec, ...]) -> str:
    rows = ["| metric | type | labels | meaning |\n|---|---|---|---|\n"]
    rows += [f"| `{prefix}{spec.name}` | {spec.kind} | {_labels(spec)} | {spec.meaning} |\n" for spec in specs]
    return "".join(rows)


def _labels(spec: MetricSpec) -> str:
    return "; ".join(
        f"`{label.name}`" + (": " + ", ".join(f"`{value}`" for value in label.values) if label.values else "")
        for label in spec.labels
    )


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
