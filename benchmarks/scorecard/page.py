"""docs/scorecard.md: each promise, its target, what was measured, on what and when, and whether it holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from benchmarks.scorecard.criteria import Criteria, Criterion, Figure, Score

_HEAD = """# Scorecard

Which promises hold, with the figures that were measured last. `make scorecard` writes this page.
`make scorecard ARGS="--run NAME"` measures anew first; `--list` names the benchmarks and their minutes, `--run all`
runs them all. Machines differ, and others use them too: ratios of one run mean more than figures of two. Conditions,
and what limits the figures: [benchmarks.md](benchmarks.md).

"""
_TABLE = "| | promise | target | measured | day, machine | command | |\n|---|---|---|---|---|---|---|\n"
MET, MISSED, UNKNOWN, NOT_BUILT = "met", "**missed**", "not measured", "not built"


def page(criteria: Criteria, scores: Mapping[str, Score]) -> str:
    rows = [row for name, one in criteria.criteria.items() for row in _rows(name, one, criteria, scores)]
    counts = [sum(row.endswith(f"| {verdict} |") for row in rows) for verdict in (MET, MISSED, UNKNOWN, NOT_BUILT)]
    summary = f"{counts[0]} met, {counts[1]} missed, {counts[2]} not measured, {counts[3]} not built.\n\n"
    return _HEAD + summary + _TABLE + "\n".join(rows) + "\n"


def _rows(name: str, one: Criterion, criteria: Criteria, scores: Mapping[str, Score]) -> Iterator[str]:
    label = f"{name} | {one.promise}"
    for key, figure in one.figures.items():
        score = scores.get(key)
        command = f"`{criteria.benchmarks[figure.benchmark].command}`"
        measured = f"{figure.what}: {_number(score.value)}{_unit(figure)}" if score else figure.what
        when = f"{score.day}, {score.machine}{f'; {score.note}' if score and score.note else ''}" if score else ""
        yield f"| {label} | {_target(figure)} | {measured} | {when} | {command} | {_verdict(figure, score)} |"
        label = " | "
    if one.tests:
        tests = ", ".join(f"`{test}`" for test in one.tests)
        yield f"| {label} | tests pass | {tests} | each run of `make test` | `make test` | {MET} |"
        label = " | "
    if one.not_here:
        yield f"| {label} | | {one.not_here} | | | {UNKNOWN} |"
        label = " | "
    if one.not_built:
        yield f"| {label} | | {one.not_built} | | | {NOT_BUILT} |"


def _verdict(figure: Figure, score: Score | None) -> str:
    met = figure.is_met(score.value) if score else None
    if score is None:
        return UNKNOWN
    return "" if met is None else MET if met else MISSED


def _target(figure: Figure) -> str:
    least, most = (None if bound is None else _number(bound) + _unit(figure) for bound in (figure.least, figure.most))
    if least and most:
        return least if least == most else f"{least} to {most}"
    if least is None and most is None:
        return ""
    return f"≥ {least}" if least else f"{most}" if figure.most == 0 else f"≤ {most}"


def _number(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 10000 else f"{value:.0f}"


def _unit(figure: Figure) -> str:
    return f" {figure.unit}" if figure.unit else ""
