"""Every metric of gateway, engine, failsafe and Triton. docs/metrics.md is made of it."""

from __future__ import annotations

from tidewright.bridge.metrics import FALLBACK_PREFIX
from tidewright.bridge.metrics import METRICS as ENGINE
from tidewright.failsafe.metrics import FAILSAFE_PREFIX
from tidewright.failsafe.metrics import METRICS as FAILSAFE
from tidewright.metrics import PREFIX, Label, MetricSpec
from tidewright_gateway.metrics.families import GATEWAY, GATEWAY_PREFIX

_MODEL_LABELS = (Label("model"), Label("version"))
TRITON = (
    MetricSpec("inference_request_success", "counter", "Successful requests", _MODEL_LABELS),
    MetricSpec("inference_request_failure", "counter", "Failed requests", (*_MODEL_LABELS, Label("reason"))),
    MetricSpec("inference_count", "counter", "Inferences performed", _MODEL_LABELS),
    MetricSpec("inference_exec_count", "counter", "Executions, each of a batch", _MODEL_LABELS),
    MetricSpec("inference_request_duration_us", "counter", "Time of requests, in microseconds", _MODEL_LABELS),
    MetricSpec("inference_queue_duration_us", "counter", "Time in Triton's queue", _MODEL_LABELS),
    MetricSpec("inference_compute_input_duration_us", "counter", "Time for inputs", _MODEL_LABELS),
    MetricSpec("inference_compute_infer_duration_us", "counter", "Time in the backend", _MODEL_LABELS),
    MetricSpec("inference_compute_output_duration_us", "counter", "Time for outputs", _MODEL_LABELS),
    MetricSpec("inference_pending_request_count", "gauge", "Requests in Triton's queue", _MODEL_LABELS),
    MetricSpec("pinned_memory_pool_total_bytes", "gauge", "Pinned memory"),
    MetricSpec("pinned_memory_pool_used_bytes", "gauge", "Pinned memory in use"),
    MetricSpec("cpu_utilization", "gauge", "CPU of the machine, 0 to 1"),
    MetricSpec("cpu_memory_total_bytes", "gauge", "Memory of the machine"),
    MetricSpec("cpu_memory_used_bytes", "gauge", "Memory of the machine in use"),
)
"""Of Triton itself, prefix nv_, on a machine without a GPU; GPUs add theirs."""

PROCESS = (
    MetricSpec("cpu_seconds_total", "counter", "CPU time of the gateway's process"),
    MetricSpec("resident_memory_bytes", "gauge", "Memory of the gateway's process"),
    MetricSpec("virtual_memory_bytes", "gauge", "Address space of the gateway's process"),
    MetricSpec("start_time_seconds", "gauge", "When the gateway's process began, in Unix time"),
    MetricSpec("open_fds", "gauge", "Open files of the gateway's process"),
    MetricSpec("max_fds", "gauge", "Limit of its open files"),
)
"""Of a gateway with one worker, prefix process_."""

CATALOGUE: dict[str, tuple[MetricSpec, ...]] = {
    GATEWAY_PREFIX: GATEWAY,
    "process_": PROCESS,
    PREFIX: ENGINE,
    FALLBACK_PREFIX: ENGINE,
    FAILSAFE_PREFIX: FAILSAFE,
    "nv_": TRITON,
}
"""All metrics, by the prefix of their names."""
