"""Ranks 1 … N-1 as rank 0 sees them: starts those of this host, gathers all, feeds and watches them. No torch.

When one is lost there is no way on for the others, which wait for it in a collective: rank 0 ends, and with it all of
them; the bridge starts a new engine and replays.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing.connection
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

import msgspec

from tidewright import __version__
from tidewright.distributed.fingerprint import model_fingerprint
from tidewright.distributed.rank_messages import (
    AdapterRead,
    Failed,
    ForgetAdapter,
    Hello,
    Input,
    Inputs,
    Join,
    Ping,
    Pong,
    ReadAdapter,
    Refused,
    Reserve,
    Step,
    decode_from_rank,
    end_when_silent,
    lost_patience,
    plan_checksum,
)
from tidewright.distributed.reception import Arrival, Reception
from tidewright.distributed.secret import SecretFileError, rendezvous_secret
from tidewright.engine.messages import EngineConfig, encode
from tidewright.engine.pace import StepPace
from tidewright.engine.plan import StepPlan
from tidewright.engine.vital_thread import start_vital_thread

log = logging.getLogger(__name__)

LOST_PATIENCE = 3.0  # seconds of silence until a rank that waits for the others is taken for gone
STOP_TIMEOUT = 2.0  # seconds until ranks that do not end by themselves are killed


class RankError(RuntimeError):
    """The ranks did not come together, or one was lost; the message says which and what to do."""


class Ranks:
    """Used as: `gather()`, then `send` and `ping`, and in any case `close()`."""

    def __init__(self, config: EngineConfig) -> None:
        """Starts the ranks of this host; they come up while rank 0 does.

        Raises:
            RankError: the address of the rendezvous can't be had, or there is no secret where one is needed.
        """
        self._config = config
        self._children: dict[int, subprocess.Popen[bytes]] = {}
        self._connections: dict[int, Connection] = {}
        self._pongs: dict[int, Pong] = {}
        self._answered = threading.Condition()
        self._pings = 0
        self._plan: StepPlan | None = None  # of the latest step
        self.shared_file: int | None = None
        """Descriptor of memory that all ranks share, if they are on one host."""
        self._closing = False
        self.on_adapter: Callable[[AdapterRead], None] | None = None
        """What a rank says of an adapter goes there, from another thread."""
        name, port = config.rendezvous_address
        try:
            secret = rendezvous_secret(config.rendezvous_secret_file, name)
        except SecretFileError as error:
            raise RankError(str(error)) from None
        try:
            listener = socket.create_server((name, port), backlog=64)
        except OSError as error:
            raise RankError(
                f"can't listen on rendezvous {name}:{port} ({error.strerror or error}); it must be an address of "
                "this host that the other hosts reach, and a free port"
            ) from None
        self.host, port = listener.getsockname()
        self.address = f"{self.host}:{port}"
        self._reception = Reception(listener, secret)
        self._start()

    def _start(self) -> None:
        if self._config.nodes == 1:
            # It has no name, so nothing of it can stay behind.
            self.shared_file = os.memfd_create("tidewright ranks", 0)
        for rank in range(1, self._config.local_ranks):
            command = [sys.executable, "-m", "tidewright.distributed.rank", self.address, str(rank), str(rank)]
            command += [self._config.model_dir, self._config.rendezvous_secret_file]
            inherited = [] if self.shared_file is None else [self.shared_file]
            command += map(str, inherited)
            self._children[rank] = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=inherited)

    def gather(self, config: EngineConfig, store_port: int, on_lost: Callable[[str, int], None]) -> None:
        """Waits for all ranks, tells them to join torch.distributed's group, and begins to watch them.

        `config`: with what was kept of an engine before, and without a device "auto", which each host would take for
        something else.
        `on_lost` is called, from a thread of its own, with the cause when one of them is gone; and with the tokens
        that steps may have, if it is a lack of memory, else 0.

        Raises:
            RankError: one ended or did not come in time.
        """
        model = model_fingerprint(self._config.model_dir)
        # Before the bridge runs out of patience, whose message could not say which rank it was.
        deadline = time.monotonic() + 0.8 * self._config.start_timeout
        others = range(1, self._config.tensor_parallel_size)
        while missing := [rank for rank in others if rank not in self._connections]:
            self._forget_lost()
            for rank, child in self._children.items():
                if rank in missing and child.poll() is not None:
                    raise RankError(
                        f"rank {rank} ended with exit code {child.returncode} before it joined; see the log"
                    )
            if time.monotonic() > deadline:
                raise RankError(self._who_is_missing(missing))
            if arrival := self._reception.next(timeout=0.1):
                self._greet(arrival, model)
        self._reception.close()
        for rank, connection in self._connections.items():
            end_when_silent(connection, lost_patience(self._config))
            self._send_to(rank, encode(Join(config, store_port)))
        start_vital_thread("rank-watch", lambda: self._watch(on_lost), lambda cause: on_lost(cause, 0))

    def send(self, plan: StepPlan, inputs: list[Input], pace: StepPace) -> None:
        """Lets the ranks compute a step: what happened since the last one, and the plan that has to come of it.

        Raises:
            RankError: a rank is gone.
        """
        self._plan = plan
        message = encode(Step(inputs, pace, plan_checksum(plan)))
        for rank in self._connections:
            self._send_to(rank, message)

    def tell(self, inputs: list[Input]) -> None:
        """As `send`, without a step. Raises RankError."""
        message = encode(Inputs(inputs))
        for rank in self._connections:
            self._send_to(rank, message)

    def ask(self, message: ReadAdapter | ForgetAdapter) -> None:
        """To all ranks, which act on it between two steps.

        Raises:
            RankError: a rank is gone.
        """
        for rank in self._connections:
            self._send_to(rank, encode(message))

    def ping(self) -> None:
        """A round trip to the main thread of every rank.

        Raises:
            RankError: one did not answer within half the heartbeat timeout.
        """
        self._pings += 1
        self._await_pongs(encode(Ping(self._pings)))

    def reserve(self, num_blocks: int) -> str:
        """Has every rank get memory for so many blocks of KV cache, or give back what is beyond them.

        Which rank lacks it, and what its device says; empty if none does. Raises RankError as `ping`.
        """
        self._pings += 1
        self._await_pongs(encode(Reserve(self._pings, num_blocks)))
        lacking = [f"rank {rank} ({pong.lack})" for rank, pong in sorted(self._pongs.items()) if pong.lack]
        return ", ".join(lacking)

    def _await_pongs(self, message: bytes) -> None:
        for rank in self._connections:
            self._send_to(rank, message)
        patience = self._config.heartbeat_timeout / 2
        with self._answered:
            if self._answered.wait_for(lambda: not self._silent(), patience):
                return
        raise RankError(f"rank {self._silent()[0]} is stuck: no answer for {patience:g} s")

    def close(self) -> None:
        """Ends the ranks: they do so themselves when their connection ends."""
        self._closing = True
        self._reception.close()
        for connection in self._connections.values():
            connection.close()
        deadline = time.monotonic() + STOP_TIMEOUT
        for rank, child in self._children.items():
            try:
                # One that has not joined yet does not know that it is over.
                child.wait(max(deadline - time.monotonic(), 0) if rank in self._connections else 0)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()

    def _silent(self) -> list[int]:
        return [rank for rank in self._connections if self._pongs.get(rank, Pong(0)).number != self._pings]

    def _who_is_missing(self, missing: list[int]) -> str:
        message = f"no rank {missing[0]} came to {self.address} within {0.8 * self._config.start_timeout:g} s"
        remote = [rank for rank in missing if rank >= self._config.local_ranks]
        if not remote:
            return message + " (0.8 start_timeout); see its log"
        node = remote[0] // self._config.local_ranks
        secret_file = self._config.rendezvous_secret_file
        return (
            f"{message} (0.8 start_timeout); on host {node}: tidewright worker --rendezvous {self.address} "
            f"--node-rank {node} --ranks {self._config.local_ranks}"
            + (f" --rendezvous-secret-file {secret_file}" if secret_file else "")
        )

    def _greet(self, arrival: Arrival, model: str) -> None:
        """Takes a rank in, or says why not and lets it go."""
        hello, connection = arrival.hello, arrival.connection
        if problem := self._problem(hello, model, arrival.is_here):
            log.error("a connection from %s was refused: %s", arrival.address, problem)
            with contextlib.suppress(OSError):
                connection.send_bytes(encode(Refused(problem)))
            connection.close()
            return
        end_when_silent(connection, LOST_PATIENCE)
        self._connections[hello.rank] = connection

    def _forget_lost(self) -> None:
        """So that they may come again."""
        for rank, connection in list(self._connections.items()):
            if connection.poll():  # it has nothing to say before it is told to join: this is its end
                log.warning("rank %d went away again before all ranks were there", rank)
                connection.close()
                del self._connections[rank]

    def _problem(self, hello: Hello, model: str, is_here: bool) -> str:
        own, size = self._config.local_ranks, self._config.tensor_parallel_size
        if not 1 <= hello.rank < size:
            return f"there is no rank {hello.rank}: tensor_parallel_size is {size}, with ranks 1 to {size - 1} to join"
        if hello.rank < own and not is_here:
            return f"rank {hello.rank} belongs to rank 0's host: each has {own}, so start the others with --ranks {own}"
        if hello.rank in self._connections:
            return f"there is a rank {hello.rank} already; give each host its own --node-rank"
        if hello.version != __version__:
            return f"rank {hello.rank} runs Tidewright {hello.version}, rank 0 {__version__}; install the same"
        if hello.model != model:
            return f"rank {hello.rank} has another model than rank 0; prepare the same on all hosts (--model)"
        return ""

    def _send_to(self, rank: int, message: bytes) -> None:
        try:
            self._connections[rank].send_bytes(message)
        except OSError as error:
            raise RankError(f"rank {rank} is gone ({error})") from None

    def _watch(self, on_lost: Callable[[str, int], None]) -> None:
        ranks = {connection: rank for rank, connection in self._connections.items()}
        while True:
            for ready in multiprocessing.connection.wait(list(ranks)):
                assert isinstance(ready, Connection)
                try:
                    message = decode_from_rank(ready.recv_bytes())
                except (EOFError, OSError) as error:
                    if not self._closing:
                        on_lost(f"rank {ranks[ready]} {self._how_lost(ranks[ready], error)}", 0)
                    return
                if isinstance(message, Pong):
                    with self._answered:
                        self._pongs[ranks[ready]] = message
                        self._answered.notify_all()
                elif isinstance(message, AdapterRead) and self.on_adapter:
                    named = f"rank {ranks[ready]}: {message.error}" if message.error else ""
                    self.on_adapter(msgspec.structs.replace(message, error=named))
                elif isinstance(message, Failed):
                    log.error("rank 0's plan of the step: %s", self._plan.summary if self._plan else "none yet")
                    on_lost(f"rank {ranks[ready]}: {message.message}", message.step_tokens)
                    return

    def _how_lost(self, rank: int, error: EOFError | OSError) -> str:
        if isinstance(error, OSError) and not isinstance(error, ConnectionError):
            return f"can't be reached any longer ({error.strerror})"
        child = self._children.get(rank)
        if child is None:
            return "died; see its host's log"
        try:
            code = child.wait(0.5)
        except subprocess.TimeoutExpired:
            return "died"
        return f"died (signal {-code})" if code < 0 else f"died (exit code {code})"
