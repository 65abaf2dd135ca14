"""The report's pictures, drawn by matplotlib from the report's own figures: PNG, or None where there is nothing."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg  # draws without a display
from matplotlib.figure import Figure

Report = Mapping[str, Any]
SIZE = (9.0, 3.4)
STYLES = {"p50": "-", "p95": "--", "p99": ":"}
NAMES = {"ttft": "time to first token", "tpot": "time per further token", "e2e": "whole request"}
MAX_LINES = 10  # processes in one picture: those that used most of it


def _figure(plots: int = 1) -> tuple[Figure, list[Any]]:
    figure = Figure(figsize=SIZE, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, plots, squeeze=False)[0])


def _png(figure: Figure) -> bytes:
    for axes in figure.axes:
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="xx-small", framealpha=0.6)
    file = io.BytesIO()
    figure.savefig(file, dpi=110, format="png")
    return file.getvalue()


def over_time(report: Report) -> bytes | None:
    """Latency and throughput over time."""
    windows = report["windows"]
    figure, (latency, rate) = _figure(2)
    times = [window["at"] for window in windows]
    for number, name in enumerate(("ttft", "e2e")):
        for percentile, style in STYLES.items():
            values = [window[f"{name}_ms"][percentile] or float("nan") for window in windows]
            latency.plot(times, values, style, color=f"C{number}", marker=".", label=f"{NAMES[name]} {percentile}")
    latency.set(xlabel="s", ylabel="ms", yscale="log", title="latency over time")
    rate.plot(times, [window["requests_per_second"] for window in windows], color="C0", label="requests/s")
    rate.set(xlabel="s", title="throughput, users and failures over time", ylabel="requests/s")
    rate.plot(times, [window["failed"] for window in windows], color="C3", label="failed requests")
    users = rate.twinx()
    users.plot(times, [window["users"] for window in windows], color="C7", drawstyle="steps-mid", label="users (right)")
    return _png(figure)


def over_rate(report: Report) -> bytes | None:
    """Latency over throughput, and the knee."""
    steps = [step for step in report["steps"] if step["served"]]
    if len(steps) < 2:
        return None
    figure, (latency, rate) = _figure(2)
    rates = [step["requests_per_second"] for step in steps]
    for number, name in enumerate(("ttft", "e2e")):
        for percentile, style in STYLES.items():
            values = [step[f"{name}_ms"][percentile] for step in steps]
            latency.plot(rates, values, style, color=f"C{number}", marker=".", label=f"{NAMES[name]} {percentile}")
    latency.set(xlabel="served requests/s", ylabel="ms", yscale="log", title="latency over rate")
    users = [step["users"] for step in steps]
    rate.plot(users, rates, marker=".", label="measured")
    knee = report["knee"]
    if "users" in knee:
        most, at = knee["requests_per_second"], knee["users"]
        rate.plot([0, at, max(users)], [0, most, most], "--", color="C7", label="asymptotes")
        rate.axvline(
            at, color="C3", alpha=0.6, label=f"knee: {at:.1f} users" + ("" if knee["reached"] else ", not reached")
        )
    rate.set(xlabel="users", ylabel="served requests/s", title="saturation")
    return _png(figure)


def distributions(report: Report) -> bytes | None:
    """Cumulative distributions, and histograms made from them."""
    found = {name: values for name, values in report["cdf_ms"].items() if name in NAMES and values}
    if not found:
        return None
    figure, axes = _figure(len(found))
    for number, (axis, (name, values)) in enumerate(zip(axes, found.items(), strict=True)):
        axis.hist(values, bins=30, color=f"C{number}", alpha=0.35, label="% of requests")
        axis.set(title=NAMES[name], xlabel="ms", ylabel="% of requests")
        line = axis.twinx()
        line.plot(values, range(len(values)), color=f"C{number}", label="CDF, % (right)")
        line.set_ylim(0, 100)
    return _png(figure)


def errors(report: Report) -> bytes | None:
    """Failed requests by kind."""
    if not report["errors"]:
        return None
    figure, (axes,) = _figure()
    kinds = dict(list(report["errors"].items())[:10])
    axes.barh([kind[:70] for kind in kinds], list(kinds.values()), color="C3")
    axes.invert_yaxis()
    axes.set(xlabel="failed requests", title="errors by kind")
    return _png(figure)


def processes(report: Report) -> bytes | None:
    """CPU and memory of each process."""
    found = report.get("processes", ())
    if not found:
        return None
    figure, (cpu, memory) = _figure(2)
    for axes, series, most in ((cpu, "cpu", "cpu_seconds"), (memory, "mib", "mib_last")):
        for one in sorted(found, key=lambda one: -one[most])[:MAX_LINES]:
            axes.plot(one["at"], one[series], label=f"{one['name']} ({one['pid']})")
    cpu.set(xlabel="s", ylabel="cores", title="CPU of each process")
    memory.set(xlabel="s", ylabel="MiB of its own", yscale="log", title="memory of each process")
    for axes in (cpu, memory):
        for kill in report.get("kills", ()):
            axes.axvline(kill["at"], color="C3", alpha=0.3)
    return _png(figure)


PICTURES: Mapping[str, Callable[[Report], bytes | None]] = {
    "Latency and throughput over time": over_time,
    "Latency over rate, and saturation": over_rate,
    "Distributions": distributions,
    "Errors by kind": errors,
    "Processes": processes,
}


def draw(report: Report) -> dict[str, bytes]:
    """All pictures that the report has figures for."""
    return {title: png for title, make in PICTURES.items() if (png := make(report))}


def draw_comparison(old: Report, new: Report) -> bytes | None:
    """Cumulative distributions of both."""
    names = [name for name in NAMES if old["cdf_ms"][name] and new["cdf_ms"][name]]
    if not names:
        return None
    figure, axes = _figure(len(names))
    for axis, name in zip(axes, names, strict=True):
        for which, report, style in (("old", old, "--"), ("new", new, "-")):
            values = report["cdf_ms"][name]
            axis.plot(values, range(len(values)), style, label=which)
        axis.set(title=NAMES[name], xlabel="ms", ylabel="% of requests", xscale="log")
    return _png(figure)
