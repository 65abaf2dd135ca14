"""Timelines as a page of HTML that needs nothing else: no scripts, nothing loaded."""

from __future__ import annotations

from collections.abc import Mapping

from jinja2 import Environment, StrictUndefined

from tidewright.observe.summary import summary
from tidewright.observe.timeline import LogLine, Span, Timeline
from tidewright.observe.waterfall import MAX_TEXT, about, rows

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{{ title }}</title>
<style>
body { font: 14px/1.5 system-ui, sans-serif; margin: 2rem; color: #1b1f24; background: #fff }
table { border-collapse: collapse; width: 100%; margin-top: 1rem }
td, th { padding: .15rem .5rem; text-align: left; vertical-align: top; border-bottom: 1px solid #e3e6ea }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
td.bars { width: 40%; min-width: 16rem }
.bar { height: .9rem; margin-top: .2rem; border-radius: 2px; background: #3b82c4; min-width: 2px }
.failed .bar { background: #c2413b }
.failed, .error, .critical { color: #a3241f }
.warning { color: #8a5a00 }
.event, .about, .debug, dt { color: #667 }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0 1rem; margin: 0 }
dd { margin: 0 }
</style>
</head>
<body>
<h1>{{ title }}</h1>
{% for part in parts %}{% if part.title %}<h2>{{ part.title }}</h2>
{% endif %}<dl>
{% for name, value in part.summary %}<dt>{{ name }}</dt><dd>{{ value }}</dd>
{% endfor %}</dl>
<table>
<tr><th>ms</th><th>took</th><th>where</th><th></th><th>what</th></tr>
{% for row in part.rows %}<tr class="{{ row.style }}"><td class="number">{{ row.at }}</td><td class="number">{{ row.took }}</td>
<td>{{ row.where }}</td><td class="bars">{% if row.width %}<div class="bar" style="margin-left: {{ row.left }}%; width: {{ row.width }}%"></div>{% endif %}</td>
<td style="padding-left: {{ row.indent }}rem">{{ row.what }} <span class="about">{{ row.about }}</span></td></tr>
{% endfor %}</table>
{% endfor %}</body>
</html>
"""  # noqa: E501


def page(timelines: Mapping[str, Timeline], title: str) -> str:
    """`timelines`: each with its own title, which may be empty."""
    template = Environment(autoescape=True, undefined=StrictUndefined).from_string(_PAGE)
    parts = [
        {
            "title": own,
            "summary": summary(timeline),
            "rows": [_row(*row, timeline) for row in rows(timeline)],
        }
        for own, timeline in timelines.items()
    ]
    return template.render(title=title, parts=parts)


def _row(at: float, depth: int, content: Span | LogLine | str, timeline: Timeline) -> dict[str, str | float]:
    row: dict[str, str | float] = {"at": f"{1000 * (at - timeline.began):.1f}", "indent": 0.5 + depth, "style": ""}
    row |= {"took": "", "where": "", "left": 0.0, "width": 0.0, "about": ""}
    if isinstance(content, Span):
        total = max(timeline.ended - timeline.began, 1e-9)
        left = 100 * (content.began - timeline.began) / total
        return row | {
            "style": "failed" if content.error is not None else "",
            "took": f"{1000 * content.seconds:.1f}",
            "where": content.service,
            "left": round(left, 3),
            "width": round(max(min(100 * content.seconds / total, 100 - left), 0.1), 3),
            "what": content.name,
            "about": about(content).plain.strip(),
        }
    if isinstance(content, LogLine):
        what = f"{content.event} {content.message}"[:MAX_TEXT]
        level = content.level if content.level in ("debug", "warning", "error", "critical") else ""
        return row | {"style": level, "where": content.process, "what": what}
    return row | {"style": "event", "what": f"· {content}"[:MAX_TEXT]}
