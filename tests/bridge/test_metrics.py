"""What goes into Triton's metrics, and the table of them in the docs."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

from helpers.metric_family import Family
from tidewright.bridge.metrics import METRICS, UNHEALTHY, samples
from tidewright.bridge.stats import CumulativeStats, RequestStats
from tidewright.bridge.traces import EXPORTED
from tidewright.engine.messages import EngineStats
from tidewright.memory.account import MemoryAccount
from tidewright.metrics import PREFIX, MetricsMirror
from tidewright.schema import DRAINING, STUCK


@pytest.fixture
def bridge() -> Any:
    cumulative_stats = CumulativeStats()

    class Bridge(SimpleNamespace):
        @property
        def engine_stats(self) -> EngineStats:
            return cumulative_stats.read()

    return Bridge(
        engine_up=True,
        trouble="",
        engine_restarts=0,
        engine_restarted_at=0.0,
        batch_places=93,
        active=0,
        request_stats=RequestStats(),
        traces=None,
        adapters=[],
        adapter_counts=Counter(),
        cumulative_stats=cumulative_stats,
    )


@pytest.fixture
def family() -> type[Family]:
    return Family.fresh()


def mirror(bridge: Any, family: type[Family]) -> MetricsMirror:
    return MetricsMirror(METRICS, lambda: samples(bridge), family)


def test_every_sample_arrives_under_its_name(bridge: Any, family: type[Family]) -> None:
    fields = EngineStats.__struct_fields__
    stats: dict[str, Any] = dict(zip(fields, range(101, 200), strict=False))
    kv_cache = {"kv_used": 200, "kv_cached": 30, "kv_free": 40, "block": 10, "kv_target": 400, "kv_wanted": 500}
    stats["memory"] = MemoryAccount(1000, 300, 100, 50, **kv_cache)
    stats["reclaimed"] = {"pool_tail": 60}
    bridge.cumulative_stats.update(EngineStats(**stats))
    bridge.engine_restarts, bridge.active, bridge.engine_restarted_at = 90, 91, 92
    for seconds in (0.004, 0.04, 500.0):
        bridge.request_stats.first_token(0.0, seconds)
    bridge.request_stats.finished("length", 0.3)
    bridge.request_stats.finished("cancelled")
    bridge.request_stats.further_tokens(0.01, 7)
    for ttft, tpot in ((True, True), (True, False), (False, False), (False, True), (False, True)):
        bridge.request_stats.within(ttft, tpot)
    mirror(bridge, family).refresh()
    series = family.series
    expected = {
        "engine_up": 1,
        "healthy": 1,
        "engine_restarts_total": 90,
        "engine_restart_timestamp_seconds": 92,
        "requests_active": 91,
        "requests_running": stats["running"],
        "batch_places": 93,
        "batch_places_allowed": stats["may_run"],
        "requests_waiting": stats["waiting"],
        "requests_refused_early_total{limit=timeout}": stats["refused_by_timeout"],
        "requests_refused_early_total{limit=ttft_target}": stats["refused_by_target"],
        "requests_within_targets_total{target=ttft}": 2,
        "requests_within_targets_total{target=tpot}": 3,
        "requests_within_targets_total{target=both}": 1,
        "step_tokens": stats["step_tokens"],
        "steps_out_of_memory_total": stats["steps_out_of_memory"],
        "kv_blocks": stats["blocks_total"],
        "kv_blocks_free": stats["blocks_free"],
        "kv_blocks_cached": stats["blocks_cached"],
        "kv_usage_ratio": (stats["blocks_total"] - stats["blocks_free"]) / stats["blocks_total"],
        "kv_slots_unused": stats["slots_unused"],
        "memory_budget_bytes": 1000,
        "memory_utilisation_ratio": 0.65,
        "kv_cache_target_bytes": 400,
        "kv_cache_wanted_bytes": 500,
        "kv_cache_resizes_total": stats["cache_resizes"],
        "engine_steps_total": stats["steps"],
        "prompt_tokens_total": stats["prompt_tokens"],
        "generated_tokens_total": stats["generated_tokens"],
        "preemptions_total": stats["preemptions"],
        "prefix_cache_queries_total": stats["prefix_queries"],
        "prefix_cache_hits_total": stats["prefix_hits"],
        "prefix_cache_evictions_total": stats["prefix_evictions"],
        "speculative_tokens_drafted_total": stats["tokens_drafted"],
        "speculative_tokens_accepted_total": stats["tokens_accepted"],
        "memory_bytes{owner=weights}": 300,
        "memory_bytes{owner=workspace}": 100,
        "memory_bytes{owner=adapters}": 50,
        "memory_bytes{owner=kv_used}": 200,
        "memory_bytes{owner=kv_cached}": 30,
        "memory_bytes{owner=kv_free}": 40,
        "memory_reclaimed_bytes_total{stage=pool_tail}": 60,
        "memory_reclaimed_bytes_total{stage=free_blocks}": 0,
        "step_seconds_total{phase=schedule}": stats["schedule_seconds"],
        "step_seconds_total{phase=forward}": stats["forward_seconds"],
        "step_seconds_total{phase=sample}": stats["sample_seconds"],
        "step_seconds_total{phase=send}": stats["send_seconds"],
        "requests_finished_total{reason=length}": 1,
        "requests_finished_total{reason=cancelled}": 1,
        "requests_finished_total{reason=stop}": 0,
        "time_to_first_token_seconds_bucket{le=0.005}": 1,
        "time_to_first_token_seconds_bucket{le=0.03}": 1,
        "time_to_first_token_seconds_bucket{le=0.05}": 2,
        "time_to_first_token_seconds_bucket{le=120}": 2,
        "time_to_first_token_seconds_bucket{le=+Inf}": 3,
        "time_to_first_token_seconds_count": 3,
        "time_to_first_token_seconds_sum": 500.044,
        "request_queue_seconds_count": 3,
        "request_latency_seconds_bucket{le=0.2}": 0,
        "request_latency_seconds_bucket{le=0.3}": 1,
        "request_latency_seconds_count": 1,
        "inter_token_latency_seconds_bucket{le=0.0075}": 0,
        "inter_token_latency_seconds_bucket{le=0.01}": 7,
        "inter_token_latency_seconds_count": 7,
        "inter_token_latency_seconds_sum": 0.07,
    }
    assert not {name for name in series if "spans" in name and series[name]}
    for name, value in expected.items():
        assert series[PREFIX + name] == pytest.approx(value), name
    plain = {value for value in stats.values() if isinstance(value, int)}
    assert plain <= set(series.values())  # no field of the engine's stats is forgotten


def test_spans_that_a_bridge_exports_or_drops_are_counted(bridge: Any, family: type[Family]) -> None:
    bridge.traces = SimpleNamespace(read_spans=lambda: Counter({EXPORTED: 9, "queue_full": 4, "export_failed": 5}))
    mirror(bridge, family).refresh()
    spans = {name.removeprefix(f"{PREFIX}spans_"): value for name, value in family.series.items() if "_spans_" in name}
    assert spans == {
        "exported_total": 9,
        "dropped_total{reason=queue_full}": 4,
        "dropped_total{reason=export_failed}": 5,
    }


@pytest.mark.parametrize(
    ("trouble", "engine_up", "cause"),
    [
        ("", True, None),
        ("the engine is not available (killed by SIGKILL)", False, "engine_down"),
        ("the engine has said and computed nothing for 9 s", True, "engine_silent"),
        (f"{STUCK}the sender thread has ended; see the log", True, "stuck"),
        (DRAINING, False, "draining"),
    ],
)
def test_what_is_wrong_has_a_cause(
    bridge: Any, family: type[Family], trouble: str, engine_up: bool, cause: str | None
) -> None:
    bridge.trouble, bridge.engine_up = trouble, engine_up
    mirror(bridge, family).refresh()
    found = {one for one in UNHEALTHY if family.series[f"{PREFIX}unhealthy{{cause={one}}}"]}
    assert found == ({cause} if cause else set())
    assert family.series[f"{PREFIX}healthy"] == (not trouble)


def test_only_changes_cost_a_call_and_counters_never_fall(bridge: Any, family: type[Family]) -> None:
    metrics = mirror(bridge, family)
    steps, running = f"{PREFIX}engine_steps_total", f"{PREFIX}requests_running"
    seen = []
    for stats in (EngineStats(3, 0, 9, 9, 10, 0, 0, 0), EngineStats(3, 0, 9, 9, 15, 0, 0, 0)):
        bridge.cumulative_stats.update(stats)
        metrics.refresh()
        seen.append(family.series[steps])
    calls = family.calls.copy()
    metrics.refresh()
    calls[f"{PREFIX}heartbeat_timestamp_seconds"] = family.calls[f"{PREFIX}heartbeat_timestamp_seconds"]
    assert family.calls == calls
    assert (calls[steps], calls[running]) == (2, 1)
    bridge.cumulative_stats.engine_lost()
    metrics.refresh()
    seen.append(family.series[steps])
    assert family.series[running] == 0
    bridge.cumulative_stats.update(EngineStats(1, 0, 9, 9, 40, 0, 0, 0))
    metrics.refresh()
    assert [*seen, family.series[steps]] == [10, 15, 15, 55]


def test_gauges_of_a_stub_that_died_do_not_stay(bridge: Any, family: type[Family]) -> None:
    mirrored = mirror(bridge, family)
    family.series[f"{PREFIX}requests_running"] = 5.0  # as the one before has left it
    mirrored.refresh()
    assert family.series[f"{PREFIX}requests_running"] == 0
    calls = family.calls[f"{PREFIX}requests_running"]
    mirrored.refresh()
    assert family.calls[f"{PREFIX}requests_running"] == calls


def test_another_model_s_series_have_its_name(bridge: Any, family: type[Family]) -> None:
    labels = {"model": "small"}
    MetricsMirror(METRICS, lambda: samples(bridge), family, labels=labels).refresh()
    mirror(bridge, family).refresh()  # the first model's beside them
    of_small = {key for key in family.series if "{model=small}" in key}
    assert {key.replace("{model=small}", "", 1) for key in of_small} == set(family.series) - of_small
