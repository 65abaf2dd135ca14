"""Writes a report: all figures as JSON, and a page that needs nothing beside itself. Reads the JSON again."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from loadtests.figures import VERSION

TEMPLATES = Path(__file__).with_name("templates")
MAX_FILE = 256 * 2**20  # bytes


class ReportError(Exception):
    """A file is no report; the message says why."""


def write(report: Mapping[str, Any], folder: Path) -> tuple[Path, Path]:
    """The page and the JSON file, `report.html` and `report.json`."""
    from loadtests import charts

    folder.mkdir(parents=True, exist_ok=True)
    page, data = folder / "report.html", folder / "report.json"
    data.write_text(json.dumps(report, indent=1), encoding="utf-8")
    page.write_text(render("report.html.j2", report=report, pictures=charts.draw(report)), encoding="utf-8")
    return page, data


def render(template: str, pictures: Mapping[str, bytes], **values: Any) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["figure"] = figure
    environment.filters["when"] = lambda seconds: time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))
    encoded = {title: base64.b64encode(png).decode() for title, png in pictures.items()}
    return environment.get_template(template).render(pictures=encoded, **values)


def figure(value: float | None) -> str:
    """A number as people read it; a dash for none."""
    if value is None:
        return "–"
    if isinstance(value, int) or (value == int(value) and abs(value) >= 100):
        return f"{int(value):,}"
    return f"{value:.1f}" if abs(value) >= 100 else f"{value:.3g}"


def read(path: Path) -> dict[str, Any]:
    """
    Raises:
        ReportError: it is not there, or no report of this version.
    """
    try:
        if path.stat().st_size > MAX_FILE:
            raise ReportError(f"{path} is larger than {MAX_FILE // 2**20} MiB: no report of a load test")
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ReportError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise ReportError(f"{path} is no JSON: {error}") from None
    if not isinstance(found, dict) or not {"version", "summary", "cdf_ms", "groups", "knee", "options"} <= found.keys():
        raise ReportError(f"{path} is no report of a load test")
    if found["version"] != VERSION:
        raise ReportError(f"{path} has version {found['version']}, not {VERSION}: make it again with this version")
    return found
