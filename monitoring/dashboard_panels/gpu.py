"""GPUs, by dcgm-exporter."""

from __future__ import annotations

from dashboard_panels.shapes import FULL, Dashboard, Panel, Query, Row

_GPU = "{{instance}} GPU {{gpu}}"
GPU = Dashboard(
    "gpu",
    "GPU",
    "Of NVIDIA's dcgm-exporter, with the profiling metrics of its default-counters.csv.",
    (
        Row(
            "Use",
            (
                Panel(
                    "Busy",
                    "percentunit",
                    (Query("DCGM_FI_PROF_GR_ENGINE_ACTIVE", _GPU),),
                    "Share of the time in which any kernel ran",
                ),
                Panel("Tensor cores busy", "percentunit", (Query("DCGM_FI_PROF_PIPE_TENSOR_ACTIVE", _GPU),)),
                Panel(
                    "Memory bandwidth used",
                    "percentunit",
                    (Query("DCGM_FI_PROF_DRAM_ACTIVE", _GPU),),
                    "What decoding is bound by",
                ),
            ),
        ),
        Row(
            "Memory and links",
            (
                Panel(
                    "Memory used",
                    "percentunit",
                    (Query("DCGM_FI_DEV_FB_USED / (DCGM_FI_DEV_FB_USED + DCGM_FI_DEV_FB_FREE)", _GPU),),
                    thresholds=FULL,
                ),
                Panel(
                    "PCIe",
                    "Bps",
                    (
                        Query("rate(DCGM_FI_PROF_PCIE_TX_BYTES[1m])", f"{_GPU} sent"),
                        Query("rate(DCGM_FI_PROF_PCIE_RX_BYTES[1m])", f"{_GPU} received"),
                    ),
                ),
                Panel(
                    "NVLink",
                    "MBs",
                    (Query("DCGM_FI_DEV_NVLINK_BANDWIDTH_TOTAL", _GPU),),
                    "All lanes; tensor parallelism",
                ),
            ),
        ),
        Row(
            "Health",
            (
                Panel("Temperature", "celsius", (Query("DCGM_FI_DEV_GPU_TEMP", _GPU),), thresholds=((85, "red"),)),
                Panel("Power", "watt", (Query("DCGM_FI_DEV_POWER_USAGE", _GPU),)),
                Panel("Clock", "hertz", (Query("DCGM_FI_DEV_SM_CLOCK * 1000000", _GPU),)),
                Panel(
                    "Errors",
                    "none",
                    (
                        Query("DCGM_FI_DEV_XID_ERRORS", f"{_GPU} last XID"),
                        Query("increase(DCGM_FI_DEV_ECC_DBE_VOL_TOTAL[1h])", f"{_GPU} double-bit errors"),
                    ),
                ),
            ),
        ),
    ),
)
