"""Engine and bridge figures in Triton's own /metrics, refreshed on a timer: a metric call costs up to 90 µs."""

from __future__ import annotations

import threading
from typing import Any

from tidewright.bridge.bridge import Bridge
from tidewright.engine.messages import EngineStats

REFRESH_INTERVAL = 0.25  # seconds

_GAUGES = {
    "engine_up": "1 while an engine process takes requests",
    "requests_active": "Requests in flight in the bridge",
    "requests_running": "Requests in the engine's current batch",
    "requests_waiting": "Requests waiting for a place in the batch",
    "kv_blocks_total": "Blocks of the KV cache",
    "kv_blocks_free": "Blocks of the KV cache that no request uses",
}
_COUNTERS = {
    "engine_restarts_total": "Times that the engine process was started again",
    "engine_steps_total": "Steps of the engine",
    "prompt_tokens_total": "Prompt tokens computed",
    "generated_tokens_total": "Tokens generated",
    "preemptions_total": "Sequences pushed out of the batch for lack of KV blocks",
}
_NO_STATS = EngineStats(0, 0, 0, 0, 0, 0, 0, 0)


class BridgeMetrics:
    """A thread that copies figures into metrics `tidewright_<name>`; `family` is pb_utils.MetricFamily."""

    def __init__(self, bridge: Bridge, family: Any) -> None:
        self._bridge = bridge
        self._families = []  # a metric dies with its family
        self._metrics = {}
        for kind, descriptions in ((family.GAUGE, _GAUGES), (family.COUNTER, _COUNTERS)):
            for name, description in descriptions.items():
                made = family(name=f"tidewright_{name}", description=description, kind=kind)
                self._families.append(made)
                self._metrics[name] = made.Metric(labels={})
        self._last = dict.fromkeys(_COUNTERS, 0)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="metrics", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()
        self._metrics.clear()
        self._families.clear()

    def _loop(self) -> None:
        while not self._stopping.is_set():
            self._refresh()
            self._stopping.wait(REFRESH_INTERVAL)

    def _refresh(self) -> None:
        bridge, stats = self._bridge, self._bridge.stats or _NO_STATS
        gauges = {
            "engine_up": int(bridge.engine_up),
            "requests_active": bridge.active,
            "requests_running": stats.running,
            "requests_waiting": stats.waiting,
            "kv_blocks_total": stats.blocks_total,
            "kv_blocks_free": stats.blocks_free,
        }
        for name, value in gauges.items():
            self._metrics[name].set(value)
        counters = {
            "engine_restarts_total": bridge.engine_restarts,
            "engine_steps_total": stats.steps,
            "prompt_tokens_total": stats.prompt_tokens,
            "generated_tokens_total": stats.generated_tokens,
            "preemptions_total": stats.preemptions,
        }
        for name, value in counters.items():
            # A restarted engine counts from zero again; the metric must not go back.
            increase = value - self._last[name] if value >= self._last[name] else value
            self._last[name] = value
            if increase:
                self._metrics[name].increment(increase)
