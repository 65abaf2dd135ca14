"""The commands of `python -m loadtests`. Errors are one line; the status is 1 if the test could not run."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import click

from loadtests.lengths import MIXES
from loadtests.options import PROTOCOLS, Options
from loadtests.shapes import SHAPES

RESULTS = Path(__file__).with_name("results")
# Of the embedded model on a CPU, which computes some thousand tokens a second: the traces' shapes, shorter.
OWN_SCALE, OWN_USERS = 0.1, 4
MAX_KEYS = 1000


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
def main() -> None:
    """Load tests of Tidewright, or of any server that speaks OpenAI's API, by locust."""
    # A shell starts what runs in the background with SIGINT ignored, and so would be locust.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, _terminate)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # which nohup leaves
        signal.signal(signal.SIGHUP, _terminate)  # else what was started would outlive its terminal


def _terminate(*_: object) -> None:
    raise KeyboardInterrupt


def protocols_of(text: str) -> dict[str, int]:
    """Of "http:3,websocket:1".

    Raises:
        click.BadParameter: it is not written so.
    """
    found = {}
    for part in text.split(","):
        name, _, weight = part.strip().partition(":")
        if name not in PROTOCOLS or not (weight or "1").isdecimal() or not 1 <= int(weight or 1) <= 1000:
            raise click.BadParameter(f"{text!r} must be like http:3,websocket:1, of {', '.join(PROTOCOLS)}")
        found[name] = int(weight or 1)
    return found


def lengths_of(text: str) -> tuple[int, int]:
    """Of "128:64".

    Raises:
        click.BadParameter: it is not written so.
    """
    parts = [int(part) if part.isdecimal() and len(part) < 9 else 0 for part in text.split(":")]
    if len(parts) != 2 or not all(1 <= part <= 1 << 20 for part in parts):
        raise click.BadParameter(f"{text!r} must be like 128:64, tokens in and out")
    return parts[0], parts[1]


def keys_of(key: str | None, file: str | None) -> tuple[str, ...]:
    """One line a key."""
    if not file:
        return (key or "",)
    with open(file, encoding="utf-8") as lines:
        found = tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))
    if not 1 <= len(found) <= MAX_KEYS:
        raise click.ClickException(f"{file} must have 1 to {MAX_KEYS} keys, one a line, not {len(found)}")
    return found


def folder_of(output: str | None, name: str) -> Path:
    return Path(output) if output else RESULTS / f"{time.strftime('%Y%m%d-%H%M%S')}-{name}"


@main.command()
@click.option("--url", help="The gateway's. Without it, a server with the embedded model is started and measured.")
@click.option("--grpc", default="", metavar="HOST:PORT", help="A Triton's, for the protocol grpc.")
@click.option(
    "--protocols", default="http", show_default=True, help="And the weight of each: http:3,websocket:1,grpc:1"
)
@click.option("--model", default="", help="The gateway's first one if none is named.")
@click.option("--triton-model", default="decoder", show_default=True, help="Of the protocol grpc.")
@click.option("--key", envvar="TIDEWRIGHT_KEY", help="API key; better in the environment variable TIDEWRIGHT_KEY.")
@click.option("--keys-file", type=click.Path(exists=True, dir_okay=False), help="One API key a line: each is a tenant.")
@click.option("--mix", type=click.Choice(list(MIXES)), default="mixed", show_default=True, help="Of lengths.")
@click.option("--scale", type=click.FloatRange(0.001, 10), help="Of all lengths.  [default: 1; 0.1 for our own server]")
@click.option("--max-prompt", type=click.IntRange(1, 1 << 20), default=1 << 20, help="Longest prompt, in tokens.")
@click.option("--max-answer", type=click.IntRange(1, 1 << 20), default=1 << 20, help="Longest answer, in tokens.")
@click.option("--fixed", metavar="IN:OUT", help="Tokens of every request, in place of a mix: 128:64")
@click.option("--requests", type=click.IntRange(0, 1 << 30), default=0, help="End after so many; not with workers.")
@click.option("--shape", type=click.Choice(list(SHAPES)), default="ramp", show_default=True, help="Of the load.")
@click.option("--users", type=click.IntRange(1, 100_000), help="At the peak.  [default: 8; 4 for our own server]")
@click.option("--minutes", type=click.FloatRange(0.05, 7 * 24 * 60), default=2.0, show_default=True)
@click.option("--think", type=click.FloatRange(0, 3600), default=0.0, help="Seconds between two requests of a user.")
@click.option("--cancel-share", type=click.FloatRange(0, 1), default=0.0, help="Of requests that the client leaves.")
@click.option(
    "--silence", type=click.FloatRange(1, 3600), default=60.0, help="Seconds until a silent stream has failed."
)
@click.option(
    "--give-up", type=click.FloatRange(1, 3600), default=30.0, help="Seconds in which all fails until the end."
)
@click.option("--seed", type=int, default=0, help="The same seed draws the same requests.")
@click.option("--workers", type=click.IntRange(0, 256), default=0, help="Locust processes on this machine.")
@click.option(
    "--expect-workers", type=click.IntRange(0, 4096), default=0, help="Workers on other machines to wait for."
)
@click.option("--bind-port", type=click.IntRange(1, 65535), help="For them.  [default: 5557, or a free one]")
@click.option("--master-host", help="Be the workers of a master on that machine; it has all other options.")
@click.option("--watch", type=int, multiple=True, metavar="PID", help="Also of these processes: CPU and memory.")
@click.option("--output", type=click.Path(file_okay=False), help="Folder.  [default: a new one in loadtests/results]")
@click.option("--compare", nargs=2, metavar="OLD NEW", help="Only compare two reports (their JSON files).")
def run(
    compare: tuple[str, str] | None,
    master_host: str | None,
    bind_port: int | None,
    output: str | None,
    watch: tuple[int, ...],
    workers: int,
    expect_workers: int,
    url: str | None,
    protocols: str,
    key: str | None,
    keys_file: str | None,
    scale: float | None,
    users: int | None,
    minutes: float,
    fixed: str | None,
    requests: int,
    **others: object,
) -> None:
    """Load a server and report how it fared.

    \b
    Examples:
      python -m loadtests run
      python -m loadtests run --url http://10.0.0.1:8080 --users 64 --workers 4 --minutes 10
      python -m loadtests run --shape spike --protocols http:2,websocket:1,grpc:1
      python -m loadtests run --compare old/report.json new/report.json
    """
    from loadtests.driver import Fleet, worker
    from tidewright.bench.machine import free_ports

    if compare:
        _compare(Path(compare[0]), Path(compare[1]), Path(output) if output else None)
        return
    if master_host:
        sys.exit(worker(master_host, bind_port or 5557, workers))
    if requests and (workers or expect_workers):
        raise click.UsageError("--requests counts in one process: leave out --workers and --expect-workers")
    options = Options(
        url=(url or "").rstrip("/"),
        protocols=protocols_of(protocols),
        keys=keys_of(key, keys_file),
        scale=scale or (1.0 if url else OWN_SCALE),
        users=users or (8 if url else OWN_USERS),
        duration=60 * minutes,
        fixed=lengths_of(fixed) if fixed else None,
        requests=requests,
        **others,  # type: ignore[arg-type]
    )
    (port,) = free_ports(1) if workers and not expect_workers else (5557,)
    _load(options, Fleet(workers, expect_workers, bind_port or port), folder_of(output, options.shape), watch)


@contextlib.contextmanager
def errors_in_one_line() -> Iterator[None]:
    from loadtests.aiperf import AiperfError
    from loadtests.driver import LoadError
    from loadtests.preflight import TargetError
    from loadtests.report import ReportError
    from loadtests.servers import ServerError

    try:
        yield
    except (AiperfError, LoadError, TargetError, ReportError, ServerError, OSError) as error:
        raise click.ClickException(str(error)) from None
    except KeyboardInterrupt:
        raise click.ClickException("stopped before the load began: there is nothing to report") from None


def _load(options: Options, fleet: object, folder: Path, watch: tuple[int, ...]) -> None:
    from loadtests import session

    with errors_in_one_line():
        report = session.run(options, fleet, folder, watch)  # type: ignore[arg-type]
    if report["stopped"]:
        raise click.ClickException(report["stopped"])


def _compare(old: Path, new: Path, output: Path | None) -> None:
    from loadtests import comparison, report

    with errors_in_one_line():
        before, after = report.read(old), report.read(new)
        click.echo(comparison.text(before, after))
        page = (output or new.parent) / "comparison.html"
        page.parent.mkdir(parents=True, exist_ok=True)
        comparison.write(before, after, page)
    click.echo(f"Written: {page}", err=True)


@main.command()
@click.option("--minutes", type=click.FloatRange(0.25, 7 * 24 * 60), default=60.0, show_default=True)
@click.option("--users", type=click.IntRange(1, 1000), default=4, show_default=True)
@click.option("--scale", type=click.FloatRange(0.001, 10), default=OWN_SCALE, show_default=True, help="Of all lengths.")
@click.option(
    "--pause", type=click.FloatRange(0, 3600), default=45.0, show_default=True, help="Seconds between kills; 0: none."
)
@click.option("--threads", type=click.IntRange(0, 1024), default=1, show_default=True, help="Of each replica's engine.")
@click.option("--seed", type=int, default=0, help="Of traffic and kills.")
@click.option("--output", type=click.Path(file_okay=False), help="Folder.  [default: a new one in loadtests/results]")
def soak(minutes: float, users: int, scale: float, pause: float, threads: int, seed: int, output: str | None) -> None:
    """Mixed traffic for an hour over a gateway and two replicas, parts of which are killed.

    Ends with 1 if a promise was broken: availability, failed requests, streams without an end, memory and
    descriptors that grow.

    \b
    Examples:
      python -m loadtests soak --minutes 60
      python -m loadtests soak --minutes 5 --pause 0
    """
    from loadtests.soak import session

    options = Options(
        protocols={"http": 3, "websocket": 1},
        shape="soak",
        users=users,
        duration=60 * minutes,
        scale=scale,
        think=0.2,
        cancel_share=0.05,
        seed=seed,
    )
    with errors_in_one_line():
        report = session.run(options, pause, folder_of(output, "soak"), [f"--threads={threads}"])
    broken = [row for row in report["verdict"] if row["met"] is False]
    for row in report["verdict"]:
        word = {True: "met   ", False: "MISSED", None: "-     "}[row["met"]]
        click.echo(f"{word} {row['promise']}: {row['measured']} ({row['target']})")
    if report["stopped"]:
        raise click.ClickException(report["stopped"])
    if broken:
        raise click.ClickException(f"{len(broken)} of {len(report['verdict'])} promises were broken")


@main.command()
@click.option("--url", help="The gateway's. Without it, a server with the embedded model is started.")
@click.option(
    "--triton", metavar="HOST:PORT", help="Triton's HTTP in place of the gateway: by aiperf's endpoint type `template`."
)
@click.option("--model", default="", help="The gateway's first one if none is named.")
@click.option("--tokenizer", help="Folder of the model.  [default: that of the embedded one]")
@click.option("--key", envvar="TIDEWRIGHT_KEY", help="API key; better in the environment variable TIDEWRIGHT_KEY.")
@click.option("--requests", type=click.IntRange(1, 1_000_000), default=50, show_default=True)
@click.option("--concurrency", type=click.IntRange(1, 1000), default=2, show_default=True)
@click.option("--fixed", default="64:32", show_default=True, metavar="IN:OUT", help="Tokens of every request.")
@click.option("--output", type=click.Path(file_okay=False), help="Folder.  [default: a new one in loadtests/results]")
def aiperf(
    url: str | None,
    triton: str | None,
    model: str,
    tokenizer: str | None,
    key: str | None,
    requests: int,
    concurrency: int,
    fixed: str,
    output: str | None,
) -> None:
    """Run NVIDIA's aiperf, and then our own test with the same requests, against the same server.

    \b
    Examples:
      python -m loadtests aiperf
      python -m loadtests aiperf --url http://127.0.0.1:8080 --requests 200 --concurrency 8
      python -m loadtests aiperf --triton 127.0.0.1:8000
    """
    from loadtests import beside_aiperf

    prompt, answer = lengths_of(fixed)
    options = Options(
        url=(url or "").rstrip("/"),
        model=model,
        keys=(key or "",),
        fixed=(prompt, answer),
        requests=requests,
        users=concurrency,
        duration=3600.0,
    )
    with errors_in_one_line():
        beside_aiperf.run(options, triton or "", tokenizer or "", folder_of(output, "aiperf"))
