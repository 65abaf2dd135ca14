"""`tidewright top` at a real gateway."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from click.testing import CliRunner
from prometheus_client import CollectorRegistry, start_http_server

from helpers.gateway import RunningGateway
from tidewright.launch.cli import main


def top(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(main, ["top", *arguments, "--once", "--interval", "0.2"])
    return done.exit_code, done.output


def test_it_shows_a_gateway_and_names_what_does_not_answer(echo_gateway: RunningGateway) -> None:
    code, text = top(echo_gateway.url, "127.0.0.1:1")
    assert code == 0
    assert "requests/s" in text
    assert "127.0.0.1:1 can't be reached" in " ".join(text.split())


def test_without_any_that_answers_it_says_what_to_give(echo_gateway: RunningGateway) -> None:
    code, text = top("127.0.0.1:1", f"{echo_gateway.url}/health")
    assert code == 1
    assert "can't be reached" in text
    assert "answered with status 404" in text
    assert "Give the address of a gateway" in text


def test_an_endpoint_of_something_else_is_no_success() -> None:
    with other_metrics() as url:
        code, text = top(url)
    assert code == 1
    assert "no metrics of a gateway or Triton" in text


@contextmanager
def other_metrics() -> Iterator[str]:
    server, thread = start_http_server(0, "127.0.0.1", CollectorRegistry())
    try:
        yield f"http://me:secret@127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()


def test_a_password_in_an_address_is_not_shown() -> None:
    with other_metrics() as url:
        assert "secret" not in top(url)[1]


def test_addresses_that_are_none(echo_gateway: RunningGateway) -> None:
    for url in ("http://[::1", "ftp://x", "http://a b", ""):
        code, text = top(url)
        assert code == 1, text
        assert "Traceback" not in text


def test_ctrl_c_ends_it(echo_gateway: RunningGateway) -> None:
    # The handler that the parent has may be to ignore it, which a child inherits.
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    code += "from tidewright.launch.cli import main; main()"
    command = [sys.executable, "-c", code, "top", echo_gateway.url, "--interval", "0.2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 0
    assert b"Traceback" not in errors
