"""Draws a dashboard from the answers to its queries, as Grafana would lay it out: a row below the other."""

from __future__ import annotations

import math
import re
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.dates as dates
import matplotlib.pyplot as plt

MOST_LINES = 12  # of a panel
COLUMNS = 3
STRIDE = 4  # points of which one is drawn


def draw(dashboard: Any, answers: dict[str, list[dict[str, Any]]], file: Path) -> None:
    """`answers`: by query, Prometheus' series."""
    panels = [(row, panel) for row in dashboard.rows for panel in row.panels]
    height = math.ceil(len(panels) / COLUMNS)
    figure, axes = plt.subplots(height, COLUMNS, figsize=(5.2 * COLUMNS, 2.6 * height), squeeze=False, dpi=72)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (row, panel) in zip(axes.flat, panels, strict=False):
        lines = []
        for query in panel.queries:
            for found in answers[query.expr.replace("$instance", ".*")]:
                legend = re.sub(r"\{\{(\w+)\}\}", lambda match, of=found["metric"]: of.get(match[1], ""), query.legend)
                lines.append((legend, found["values"]))
        for legend, values in sorted(lines)[:MOST_LINES]:
            values = values[::STRIDE]
            times = [datetime.fromtimestamp(at, timezone.utc) for at, _ in values]
            axis.plot(times, [float(value) for _, value in values], label=legend, linewidth=0.9)
        axis.set_title(f"{row.title}: {panel.title}", fontsize=9, loc="left")
        axis.set_ylabel(panel.unit, fontsize=7)
        axis.xaxis.set_major_formatter(dates.DateFormatter("%H:%M"))
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
        if lines:
            axis.legend(fontsize=6, loc="upper left", ncols=2, framealpha=0.6)
        else:
            axis.text(0.5, 0.5, "no data", transform=axis.transAxes, ha="center", color="gray")
    figure.suptitle(f"{dashboard.title} (synthetic data)", fontsize=12, x=0.01, ha="left")
    figure.tight_layout(rect=(0, 0, 1, 0.98))
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, pil_kwargs={"quality": 60})
    plt.close(figure)
