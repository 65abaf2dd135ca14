"""What makes each alert fire and end, as series for `promtool test rules`.

Values are in promtool's notation: `0x10` is 0 and ten more of it, `0+2x10` grows by 2, `_` is no sample.
"""

from __future__ import annotations

from dataclasses import dataclass, field

G = 'instance="g:8080", job="gateway"'
T = 'instance="t:8002", job="triton"'
D = 'instance="d:9400", gpu="0"'
N = 'instance="n:9100", fstype="ext4", mountpoint="/"'


@dataclass(frozen=True)
class Scenario:
    """A history in which the alert is firing at one time and not at others."""

    alert: str
    fires_at: str
    quiet_at: tuple[str, ...]
    series: dict[str, str] = field(default_factory=dict)
    step: str = "1s"  # between samples, and between evaluations
    count: int = 1  # of firing ones then

    @property
    def name(self) -> str:
        return f"{self.alert}-{self.fires_at}"


def gateway(name: str, labels: str = "") -> str:
    return f"tidewright_gateway_{name}{{{G}{', ' if labels else ''}{labels}}}"


def engine(name: str, labels: str = "") -> str:
    return f"tidewright_{name}{{{T}{', ' if labels else ''}{labels}}}"


def outcomes(ok: str, failed: str) -> dict[str, str]:
    return {
        gateway("request_outcomes_total", 'outcome="ok"'): ok,
        gateway("request_outcomes_total", 'outcome="failed"'): failed,
        gateway("request_outcomes_total", 'outcome="overloaded"'): "0x10000",
        gateway("request_outcomes_total", 'outcome="client_error"'): "0+1000x10000",
    }


def latencies(name: str, fast: str, slow: str) -> dict[str, str]:
    """Requests below 0.05 s, and beside them such between 2 and 5 s."""
    return {
        gateway(f"{name}_bucket", 'le="0.05"'): fast,
        gateway(f"{name}_bucket", 'le="2.0"'): fast,
        gateway(f"{name}_bucket", 'le="5.0"'): slow,
        gateway(f"{name}_bucket", 'le="+Inf"'): slow,
        gateway(f"{name}_count"): slow,
    }


UP_G, UP_T = f"up{{{G}}}", f"up{{{T}}}"
STARTED = f"process_start_time_seconds{{{G}}}"
DAY = 86400

SCENARIOS = {
    "outage": [
        # A start: down at first, which is nothing lost. Then up, down, up.
        Scenario("NoGateway", "45s", ("15s", "30s", "75s"), {UP_G: "0x20 1x20 0x20 1x20"}),
        # Discovery forgets it.
        Scenario("NoGateway", "50s", ("20s", "42s", "90s"), {UP_G: "1x40 stale _x40 1x20"}),
        Scenario("GatewayDown", "45s", ("15s", "30s", "75s"), {UP_G: "0x20 1x20 0x20 1x20"}),
        Scenario(
            "NoReplicaUsable",
            "125s",
            ("20s", "110s", "150s"),
            {gateway("replicas_usable"): "0x60 2x60 0x20 1x60", STARTED: "0x200"},
        ),
        Scenario(
            "AllBreakersOpen",
            "25s",
            ("15s", "50s"),
            {
                gateway("breaker_state", 'replica="a:1", state="closed"'): "1x10 0x50",
                gateway("breaker_state", 'replica="a:1", state="open"'): "0x10 1x50",
                gateway("breaker_state", 'replica="b:1", state="closed"'): "1x20 0x20 1x20",
                gateway("breaker_state", 'replica="b:1", state="open"'): "0x20 1x20 0x20",
            },
        ),
        Scenario(
            "EngineDown",
            "46s",
            ("15s", "35s", "41s", "70s"),
            {engine("engine_up"): "0x20 1x20 0x20 1x20", engine("engine_steps_total"): "0x20 0+50x20 1000x40"},
        ),
        Scenario(
            "ModelUnhealthy",
            "49s",
            ("15s", "35s", "43s", "70s"),
            {
                engine("unhealthy", 'cause="engine_silent"'): "1x20 0x20 1x20 0x20",
                engine("unhealthy", 'cause="engine_down"'): "1x80",  # another alert's
                engine("engine_up"): "0x20 1x80",
                engine("engine_steps_total"): "0x20 0+50x80",
                # Of a model beside the first, which starts.
                engine("unhealthy", 'cause="stuck", model="small"'): "1x80",
                engine("engine_up", 'model="small"'): "0x80",
                engine("engine_steps_total", 'model="small"'): "0x80",
            },
        ),
        Scenario("EngineRestarted", "22s", ("15s", "170s"), {engine("engine_restarts_total"): "0x20 1x200"}),
        Scenario(
            "EngineRestartsOften",
            "40s",
            ("15s", "28s", "700s"),
            {engine("engine_restarts_total"): "0x20 1x4 2x4 3x800"},
        ),
        *(
            Scenario(
                "ModelProcessDead", "27s", ("1s", "3s", "20s", "40s", "60s"), {engine(name): "100+1x20 120x10 131+1x30"}
            )
            for name in (
                "heartbeat_timestamp_seconds",
                "failsafe_heartbeat_timestamp_seconds",
                "fallback_heartbeat_timestamp_seconds",
            )
        ),
        Scenario(  # of two models at once
            "ModelProcessDead",
            "28s",
            ("1s", "3s", "20s", "40s", "60s"),
            {
                engine("heartbeat_timestamp_seconds", labels): "100+1x20 120x10 131+1x30"
                for labels in ("", 'model="small"')
            },
            count=2,
        ),
        Scenario("TritonDown", "45s", ("15s", "30s", "75s"), {UP_T: "0x20 1x20 0x20 1x20"}),
        Scenario(
            "ReplicaDown", "45s", ("15s", "30s", "75s"), {gateway("replica_up", 'replica="a:1"'): "0x20 1x20 0x20 1x20"}
        ),
        Scenario("StoreLost", "22s", ("15s", "50s"), {gateway("store_lost", 'store="limits"'): "0x20 1x20 0x20"}),
        Scenario("QueueFull", "22s", ("15s", "60s"), {gateway("refusals_total", 'limit="max_queue"'): "0x20 20x100"}),
        Scenario("LoadShed", "25s", ("15s", "50s"), {gateway("degradation_level"): "2x20 3x20 0x20"}),
        # 10 requests a second; from 100 s on half of them fail, for 10 s.
        Scenario(
            "RequestsFail", "105s", ("95s", "150s"), outcomes("0+10x100 1000+5x10 1060+10x100", "0x100 0+5x10 50x100")
        ),
    ],
    "absence": [
        Scenario("GatewayMissing", "6m", ("4m", "8m"), {UP_G: "0x28 1x20"}, "15s"),
        Scenario("GatewayMissing", "6m", ("4m", "9m"), {UP_G: "_x30 1x20"}, "15s"),
        Scenario("NotServing", "6m", ("4m", "8m"), {gateway("replicas_usable"): "0x28 1x20"}, "15s"),
        Scenario("ReplicaMissing", "11m", ("9m", "13m"), {gateway("replica_up", 'replica="a:1"'): "0x48 1x20"}, "15s"),
        Scenario("TritonMissing", "6m", ("4m", "8m"), {UP_T: "0x28 1x20"}, "15s"),
        Scenario("DecoderMissing", "6m", ("4m", "9m"), {UP_T: "1x60", engine("engine_up"): "_x30 1x20"}, "15s"),
        Scenario("EngineNotStarting", "6m", ("4m", "8m"), {engine("engine_up"): "0x28 1x20"}, "15s"),
    ],
    "slo": [
        # A request each second, 3 % of which fail for two hours from the third on.
        Scenario(
            "ErrorBudgetBurnsFast",
            "210m",
            ("90m", "122m", "260m"),
            outcomes("0+60x120 7200+58x120 14160+60x300", "0x120 0+2x120 240x300"),
            "1m",
        ),
        # 0.7 % fail for ten hours.
        Scenario(
            "ErrorBudgetBurns",
            "800m",
            ("250m", "1200m"),
            outcomes("0+600x300 180000+596x600 537600+600x500", "0x300 0+4x600 2400x500"),
            "1m",
        ),
        # 0.4 % for a day.
        Scenario(
            "ErrorBudgetBurnsSlowly",
            "40h",
            ("10h", "60h"),
            outcomes("0+2500x360 900000+2490x360 1796400+2500x360", "0x360 0+10x360 3600x360"),
            "4m",
        ),
        # 0.15 % for three days: the windows of 6 h and 3 days.
        Scenario(
            "ErrorBudgetBurnsSlowly",
            "130h",
            ("70h", "156h"),
            outcomes("0+2000x1080 2160000+1997x1080 4316760+2000x500", "0x1080 0+3x1080 3240x500"),
            "4m",
        ),
        Scenario(
            "ErrorRateHigh",
            "15m",
            ("9m", "25m"),
            outcomes("0+600x40 24000+598x20 35960+600x60", "0x40 0+2x20 40x60"),
            "15s",
        ),
        *(
            Scenario(alert, "15m", ("9m", "26m"), latencies(name, "0+15x40 600+13x20 860+15x60", "0+15x120"), "15s")
            for alert, name in (
                ("TimeToFirstTokenHigh", "time_to_first_token_seconds"),
                ("TimePerTokenHigh", "time_per_output_token_seconds"),
            )
        ),
    ],
    "load": [
        Scenario(
            "QueueGrows",
            "5m",
            ("2m", "8m"),
            {
                gateway("queue_length", 'class="normal"'): "0x12 0+10x8 80x20",
                gateway("queue_length", 'class="high"'): "0x60",
                gateway("queue_places"): "16x60",
            },
            "15s",
        ),
        Scenario("KvCacheFull", "5m", ("2m", "9m"), {engine("kv_usage_ratio"): "0.9x10 0.99x12 0.5x60"}, "15s"),
        Scenario("PreemptionStorm", "5m", ("2m", "9m"), {engine("preemptions_total"): "0x12 0+30x10 300x60"}, "15s"),
        Scenario(
            "MemoryShort",
            "35m",
            ("15m", "50m"),
            {
                engine("kv_cache_target_bytes"): "1000x60",
                engine("memory_bytes", 'owner="adapters"'): "20x60",
                engine("memory_bytes", 'owner="kv_used"'): "600x60",
                engine("memory_bytes", 'owner="kv_free"'): "370x20 250x20 370x20",
                engine("memory_bytes", 'owner="weights"'): "5000x60",
            },
            "1m",
        ),
        Scenario(
            "AdapterLoadsFail",
            "25m",
            ("15m", "40m"),
            {
                engine("adapter_changes_total", 'change="failed"'): "0x20 1x60",
                engine("adapter_changes_total", 'change="loaded"'): "0+1x80",
            },
            "1m",
        ),
        Scenario("StepsOutOfMemory", "4m", ("2m", "14m"), {engine("steps_out_of_memory_total"): "0x12 2x60"}, "15s"),
        Scenario("Degraded", "4m", ("2m", "9m"), {gateway("degradation_level"): "0x12 2x10 0x60"}, "15s"),
        Scenario(
            "FallbackAnswers",
            "4m",
            ("2m", "9m"),
            {
                gateway("attempts_total", 'model="fallback", replica="a:1"'): "0x12 0+1x10 10x60",
                gateway("attempts_total", 'model="decoder", replica="a:1"'): "0+5x90",
            },
            "15s",
        ),
        Scenario(
            "RetryBudgetEmpty",
            "4m",
            ("2m", "9m"),
            {
                gateway("retries_refused_total", 'reason="budget"'): "0x12 0+1x10 10x60",
                gateway("retries_refused_total", 'reason="attempts"'): "0+1x90",
            },
            "15s",
        ),
        Scenario(
            "ReplicaLoadStale",
            "5m",
            ("2m", "9m"),
            {
                gateway("replica_load_stale", 'replica="a:1"'): "0x12 1x60",
                gateway("replica_up", 'replica="a:1"'): "1x25 0x60",
            },
            "15s",
        ),
        Scenario(
            "EventLoopLags",
            "5m",
            ("2m", "10m"),
            {
                gateway("event_loop_lag_seconds_bucket", 'le="0.2"'): "0+60x12 720+50x10 1220+60x60",
                gateway("event_loop_lag_seconds_bucket", 'le="0.5"'): "0+60x90",
                gateway("event_loop_lag_seconds_bucket", 'le="+Inf"'): "0+60x90",
            },
            "15s",
        ),
        Scenario("GatewayRestarts", "8m", ("3m", "25m"), {STARTED: "10x8 100x8 200x8 300x120"}, "15s"),
        Scenario(
            "OpenFilesHigh",
            "5m",
            ("2m", "9m"),
            {f"process_open_fds{{{G}}}": "100x12 900x12 100x60", f"process_max_fds{{{G}}}": "1024x90"},
            "15s",
        ),
        Scenario(
            "LimitsUnchecked", "4m", ("2m", "9m"), {gateway("limits_unchecked_total"): "0x12 0+1x10 10x60"}, "15s"
        ),
        Scenario(
            "DiscoveryFails", "6m", ("2m", "10m"), {gateway("discovery_failures_total"): "0x12 0+3x15 45x60"}, "15s"
        ),
        Scenario("WebSocketsStall", "6m", ("2m", "10m"), {gateway("websocket_stalled"): "0x12 20x15 0x60"}, "15s"),
        Scenario(
            "WebSocketOutputPilesUp",
            "4m",
            ("2m", "9m"),
            {gateway("websocket_unsent_bytes"): "0x12 200000000x10 0x60"},
            "15s",
        ),
        *(
            Scenario(
                "TritonRequestsFail",
                "4m",
                ("2m", "9m"),
                {
                    f'nv_inference_request_failure{{{T}, model="decoder", reason="{reason}"}}': "0x12 0+5x10 50x60",
                    f'nv_inference_request_failure{{{T}, model="decoder", reason="CANCELED"}}': "0+50x90",
                    f'nv_inference_request_success{{{T}, model="decoder"}}': "0+50x90",
                },
                "15s",
            )
            for reason in ("BACKEND", "OTHER")
        ),
    ],
    "expiry": [
        # promtool's time begins at 0. Renewed after 2 days.
        Scenario(
            "CertificateExpires",
            "47h",
            ("12h", "50h"),
            {gateway("certificate_expiry_timestamp_seconds"): f"{15 * DAY}x288 {90 * DAY}x100"},
            "10m",
        ),
        Scenario(
            "CertificateExpiresSoon",
            "47h",
            ("12h", "50h"),
            {gateway("certificate_expiry_timestamp_seconds"): f"{3 * DAY}x288 {90 * DAY}x100"},
            "10m",
        ),
        Scenario(
            "KeyExpires",
            "47h",
            ("12h", "50h"),
            {gateway("key_expiry_timestamp_seconds"): f"{8 * DAY}x288 0x100"},
            "10m",
        ),
    ],
    "host": [
        Scenario(
            "DiskFills",
            "80m",
            ("20m", "200m"),
            {
                f"node_filesystem_avail_bytes{{{N}}}": "30x30 29-0.25x60 90x200",
                f"node_filesystem_size_bytes{{{N}}}": "100x300",
                f"node_filesystem_readonly{{{N}}}": "0x300",
            },
            "1m",
        ),
        Scenario(
            "DiskFull",
            "4m",
            ("2m", "8m"),
            {
                f"node_filesystem_avail_bytes{{{N}}}": "30x12 2x12 30x60",
                f"node_filesystem_size_bytes{{{N}}}": "100x90",
                f"node_filesystem_readonly{{{N}}}": "0x90",
            },
            "15s",
        ),
        Scenario(
            "LogLinesDropped", "4m", ("2m", "12m"), {gateway("log_lines_dropped_total"): "0x12 0+3x8 24x60"}, "15s"
        ),
    ],
    "gpu": [
        Scenario(
            "GpuErrors",
            "4m",
            ("2m", "20m"),
            {f"DCGM_FI_DEV_XID_ERRORS{{{D}}}": "0x12 79x100"},
            "15s",
        ),
        Scenario(
            "GpuErrors",
            "4m",
            ("2m", "20m"),
            {f"DCGM_FI_DEV_ECC_DBE_VOL_TOTAL{{{D}}}": "0x12 1x100"},
            "15s",
        ),
        Scenario(
            "GpuHot",
            "6m",
            ("2m", "10m"),
            {f"DCGM_FI_DEV_GPU_TEMP{{{D}}}": "60x12 90x14 60x60"},
            "15s",
        ),
    ],
}
"""By the group of rules."""
