"""Renews the tables of docs/logging.md from the code: `python docs/make_logging_tables.py`."""

from __future__ import annotations

import re
from pathlib import Path

from tidewright.logs import EVENTS, FIELDS
from tidewright_gateway.http import access_log

PAGE = Path(__file__).parent / "logging.md"
TABLES = {"Fields": ("field", FIELDS), "The access log": ("field", access_log.FIELDS), "Events": ("event", EVENTS)}


def renewed(page: str) -> str:
    for heading, (kind, catalogue) in TABLES.items():
        rows = "".join(f"| `{name}` | {meaning} |\n" for name, meaning in catalogue.items())
        table = f"| {kind} | meaning |\n|---|---|\n{rows}"
        pattern = rf"(\n## {heading}\n.*?)\| {kind} \| meaning \|\n(?:\|[^\n]*\n)*"
        page = re.sub(pattern, lambda match, table=table: match[1] + table, page, count=1, flags=re.DOTALL)
    return page


if __name__ == "__main__":
    PAGE.write_text(renewed(PAGE.read_text()))
