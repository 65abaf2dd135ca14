"""A timeline in the terminal: a bar for each span, with events and log lines where they happened."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tidewright.observe.summary import summary
from tidewright.observe.timeline import LogLine, Span, Timeline

BAR = 32  # characters
MAX_TEXT = 300  # characters of a message
_LEVELS = {"warning": "yellow", "error": "bold red", "critical": "bold red", "debug": "dim"}


class Row(NamedTuple):
    at: float
    depth: int
    content: Span | LogLine | str
    """A span, a log line, or an event in words."""


def rows(timeline: Timeline) -> list[Row]:
    """In order of time; a span's events and the lines come after what began before them."""
    found: list[Row] = []
    for node in timeline.nodes:
        found.append(Row(node.span.began, node.depth, node.span))
        found += (Row(event.at, node.depth + 1, _event(event.name, event.attributes)) for event in node.span.events)
    found += (Row(line.at, 0, line) for line in timeline.lines)
    return sorted(found, key=lambda row: row.at)


def _event(name: str, attributes: object) -> str:
    return f"{name} {attributes}" if attributes else name


def waterfall(timeline: Timeline) -> RenderableType:
    table = Table(box=None, padding=(0, 1), expand=True)
    table.add_column("ms", justify="right", no_wrap=True)
    table.add_column("took", justify="right", no_wrap=True)
    table.add_column("where", no_wrap=True)
    table.add_column("", no_wrap=True, width=BAR)
    table.add_column("what", ratio=1, overflow="fold")
    for row in rows(timeline):
        at = f"{1000 * (row.at - timeline.began):.1f}"
        if isinstance(row.content, Span):
            span = row.content
            style = "bold red" if span.error is not None else "bold" if row.depth == 0 else ""
            name = Text("  " * row.depth + span.name, style=style) + about(span)
            table.add_row(at, f"{1000 * span.seconds:.1f}", span.service, bar(span, timeline), name)
        elif isinstance(row.content, LogLine):
            line = row.content
            said = Text(f"{line.event} {line.message}"[:MAX_TEXT], style=_LEVELS.get(line.level, ""))
            table.add_row(at, "", line.process, Text(line.level, style="dim"), said)
        else:
            happened = Text("  " * row.depth + f"· {row.content}"[:MAX_TEXT], style="dim")
            table.add_row(at, "", "", "", happened)
    head = Table(show_header=False, box=None, padding=(0, 1))
    for word, value in summary(timeline):
        head.add_row(Text(word, style="dim"), Text(value))
    return Group(head, "", table)


def bar(span: Span, timeline: Timeline) -> Text:
    total = max(timeline.ended - timeline.began, 1e-9)
    left = min(int(BAR * (span.began - timeline.began) / total), BAR - 1)
    length = min(max(round(BAR * span.seconds / total), 1), BAR - left)
    return Text(" " * left + "━" * length, style="red" if span.error is not None else "cyan")


def about(span: Span) -> Text:
    """What is worth a word beside the name of a span."""
    return Text("".join(f"  {word}" for word in _words(span)), style="dim")


def _words(span: Span) -> Iterator[str]:
    for name in ("replica", "model", "outcome"):
        if value := span.attributes.get(f"tidewright.{name}"):
            yield str(value)
    for name, word in (
        ("tidewright.choice", "choice"),
        ("tidewright.tokens_before", "after tokens"),
        ("tidewright.prefill.chunks", "chunks"),
        ("gen_ai.usage.cache_read.input_tokens", "cached"),
        ("http.response.status_code", "status"),
    ):
        if name in span.attributes:
            yield f"{word} {span.attributes[name]}"
    if span.error and span.error != span.attributes.get("tidewright.outcome"):
        yield span.error[:MAX_TEXT]
