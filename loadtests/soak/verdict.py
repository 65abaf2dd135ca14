"""Which promises a soak kept. Pure: from the report's figures to rows of promise, measured, target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from loadtests.resources import LOAD_GENERATOR
from loadtests.samples import SILENT, UNENDED

AVAILABILITY = 0.999
ERROR_RATE = 0.001
MIB_PER_MINUTE = 0.1
DESCRIPTORS_PER_MINUTE = 0.1
LONG_ENOUGH = 600.0
"""Seconds after which growth says something: caches and pools have filled."""


def unended(errors: Mapping[str, int]) -> int:
    """Streams that nobody ended."""
    return sum(count for error, count in errors.items() if error.startswith((SILENT, UNENDED)))


def verdict(report: Mapping[str, Any], availability: float | None) -> list[dict[str, Any]]:
    """`met` is None where nothing could be measured."""
    rate = report["summary"]["error_rate"]
    rows = [
        _row("availability: one token, once a second", availability, f">= {AVAILABILITY:.1%}", _at_least(availability)),
        _row("requests that failed", rate, f"< {ERROR_RATE:.1%}", rate < ERROR_RATE),
        _row("streams without an end", unended(report["errors"]), "0", unended(report["errors"]) == 0),
        _row(
            "replicas that did not come back",
            sum(kill["recovered_after"] is None for kill in report["kills"]),
            "0",
            all(kill["recovered_after"] is not None for kill in report["kills"]),
        ),
    ]
    for one in long_lived(report["processes"]):
        name = f"{one['name']} ({one['pid']})"
        for field, unit, most in (
            ("mib_per_minute", "MiB", MIB_PER_MINUTE),
            ("descriptors_per_minute", "descriptors", DESCRIPTORS_PER_MINUTE),
        ):
            met = None if one[field] is None or one["seconds"] < LONG_ENOUGH else one[field] < most
            rows.append(_row(f"{unit} a minute, {name}", one[field], f"< {most}", met))
    return rows


def long_lived(processes: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The last of each name, but for the load generator: what was killed before had its own end."""
    last: dict[str, Mapping[str, Any]] = {}
    for one in processes:
        if not one["name"].startswith(LOAD_GENERATOR):
            known = last.get(one["name"])
            if known is None or one["seconds"] > known["seconds"]:
                last[one["name"]] = one
    return list(last.values())


def _at_least(availability: float | None) -> bool | None:
    return None if availability is None else availability >= AVAILABILITY


def _row(promise: str, measured: float | None, target: str, met: bool | None) -> dict[str, Any]:
    return {"promise": promise, "measured": measured, "target": target, "met": met}
