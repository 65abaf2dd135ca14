"""Draws a sweep: percentiles of the latencies and the throughput over the rate of arrivals, one line a system."""

from __future__ import annotations

from pathlib import Path

from tidewright.bench.sweep import LATENCIES

STYLES = {"p50": "-", "p90": "--", "p99": ":"}


def draw(points: list[dict], title: str, file: Path) -> None:
    """Writes a PNG of a sweep's points (sweep.py)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # draws without a display
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    *latencies, throughput = figure.subplots(2, 2).flat
    for number, system in enumerate(dict.fromkeys(point["system"] for point in points)):
        mine = [point for point in points if point["system"] == system]
        rates = [point["rate"] for point in mine]
        for axes, name in zip(latencies, LATENCIES, strict=True):
            for percentile, style in STYLES.items():
                values = [point[name][percentile] for point in mine]
                axes.plot(rates, values, style, color=f"C{number}", marker=".", label=f"{system} {percentile}")
        for name, style in (("achieved", "-"), ("goodput", "--")):
            values = [point[f"{name}, requests/s"] for point in mine]
            throughput.plot(rates, values, style, color=f"C{number}", marker=".", label=f"{system} {name}")
    for axes, name in zip(latencies, LATENCIES, strict=True):
        axes.set(title=name, yscale="log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
    throughput.set(title="requests/s")
    for axes in (*latencies, throughput):
        axes.set(xlabel="arrivals, requests/s")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="x-small")
    figure.savefig(file, dpi=120)
