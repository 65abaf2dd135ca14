"""`tidewright worker`: the tensor-parallel ranks of a host other than the one that serves."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import types
from typing import get_args

import click
from rich.markup import escape

from tidewright import logs
from tidewright.cache import EMBEDDED_MODEL
from tidewright.distributed.rank import REFUSED, UNREACHABLE
from tidewright.distributed.secret import SecretFileError, rendezvous_secret
from tidewright.engine.messages import parse_rendezvous
from tidewright.launch.errors import LaunchError
from tidewright.launch.prepare import prepare
from tidewright.launch.terminal import Terminal

FIRST_WAIT, LONGEST_WAIT = 0.2, 5.0  # seconds until the ranks are started again
POLL_INTERVAL = 0.05  # seconds
KNOCK_INTERVAL, KNOCK_TIMEOUT = 0.5, 2.0  # seconds; looking for rank 0


class _Stopped(BaseException):
    """Ctrl-C or SIGTERM."""


@click.command()
@click.option("--rendezvous", required=True, metavar="HOST:PORT", help="What rank 0 was given as --rendezvous.")
@click.option(
    "--node-rank", required=True, type=click.IntRange(1), help="Number of this host; the one that serves is host 0."
)
@click.option("--ranks", type=click.IntRange(1), default=1, show_default=True, help="Ranks of this host: its GPUs.")
@click.option(
    "--rendezvous-secret-file",
    default="",
    metavar="FILE",
    envvar="TIDEWRIGHT_RENDEZVOUS_SECRET_FILE",
    help="File with the secret that rank 0 was given. Empty: none, for a rendezvous on the loopback.",
)
@click.option("--model", default=EMBEDDED_MODEL, show_default=True, help="As given to `tidewright serve`.")
@click.option(
    "--log-format",
    type=click.Choice(get_args(logs.LogFormat)),
    default="text",
    show_default=True,
    envvar=logs.FORMAT_VARIABLE,
    help="Format of log lines: text, or one JSON object each.",
)
@click.option(
    "--log-level",
    type=click.Choice(get_args(logs.LogLevel)),
    default="info",
    show_default=True,
    envvar=logs.LEVEL_VARIABLE,
    help="Minimum log level.",
)
def worker(
    rendezvous: str,
    node_rank: int,
    ranks: int,
    rendezvous_secret_file: str,
    model: str,
    log_format: logs.LogFormat,
    log_level: logs.LogLevel,
) -> None:
    """Compute a share of a model that another host serves, until Ctrl-C.

    Waits for the serving host, joins it, and does so again whenever it was lost. All hosts need the same version of
    Tidewright and the same model, and reach each other on all ports. Rank 0 and the ranks prove to each other that
    they know the secret of --rendezvous-secret-file; what they say then is neither encrypted nor authenticated, so it
    belongs on a private network.

    \b
    Example, one model over two hosts of four GPUs each:
      both:    export TIDEWRIGHT_RENDEZVOUS_SECRET_FILE=/etc/tidewright/rendezvous
      host 0:  tidewright serve --tensor-parallel-size 8 --nodes 2 --rendezvous 10.0.0.1:29400
      host 1:  tidewright worker --rendezvous 10.0.0.1:29400 --node-rank 1 --ranks 4
    """
    try:
        host, _ = parse_rendezvous(rendezvous)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--rendezvous") from None
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    terminal = Terminal("worker", log_format, log_level)
    os.environ.update({logs.FORMAT_VARIABLE: log_format, logs.LEVEL_VARIABLE: log_level})
    try:
        # Each rank does so again; a mistake shows before the model is prepared.
        rendezvous_secret(rendezvous_secret_file, host)
        folder = prepare(model, terminal.console)
        terminal.say(f"Waiting for rank 0 at {rendezvous}. Ctrl-C stops.", "note")
        numbers = range(node_rank * ranks, (node_rank + 1) * ranks)
        _run(rendezvous, numbers, [str(folder), rendezvous_secret_file], terminal)
    except (LaunchError, SecretFileError) as error:
        terminal.fail(str(error), "start_failed", markup=f"Error: {escape(str(error))}")
        sys.exit(1)
    except _Stopped:
        sys.exit(0)


def _stop(number: int, frame: types.FrameType | None) -> None:
    raise _Stopped


def _run(rendezvous: str, ranks: range, files: list[str], terminal: Terminal) -> None:
    """Starts the ranks again and again, together: one alone can't go on.

    `files`: the model's folder, and the file of the secret or "".
    """
    wait = FIRST_WAIT
    while True:
        _await_rank_0(rendezvous, terminal)
        started = time.monotonic()
        code = _run_once(rendezvous, ranks, files)
        if code == REFUSED:
            raise LaunchError("a rank of this host can't join rank 0; the line above says why")
        if code != UNREACHABLE:
            terminal.say("The group has ended; waiting for the next one.", "rank_lost")
        if time.monotonic() - started > 10 * LONGEST_WAIT:
            wait = FIRST_WAIT
        time.sleep(wait)
        wait = min(2 * wait, LONGEST_WAIT)


def _await_rank_0(rendezvous: str, terminal: Terminal) -> None:
    """Until somebody listens there; says once what is in the way. That nobody listens yet is not worth a word."""
    address, known = parse_rendezvous(rendezvous), set[str]()
    while True:
        try:
            socket.create_connection(address, KNOCK_TIMEOUT).close()
            return
        except ConnectionRefusedError:
            known.clear()
        except OSError as error:
            problem = error.strerror or str(error)
            if problem not in known:  # silence and "no route" come by turns
                terminal.say(f"Can't reach rank 0 at {rendezvous}: {problem}. Trying until it works.", "rank_lost")
            known.add(problem)
        time.sleep(KNOCK_INTERVAL)


def _run_once(rendezvous: str, ranks: range, files: list[str]) -> int:
    """Runs the ranks until the first of them ends; returns its exit code."""
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for local_rank, rank in enumerate(ranks):
            command = [sys.executable, "-m", "tidewright.distributed.rank", rendezvous, str(rank), str(local_rank)]
            # A session of its own: Ctrl-C is for this process to pass on.
            processes.append(subprocess.Popen(command + files, stdin=subprocess.DEVNULL, start_new_session=True))
        while True:
            for process in processes:
                if (code := process.poll()) is not None:
                    return code
            time.sleep(POLL_INTERVAL)
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()
