"""Prints what was measured."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from tidewright.bench.compare import ENGINE, FIGURES, OURS
from tidewright.bench.sweep import LATENCIES

MEMORY = "memory, MiB (proportional set size)"
SECTIONS = ("continuous batching", "overhead of Triton and bridge", "engine", "start", MEMORY)


def print_comparison(report: dict, console: Console) -> None:
    """Medians with their lowest and highest values, and how ours stands: a table for each kind of weights."""
    quantized = report.get("quantized", {})
    set_apart = {name for column in quantized.values() for name in (column["ours"], *column["peers"])}
    systems = [name for name in next(iter(report["figures"].values())) if name not in set_apart]
    _print_figures(report, [*systems, *_missing(report, "")], OURS, f"{report['dtype']}, ", console)
    for quantization, column in quantized.items():
        names = [OURS, column["ours"], *column["peers"], *_missing(report, quantization)]
        _print_figures(report, names, column["ours"], f"{quantization}, ", console)
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


def _missing(report: dict, quantization: str) -> list[str]:
    """Their names end in the quantization that they were wanted for."""
    return [name for name in report["missing"] if " ".join(name.split()[1:]) == quantization]


def _print_figures(report: dict, systems: list[str], ours: str, precision: str, console: Console) -> None:
    machine = report["machine"]
    table = Table(
        title=f"{machine['cpu']}, {machine['cores']} cores, {precision}"
        f"median (lowest - highest) of {report['repetitions']}"
    )
    table.add_column("figure")
    for system in systems:
        table.add_column(system, justify="right")
    table.add_column(f"{ours} against the best peer", justify="right")
    if ours != OURS:
        table.add_column(f"against {OURS}", justify="right")
    more_is_better = {label: more for label, _, _, more in FIGURES}
    for label, figures in report["figures"].items():
        values = {name: figures[name] for name in systems if name in figures}
        cells = [_cell(values[system]) if system in values else "" for system in systems]
        cells.append(against_best_peer(values, more_is_better[label], ours))
        if ours != OURS:
            cells.append(f"{_factor(values[ours], figures[OURS], more_is_better[label]):.2f}x")
        table.add_row(label, *cells)
    console.print(table)


def against_best_peer(values: dict[str, dict[str, float]], more_is_better: bool, ours: str = OURS) -> str:
    """Above 1: ours is better."""
    factors = {
        system: _factor(values[ours], value, more_is_better)
        for system, value in values.items()
        if system not in (ours, OURS, ENGINE)
    }
    if not factors:
        return ""
    best = min(factors, key=lambda system: factors[system])
    return f"{factors[best]:.2f}x {best}"


def _factor(ours: dict[str, float], other: dict[str, float], more_is_better: bool) -> float:
    ratio = ours["median"] / other["median"]
    return ratio if more_is_better else 1 / ratio


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
