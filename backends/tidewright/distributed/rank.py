"""`python -m tidewright.distributed.rank HOST:PORT RANK LOCAL_RANK MODEL_DIR SECRET_FILE [SHARED_FD]`: a rank 1 … N-1.

Started by rank 0 on its own host, and by `tidewright worker` on others. It lives as long as its connection to rank 0.
SECRET_FILE has the rendezvous secret; empty: none, for a rendezvous on the loopback. SHARED_FD is memory that all ranks
share, if they are on one host.
"""

from __future__ import annotations

import importlib
import logging
import os
import queue
import signal
import socket
import sys
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NoReturn

import msgspec

from tidewright import __version__, logs
from tidewright.address import host_and_port
from tidewright.distributed.fingerprint import model_fingerprint
from tidewright.distributed.handshake import Frames, HandshakeError, SecretMismatchError, introduce
from tidewright.distributed.rank_messages import (
    Failed,
    ForgetAdapter,
    FromLeader,
    FromRank,
    Hello,
    Inputs,
    Join,
    Ping,
    Pong,
    ReadAdapter,
    Refused,
    Reserve,
    Step,
    decode_from_leader,
    end_when_silent,
    lost_patience,
)
from tidewright.distributed.secret import SecretFileError, rendezvous_secret
from tidewright.engine.messages import encode
from tidewright.engine.step_budget import StepMemoryError
from tidewright.engine.torch_import import importing_torch
from tidewright.engine.vital_thread import start_vital_thread
from tidewright.parent_death import end_now, signal_on_parent_death

log = logging.getLogger(__name__)

REFUSED = 3  # exit status: trying again is of no use
UNREACHABLE = 4  # exit status: nobody listens there (yet)
# Seconds of silence until `Join`. More than rank 0's: it must know that this rank is gone when it comes back.
LOST_PATIENCE = 6.0
HANDSHAKE_TIMEOUT = 10.0  # seconds; rank 0's processor may be busy with importing
GRACE = 0.5  # seconds from an error to saying so


class Rank:
    def __init__(self, connection: Connection, host: str, own_address: str, shared_file: int | None) -> None:
        self._connection = connection
        self._shared_file = shared_file
        self._host, self._own_address = host, own_address
        self._send_lock = threading.Lock()
        self._inbox: queue.SimpleQueue[FromLeader] = queue.SimpleQueue()

    def run(self, rank: int, local_rank: int, model_dir: Path, fingerprint: str) -> int:
        """Returns the exit status."""
        end_when_silent(self._connection, LOST_PATIENCE)
        self._send(Hello(rank, __version__, fingerprint))
        start_vital_thread("intake", self._listen, lambda cause: self._send(Failed(cause)))
        with importing_torch():
            importlib.import_module("tidewright.distributed.follower")  # a second that need not be spent later
        from tidewright.devices.base import DeviceError

        join = self._inbox.get()
        assert isinstance(join, Join)
        try:
            self._follow(join, rank, local_rank, model_dir)
        except Exception as error:
            time.sleep(GRACE)  # if rank 0 is gone, a collective fails too, but `_listen` knows why
            if isinstance(error, DeviceError):  # says all there is to say
                log.error("this rank can't go on: %s", error)
            else:
                log.exception("this rank can't go on")
            step_tokens = error.step_tokens if isinstance(error, StepMemoryError) else 0
            self._send(Failed(" ".join(str(error).split()) or type(error).__name__, step_tokens))
        return 1

    def _follow(self, join: Join, rank: int, local_rank: int, model_dir: Path) -> None:
        from tidewright.distributed.follower import Follower
        from tidewright.distributed.placement import take_place
        from tidewright.distributed.process_group import join_group, join_store

        config = take_place(msgspec.structs.replace(join.config, model_dir=str(model_dir)), local_rank)
        end_when_silent(self._connection, lost_patience(config))
        store = join_store(self._host, join.store_port, config.start_timeout)
        size, timeout = config.tensor_parallel_size, config.heartbeat_timeout / 2
        group = join_group(store, rank, size, config.device, self._own_address, timeout, self._shared_file)
        follower = Follower(config, group, self._send, lambda cause: self._send(Failed(cause)))
        group.wait_for_all()
        while True:
            try:
                message = self._inbox.get(timeout=config.heartbeat_timeout)
            except queue.Empty:
                raise TimeoutError(f"nothing came from rank 0 for {config.heartbeat_timeout:g} s") from None
            if isinstance(message, Step):
                follower.follow(message)
            elif isinstance(message, Inputs):
                follower.take(message.inputs)
            elif isinstance(message, Ping):
                self._send(Pong(message.number))
            elif isinstance(message, Reserve):
                self._send(Pong(message.number, follower.reserve(message.num_blocks)))
            elif isinstance(message, ReadAdapter):
                follower.read(message)
            elif isinstance(message, ForgetAdapter):
                follower.forget(message)

    def _listen(self) -> None:
        try:
            while True:
                message = decode_from_leader(self._connection.recv_bytes())
                if isinstance(message, Refused):
                    log.error("rank 0 refuses this rank: %s", message.message, extra=logs.event("rank_lost"))
                    os._exit(REFUSED)  # at once: next comes the end of the connection
                self._inbox.put(message)
        except (EOFError, ConnectionError):
            pass  # rank 0 has ended
        except OSError as error:
            log.error("rank 0 can't be reached any longer: %s", error.strerror)
        # The main thread may wait for rank 0 in a collective, and must not.
        os._exit(1)

    def _send(self, message: FromRank) -> None:
        try:
            with self._send_lock:
                self._connection.send_bytes(encode(message))
        except OSError:
            os._exit(1)  # as in `_listen`


def main() -> NoReturn:
    end_now(_run())


def _run() -> int:
    address, rank, local_rank, model_dir, secret_file, *shared = sys.argv[1:]
    logs.set_up_child(f"rank{rank}")
    signal_on_parent_death(signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # when the ranks end is for rank 0 to say
    host, port = host_and_port(address)
    try:
        secret = rendezvous_secret(secret_file, host)
    except SecretFileError as error:
        log.error("%s", error)
        return REFUSED
    fingerprint = model_fingerprint(model_dir)  # rank 0 has little patience once this one is connected
    try:
        connected = socket.create_connection((host, port), timeout=5)
    except OSError as error:
        log.warning("can't reach rank 0 at %s: %s", address, error)
        return UNREACHABLE
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    try:
        introduce(Frames(connected, time.monotonic() + HANDSHAKE_TIMEOUT), secret)
    except SecretMismatchError as error:
        log.error(
            "rank 0 at %s and this rank do not trust each other: %s", address, error, extra=logs.event("rank_lost")
        )
        return REFUSED
    except (HandshakeError, OSError) as error:
        log.warning("rank 0 at %s did not take this rank in: %s", address, error)
        return 1
    connected.settimeout(None)
    own_address, shared_file = connected.getsockname()[0], int(shared[0]) if shared else None
    started = Rank(Connection(connected.detach()), host, own_address, shared_file)
    return started.run(int(rank), int(local_rank), Path(model_dir), fingerprint)


if __name__ == "__main__":
    main()
