"""Prints what was measured."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from tidewright.bench.compare import ENGINE, FIGURES, OURS
from tidewright.bench.sweep import LATENCIES

MEMORY = "memory, MiB (proportional set size)"
SECTIONS = ("continuous batching", "overhead of Triton and bridge", "engine", "start", MEMORY)


def print_comparison(report: dict, console: Console) -> None:
    """Medians with their lowest and highest values, and how ours stands against the best of the others."""
    machine = report["machine"]
    table = Table(
        title=f"{machine['cpu']}, {machine['cores']} cores, {report['dtype']}, "
        f"median (lowest - highest) of {report['repetitions']}"
    )
    table.add_column("figure")
    systems = list(next(iter(report["figures"].values()))) + list(report["missing"])
    for system in systems:
        table.add_column(system, justify="right")
    table.add_column("tidewright against the best peer", justify="right")
    more_is_better = {label: more for label, _, _, more in FIGURES}
    for label, values in report["figures"].items():
        cells = [_cell(values[system]) if system in values else "" for system in systems]
        table.add_row(label, *cells, against_best_peer(values, more_is_better[label]))
    console.print(table)
    for peer, reason in report["missing"].items():
        console.print(f"{peer}: {reason}", highlight=False)
    for section in SECTIONS:
        if section in report:
            rows = Table("", "", title=section, show_header=False)
            for label, value in report[section].items():
                rows.add_row(label, f"{value:.2f}")
            console.print(rows)
    if disturbed := report["runs begun on busy cores"]:
        console.print(f"[yellow]The machine was not idle before {disturbed} runs: the figures are disturbed.[/]")


def against_best_peer(values: dict[str, dict[str, float]], more_is_better: bool) -> str:
    """Above 1: ours is better."""
    factors = {}
    for system, value in values.items():
        if system not in (OURS, ENGINE):
            ratio = values[OURS]["median"] / value["median"]
            factors[system] = ratio if more_is_better else 1 / ratio
    if not factors:
        return ""
    best = min(factors, key=lambda system: factors[system])
    return f"{factors[best]:.2f}x {best}"


def _cell(value: dict[str, float]) -> str:
    return f"{value['median']:.0f} ({value['min']:.0f} - {value['max']:.0f})"


def print_sweep(report: dict, console: Console) -> None:
    goal = report["goal"]
    table = Table(
        title=f"{report['machine']['cpu']}, {report['machine']['cores']} cores; {report['requests']} requests a rate, "
        f"mix {report['mix']}; goodput: TTFT within {goal['ttft']:g} s and TPOT within {goal['tpot']:g} s"
    )
    columns = ("arrivals/s", "system", "TTFT p50/p90/p99, ms", "TPOT p50/p90/p99, ms", "end to end p50/p90/p99, ms")
    for column in (*columns, "served/s", "tokens/s", "goodput/s", "errors"):
        table.add_column(column, justify="left" if column == "system" else "right")
    for point in report["points"]:
        table.add_row(
            f"{point['rate']:g}",
            point["system"],
            *("/".join(f"{ms:.0f}" for ms in point[name].values()) for name in LATENCIES),
            f"{point['achieved, requests/s']:.2f}",
            f"{point['tokens/s']:.0f}",
            f"{point['goodput, requests/s']:.2f}",
            str(point["errors"]),
        )
    console.print(table)
    for missing, reason in report["missing"].items():
        console.print(f"{missing}: {reason}", highlight=False)
