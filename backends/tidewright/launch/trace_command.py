"""`tidewright trace`: one request over all processes, from spans and log lines."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from tidewright.observe.records import Found

PIPE_WIDTH = 200  # characters, where the output is no terminal
_MAX_ID = 160  # characters; a request's id has 128, and the number of a generation


@click.command()
@click.argument("wanted", metavar="REQUEST_OR_TRACE_ID")
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@click.option("--html", type=click.Path(dir_okay=False), metavar="FILE", help="Also write the timeline as a page.")
def trace(wanted: str, sources: tuple[str, ...], html: str | None) -> None:
    """Show one request over all processes: where its time went, which limits, replicas, retries, and who served it.

    The id is that of the response's X-Request-Id, or of a trace. A SOURCE is a file, or the address of a tracing
    backend (Jaeger's query API or Phoenix). Files hold log lines (--log-format json, the access log) or spans (the
    gateway's otlp_endpoint: file:///...), in any mixture; rotated ones may be gzipped.

    Without spans, as of a request that was not sampled, the log lines alone make the timeline.

    \b
    Examples:
      tidewright trace 9c66aa020bae2fb8b1d72937 /var/log/tidewright/*.log /var/log/tidewright/traces.jsonl
      tidewright trace 4bf92f3577b34da6a3ce929d0e0e4736 http://jaeger:16686 /var/log/tidewright/*.log --html slow.html
    """
    from tidewright.launch.terminal import output_console
    from tidewright.observe.backends import BackendError, is_trace_id
    from tidewright.observe.page import page
    from tidewright.observe.records import MAX_FOUND, RecordsError
    from tidewright.observe.timeline import make_timeline
    from tidewright.observe.waterfall import waterfall

    wanted = wanted.strip()
    if is_trace_id(wanted.lower()):
        wanted = wanted.lower()
    if not wanted or len(wanted) > _MAX_ID or not wanted.isascii():
        raise click.UsageError(f"an id is of 1 to {_MAX_ID} ASCII characters")
    try:
        found, is_trace = _find(wanted, sources)
    except (RecordsError, BackendError) as error:
        raise click.ClickException(str(error)) from None
    if not (found.spans or found.lines):
        hint = "is the id right, does the file reach back that far, and was it written with --log-format json?"
        raise click.ClickException(f"nothing of {wanted} in {', '.join(sources)}; {hint}")
    timeline = make_timeline(found.spans, found.lines, None if is_trace else wanted)
    output_console(PIPE_WIDTH).print(waterfall(timeline))
    if found.left_out:
        click.echo(f"There is more than the {MAX_FOUND} spans and lines shown.", err=True)
    if html:
        try:
            Path(html).write_text(page(timeline, f"Request {wanted}" if not is_trace else f"Trace {wanted}"), "utf-8")
        except OSError as error:
            raise click.ClickException(f"{html}: {error.strerror}") from None


def _find(wanted: str, sources: tuple[str, ...]) -> tuple[Found, bool]:
    """What the sources have, and whether `wanted` is a trace's id. The trace of a request takes a second search."""
    from tidewright.observe.backends import ask
    from tidewright.observe.records import search

    files = [Path(source) for source in sources if "://" not in source]
    urls = [source for source in sources if "://" in source]
    found = search(files, wanted)
    for url in urls:
        found.spans += ask(url, wanted)
    if any(span.trace_id == wanted for span in found.spans) or any(
        line.facts.get("trace_id") == wanted for line in found.lines
    ):
        return found, True
    for trace_id in found.traces_of(wanted):
        of_trace = search(files, trace_id)
        found.spans += of_trace.spans
        # Other requests of the trace have lines of their own, which name them.
        found.lines += [line for line in of_trace.lines if "request_id" not in line.facts]
        for url in urls:
            found.spans += ask(url, trace_id)
    return found, False
