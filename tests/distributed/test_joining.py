"""Ranks of other hosts, started by hand: who may join, and what is said of those that do not come or do not fit."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from helpers.engine_process import (
    PATIENCE,
    Bridge,
    bridge,
    config,
    hear_failed,
    hear_ready,
    submit,
    tokens_of,
)
from tidewright.bench.machine import free_ports
from tidewright.distributed.fingerprint import model_fingerprint
from tidewright.distributed.handshake import Frames, SecretMismatchError, introduce
from tidewright.distributed.rank_messages import Hello, Refused, decode_from_leader
from tidewright.distributed.ranks import Ranks
from tidewright.engine.messages import Failed, encode


@contextmanager
def two_hosts(model: Path, **changes: Any) -> Iterator[tuple[Bridge, str]]:
    """Rank 0, waiting for rank 1 of another host; and where."""
    address = f"127.0.0.1:{free_ports(1)[0]}"
    with bridge() as started:
        started.begin(config(model, tensor_parallel_size=2, nodes=2, rendezvous=address, **changes))
        yield started, address


@contextmanager
def rank(
    address: str,
    number: int,
    model: Path,
    program: tuple[str, ...] = ("-m", "tidewright.distributed.rank"),
    secret_file: str = "",
) -> Any:
    host, port = address.split(":")
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex((host, int(port))) == 0:
                break
        time.sleep(0.05)
    command = [sys.executable, *program, address, str(number), "0", str(model), secret_file]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def ask_to_join(address: str, hello: Hello | bytes, secret: bytes | None = None) -> str | None:
    """What a rank is told; None if it is hung up on."""
    host, port = address.split(":")
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            connected = socket.create_connection((host, int(port)))
            break
        except ConnectionRefusedError:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    if isinstance(hello, Hello):
        introduce(Frames(connected, deadline), secret)
        connected.settimeout(None)
    connection = Connection(connected.detach())
    connection.send_bytes(hello if isinstance(hello, bytes) else encode(hello))
    try:
        answer = decode_from_leader(connection.recv_bytes())
    except (EOFError, ConnectionResetError):
        return None
    assert isinstance(answer, Refused)
    return answer.message


def other_weights(model: Path, folder: Path) -> Path:
    """A copy whose files have the same names and sizes."""
    shutil.copytree(model, folder)
    for file in folder.glob("*.safetensors"):
        file.write_bytes(os.urandom(file.stat().st_size))
    return folder


@pytest.mark.heavy
def test_who_does_not_belong_is_refused_and_the_group_still_comes_together(
    checkpoint: tuple[Path, Any], tmp_path: Path
) -> None:
    model, version = model_fingerprint(checkpoint[0]), "0.1.0"
    other = model_fingerprint(other_weights(checkpoint[0], tmp_path / "other"))
    with two_hosts(checkpoint[0]) as (started, address):
        assert "of another version than rank 0" in str(ask_to_join(address, b"\x00GET / HTTP/1.1"))
        # As a rank began before there was a handshake.
        assert "of another version than rank 0" in str(ask_to_join(address, encode(Hello(1, version, model))))
        # Hung up on without being read, so the reason may be lost.
        assert ask_to_join(address, b"x" * 100_000) in (
            None,
            "it is of another version than rank 0; install the same on all hosts",
        )
        assert "there is no rank 2: tensor_parallel_size is 2" in str(ask_to_join(address, Hello(2, version, model)))
        assert "there is no rank 0" in str(ask_to_join(address, Hello(0, version, model)))
        assert "rank 1 runs Tidewright 9.9" in str(ask_to_join(address, Hello(1, "9.9", model)))
        assert "rank 1 has another model" in str(ask_to_join(address, Hello(1, version, other)))
        with rank(address, 1, checkpoint[0]):
            hear_ready(started)
            assert len(tokens_of(started, [submit(1)])[1]) == 4


@pytest.mark.heavy
def test_only_ranks_that_know_the_secret_are_heard(checkpoint: tuple[Path, Any], tmp_path: Path) -> None:
    """And rank 0 goes on waiting, and logs each that was refused."""
    file = tmp_path / "secret"
    file.write_text("0123456789abcdef\n")
    hello = Hello(1, "0.1.0", model_fingerprint(checkpoint[0]))
    with two_hosts(checkpoint[0], rendezvous_secret_file=str(file)) as (started, address):
        with pytest.raises(SecretMismatchError, match="is not rank 0's"):
            ask_to_join(address, hello, b"0123456789abcdeX")
        with pytest.raises(SecretMismatchError, match="rank 0 asks for a rendezvous secret, and this rank has none"):
            ask_to_join(address, hello)
        assert "there is no rank 9" in str(ask_to_join(address, Hello(9, "0.1.0", ""), b"0123456789abcdef"))
        with rank(address, 1, checkpoint[0], secret_file=str(file)):
            hear_ready(started)
            assert len(tokens_of(started, [submit(1)])[1]) == 4
        started.process.kill()
        assert started.process.stderr is not None
        said = started.process.stderr.read().decode()
    assert said.count("a connection from 127.0.0.1 was refused: ") == 3


def test_a_secret_that_can_t_be_read_ends_the_start_with_the_reason(checkpoint: tuple[Path, Any]) -> None:
    with bridge() as started:
        started.begin(config(checkpoint[0], tensor_parallel_size=2, rendezvous_secret_file="/nowhere/secret"))
        assert hear_failed(started) == "can't read the rendezvous secret /nowhere/secret: No such file or directory"
        assert started.exit_code() == 1


@pytest.mark.heavy
def test_a_rank_that_does_not_come_is_named_with_the_command_that_starts_it(checkpoint: tuple[Path, Any]) -> None:
    with two_hosts(checkpoint[0], start_timeout=3.0) as (started, address):
        message = hear_failed(started)
        assert message.startswith(f"no rank 1 came to {address} within 2.4 s")
        assert f"tidewright worker --rendezvous {address} --node-rank 1 --ranks 1" in message
        assert started.exit_code() == 1


@pytest.mark.heavy
def test_a_rank_that_can_t_load_its_weights_ends_the_start_with_its_reason(
    checkpoint: tuple[Path, Any], tmp_path: Path
) -> None:
    """Its files are broken where the fingerprint did not look."""
    broken = other_weights(checkpoint[0], tmp_path / "broken")
    program = (
        "-c",
        "import sys; from tidewright.distributed import rank\n"
        f"rank.model_fingerprint = lambda folder: {model_fingerprint(checkpoint[0])!r}\n"
        "sys.exit(rank.main())",
    )
    with two_hosts(checkpoint[0]) as (started, address), rank(address, 1, broken, program):
        assert "rank 1: " in (message := hear_failed(started))
        assert "not a readable safetensors file" in message
        assert started.exit_code() == 1


@pytest.mark.heavy
def test_another_plan_is_noticed_before_anything_is_computed(checkpoint: tuple[Path, Any]) -> None:
    """The rank schedules one token less than it should."""
    program = (
        "-c",
        "import sys; from tidewright.distributed import rank; from tidewright.engine.step_tokens import StepTokens\n"
        "take = StepTokens.take\n"
        "StepTokens.take = lambda self, s, budget: take(self, s, min(budget, 2))\n"
        "sys.exit(rank.main())",
    )
    with two_hosts(checkpoint[0]) as (started, address), rank(address, 1, checkpoint[0], program) as other:
        hear_ready(started)
        started.say(submit(1))
        assert hear_failed(started) == "rank 1: it made another plan than rank 0; both are in the log"
        assert started.exit_code() == 1
        assert b"request 1: 2 tokens from 0" in other.stderr.read()
        assert started.process.stderr is not None
        assert b"request 1: 5 tokens from 0" in started.process.stderr.read()


@pytest.mark.heavy
def test_a_rank_that_lacks_memory_in_a_step_says_how_large_the_next_engines_may_be(
    checkpoint: tuple[Path, Any],
) -> None:
    """No rank can take a step back alone: the others wait for it in a collective."""
    program = (
        "-c",
        "import sys, torch; from tidewright.distributed import rank; from tidewright.engine import model_runner\n"
        "def launch(self, plan):\n"
        "    raise torch.OutOfMemoryError('CUDA out of memory')\n"
        "model_runner.ModelRunner.launch = launch\n"
        "sys.exit(rank.main())",
    )
    with two_hosts(checkpoint[0]) as (started, address), rank(address, 1, checkpoint[0], program):
        hear_ready(started)
        started.say(submit(1, prompt=9))
        while not isinstance(message := started.hear(), Failed):
            pass
        what = "rank 1: a step of 9 tokens in 1 sequences ran out of memory (CUDA out of memory)"
        assert (message.message, message.step_tokens) == (what, 4)
        assert started.exit_code() == 1


@pytest.mark.heavy
def test_a_rank_may_load_for_longer_than_a_collective_may_take(checkpoint: tuple[Path, Any]) -> None:
    """Hosts differ: one has the model in memory already, another reads it from a slow disk."""
    program = (
        "-c",
        "import sys, time; from tidewright.distributed import follower, process_group\n"
        "join, load = process_group.join_group, follower.ModelRunner\n"
        "process_group.join_group = lambda *args: (time.sleep(2), join(*args))[1]\n"
        "follower.ModelRunner = lambda *args: (time.sleep(2), load(*args))[1]\n"
        "from tidewright.distributed import rank; sys.exit(rank.main())",
    )
    with two_hosts(checkpoint[0], heartbeat_timeout=3.0) as (started, address):
        with rank(address, 1, checkpoint[0], program):
            hear_ready(started)
            assert len(tokens_of(started, [submit(1)])[1]) == 4


def test_rank_0_knows_its_address_where_it_was_given_a_name(checkpoint: tuple[Path, Any]) -> None:
    """Of the address it finds the network interface that the ranks' traffic takes."""
    name = f"localhost:{free_ports(1)[0]}"
    ranks = Ranks(config(checkpoint[0], tensor_parallel_size=2, nodes=2, rendezvous=name))
    ranks.close()
    assert ranks.host == "127.0.0.1"
