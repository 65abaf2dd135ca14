"""Two reports side by side: is the new one better or worse, and were they the same test at all?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loadtests import report as reports
from loadtests.figures import PERCENTILES

NOISE = 1.1  # a ratio within it is neither better nor worse
OF_A_PLACE = {"url", "grpc", "samples", "silence", "give_up"}
"""Options that two tests need not share to be compared."""


@dataclass(frozen=True)
class Row:
    name: str
    old: float | None
    new: float | None
    lower_is_better: bool | None = True

    @property
    def ratio(self) -> float | None:
        return self.new / self.old if self.old and self.new is not None else None

    @property
    def better(self) -> bool | None:
        """None where it is neither."""
        if self.lower_is_better is None or self.old is None or self.new is None or self.old == self.new:
            return None
        if self.ratio is not None and 1 / NOISE < self.ratio < NOISE:
            return None
        return (self.new < self.old) == self.lower_is_better


def rows(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Row]:
    """Of the summaries."""
    before, after = old["summary"], new["summary"]
    found = [
        Row("requests", before["requests"], after["requests"], None),
        Row("failed", before["failed"], after["failed"]),
        Row("requests/s", before["requests_per_second"], after["requests_per_second"], False),
        Row("tokens/s", before["tokens_per_second"], after["tokens_per_second"], False),
    ]
    for name, label in (("ttft", "TTFT"), ("tpot", "TPOT"), ("e2e", "whole request"), ("longest_gap", "longest pause")):
        for percentile in ("mean", *(f"p{p}" for p in PERCENTILES)):
            values = (report[f"{name}_ms"][percentile] for report in (before, after))
            found.append(Row(f"{label} {percentile}, ms", next(values), next(values)))
    knees = [report["knee"].get("users") for report in (old, new)]
    if any(knees):
        found.append(Row("saturation knee, users", knees[0], knees[1], False))
    return found


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Why the two can't be compared as they are."""
    names = sorted((old["options"].keys() | new["options"].keys()) - OF_A_PLACE)
    pairs = ((name, old["options"].get(name), new["options"].get(name)) for name in names)
    found = [
        f"not the same test: {name} was {before}, and is {after}" for name, before, after in pairs if before != after
    ]
    if old.get("machine") != new.get("machine"):
        found.append("not the same kind of machine")
    return found


def text(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    found = rows(old, new)
    width = max(len(row.name) for row in found)
    lines = [f"{'':{width}}  {'old':>10}  {'new':>10}  new / old"]
    for row in found:
        verdict = {True: "  better", False: "  worse", None: ""}[row.better]
        figures = (reports.figure(value) for value in (row.old, row.new, row.ratio))
        lines.append("{:{}}  {:>10}  {:>10}  {:>9}{}".format(row.name, width, *figures, verdict))
    return "\n".join([*lines, *differences(old, new)])


def write(old: Mapping[str, Any], new: Mapping[str, Any], page: Path) -> None:
    from loadtests import charts

    png = charts.draw_comparison(old, new)
    found = [{**asdict(row), "ratio": row.ratio, "better": row.better} for row in rows(old, new)]
    pictures = {"Distributions": png} if png else {}
    values = {"old": old, "new": new, "rows": found, "differences": differences(old, new)}
    page.write_text(reports.render("comparison.html.j2", pictures, **values), encoding="utf-8")
