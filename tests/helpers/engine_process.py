"""The real engine process, with the test as its bridge."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tidewright.engine.messages import (
    Begin,
    Configure,
    EngineConfig,
    EngineStats,
    Failed,
    Heartbeat,
    Ready,
    SequenceOutput,
    StepOutputs,
    Submit,
    ToBridge,
    ToEngine,
    decode_to_bridge,
    encode,
)
from tidewright.schema import SamplingParams

PATIENCE = 60.0  # seconds


class Bridge:
    """The other end of the socket."""

    def __init__(self, *program: str) -> None:
        ours, theirs = socket.socketpair()
        self.process = subprocess.Popen(
            [sys.executable, *program, str(theirs.fileno())], pass_fds=[theirs.fileno()], stderr=subprocess.PIPE
        )
        theirs.close()
        self.connection = Connection(ours.detach())

    def say(self, message: ToEngine) -> None:
        self.connection.send_bytes(encode(message))

    def begin(self, config: EngineConfig) -> None:
        self.say(Configure(config))
        self.say(Begin())

    def hear(self) -> ToBridge:
        assert self.connection.poll(PATIENCE), "the engine says nothing"
        return decode_to_bridge(self.connection.recv_bytes())

    def outputs(self, request_ids: set[int], meanwhile: Iterator[ToEngine] = iter(())) -> list[SequenceOutput]:  # noqa: B008
        """All outputs until the last of the requests has ended. After each message with some, the next is said."""
        heard: list[SequenceOutput] = []
        waiting = set(request_ids)
        while waiting:
            message = self.hear()
            if isinstance(message, StepOutputs):
                heard += message.outputs
                if (word := next(meanwhile, None)) is not None:
                    self.say(word)
                waiting -= {output.request_id for output in message.outputs if output.finish_reason}
        return heard

    def exit_code(self) -> int:
        return self.process.wait(PATIENCE)


@contextmanager
def bridge(*program: str) -> Iterator[Bridge]:
    started = Bridge(*(program or ("-m", "tidewright.engine")))
    try:
        yield started
    finally:
        started.process.kill()
        started.process.communicate()


def config(model: Path, **changes: Any) -> EngineConfig:
    values = {"dtype": "float32", "threads": 1, "kv_cache_memory": "16MiB", "heartbeat_interval": 0.05}
    return EngineConfig(model_dir=str(model), **(values | changes))


def submit(request_id: int, prompt: int = 5, **params: Any) -> Submit:
    values = {"max_tokens": 4, "ignore_eos": True, "seed": 3}
    return Submit(request_id, list(range(3, 3 + prompt)), SamplingParams(**(values | params)))


def hear_ready(started: Bridge) -> None:
    message = started.hear()
    assert isinstance(message, Ready), message


def hear_failed(started: Bridge) -> str:
    """What the engine says of its end, whatever it says before."""
    while not isinstance(message := started.hear(), Failed):
        pass
    return message.message


def heartbeat(started: Bridge, is_it: Callable[[EngineStats], bool]) -> EngineStats:
    """The next heartbeat that is the one."""
    while not (isinstance(message := started.hear(), Heartbeat) and is_it(message.stats)):
        pass
    return message.stats


def tokens_of(started: Bridge, requests: list[Submit], meanwhile: Iterable[ToEngine] = ()) -> dict[int, list[int]]:
    """`meanwhile`: said one by one, after each step that brings tokens."""
    for request in requests:
        started.say(request)
    tokens: dict[int, list[int]] = {request.request_id: [] for request in requests}
    for output in started.outputs(set(tokens), iter(meanwhile)):
        assert output.finish_reason in (None, "length", "stop"), output
        tokens[output.request_id] += output.token_ids
    return tokens
