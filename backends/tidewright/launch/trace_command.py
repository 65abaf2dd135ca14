"""`tidewright trace`: one request over all processes, from spans and log lines."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from tidewright.observe.records import Found

PIPE_WIDTH = 200  # characters, where the output is no terminal
MAX_SHOWN = 10  # requests of one id
STDIN = "-"
MAX_STDIN = 4 * 2**30  # bytes
_CHUNK = 2**20
_MAX_ID = 160  # characters; a request's id has 128, and the number of a generation


@click.command()
@click.argument("wanted", metavar="REQUEST_OR_TRACE_ID")
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@click.option("--html", type=click.Path(dir_okay=False), metavar="FILE", help="Also write the timeline as a page.")
def trace(wanted: str, sources: tuple[str, ...], html: str | None) -> None:
    """Show one request over all processes: where its time went, which limits, replicas, retries, and who served it.

    The id is that of the response's X-Request-Id, or of a trace. A SOURCE is a file, - for standard input, or the
    address of a tracing backend (Jaeger's query API or Phoenix). Files hold log lines (--log-format json, the access
    log) or spans (the gateway's otlp_endpoint: file:///...), in any mixture; rotated ones may be gzipped.

    If several requests have the id, as when a caller sends the same X-Request-Id again, each is shown, newest first.

    Without spans, as of a request that was not sampled, the log lines alone make the timeline.

    \b
    Examples:
      tidewright trace 9c66aa020bae2fb8b1d72937 /var/log/tidewright/*.log /var/log/tidewright/traces.jsonl
      tidewright trace 4bf92f3577b34da6a3ce929d0e0e4736 http://jaeger:16686 /var/log/tidewright/*.log --html slow.html
      kubectl logs -l app.kubernetes.io/name=tidewright --tail=-1 | tidewright trace 9c66aa020bae2fb8b1d72937 -
    """
    from tidewright.launch.terminal import output_console
    from tidewright.observe.backends import BackendError, is_trace_id
    from tidewright.observe.page import page
    from tidewright.observe.records import MAX_FOUND, RecordsError
    from tidewright.observe.requests import timelines, trace_of
    from tidewright.observe.waterfall import waterfall

    wanted = wanted.strip()
    if is_trace_id(wanted.lower()):
        wanted = wanted.lower()
    if not wanted or len(wanted) > _MAX_ID or not wanted.isascii():
        raise click.UsageError(f"an id is of 1 to {_MAX_ID} ASCII characters")
    try:
        with _files(sources) as files:
            found, is_trace = _find(wanted, files, [source for source in sources if "://" in source])
    except (RecordsError, BackendError) as error:
        raise click.ClickException(str(error)) from None
    if not (found.spans or found.lines):
        hint = "is the id right, does the file reach back that far, and was it written with --log-format json?"
        raise click.ClickException(f"nothing of {wanted} in {', '.join(sources)}; {hint}")
    found_all = timelines(found, None if is_trace else wanted)
    shown, several = found_all[:MAX_SHOWN], len(found_all) > 1
    console = output_console(PIPE_WIDTH)
    if several:
        left_out = f", of which the {MAX_SHOWN} newest are shown" if len(found_all) > MAX_SHOWN else ""
        console.print(
            f"{len(found_all)} requests have this id{left_out}; the newest comes first. A trace's id shows one alone."
        )
    titled = {f"Trace {trace_of(timeline)}" if several else "": timeline for timeline in shown}
    for own_title, timeline in titled.items():
        if several:
            console.rule(own_title)
        console.print(waterfall(timeline))
    if found.left_out:
        click.echo(f"There is more than the {MAX_FOUND} spans and lines shown.", err=True)
    if html:
        try:
            title = f"Trace {wanted}" if is_trace else f"Request {wanted}"
            Path(html).write_text(page(titled, title), "utf-8")
        except OSError as error:
            raise click.ClickException(f"{html}: {error.strerror}") from None


@contextlib.contextmanager
def _files(sources: tuple[str, ...]) -> Iterator[list[Path]]:
    """The sources that are files. Standard input becomes one, as they are searched twice."""
    files = [Path(source) for source in sources if "://" not in source and source != STDIN]
    if STDIN not in sources:
        yield files
        return
    stdin, size = sys.stdin.buffer, 0
    first = stdin.read(_CHUNK)
    with tempfile.NamedTemporaryFile(suffix=".gz" if first[:2] == b"\x1f\x8b" else "") as copy:
        while first:
            if (size := size + len(first)) > MAX_STDIN:
                raise click.ClickException(f"standard input has more than {MAX_STDIN} bytes; give a file")
            try:
                copy.write(first)
            except OSError as error:
                raise click.ClickException(f"standard input can't be kept in {copy.name}: {error.strerror}") from None
            first = stdin.read(_CHUNK)
        copy.flush()
        yield [*files, Path(copy.name)]


def _find(wanted: str, files: list[Path], urls: list[str]) -> tuple[Found, bool]:
    """What the sources have, and whether `wanted` is a trace's id. The trace of a request takes a second search."""
    from tidewright.observe.backends import ask
    from tidewright.observe.records import search

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
