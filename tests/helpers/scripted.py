"""A bridge between a scripted engine and recording callers."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from tidewright.bridge.bridge import Bridge
from tidewright.bridge.engine_client import EngineEvents
from tidewright.bridge.request import GenerationRequest, OutputOptions
from tidewright.bridge.response import Delta, Response
from tidewright.engine.messages import Abort, EngineConfig, Ready, SequenceOutput, Submit, ToEngine
from tidewright.errors import RequestError
from tidewright.schema import SamplingParams
from tidewright.tokenization import Tokenizer

PATIENCE = 60.0  # seconds


class ScriptedEngine:
    """In the place of the EngineClient: keeps what the bridge sends, and says what the test wants."""

    def __init__(self, config: EngineConfig, events: EngineEvents, **_: Any) -> None:
        self.events = events
        self.sent: list[ToEngine] = []
        self.on_send: Callable[[ToEngine], None] = lambda message: None
        self.available = self.alive = True
        self.cause = "the engine is starting"
        self.restarts = 0
        self.silent_for = 0.0
        self.settle: Callable[[], None] = lambda: None  # waits until the bridge has sent all that it means to send

    def start(self) -> None:
        self.comes_up()

    def comes_up(self) -> None:
        self.events.up(Ready(1, "cpu", "float32", 16, 100, 1000, 49152, 0.1))

    def dies(self, out_of_memory: bool = False) -> None:
        self.settle()
        self.sent.clear()
        (self.events.out_of_memory if out_of_memory else self.events.lost)("killed by SIGKILL")

    def stop(self) -> None:
        pass

    @property
    def trouble(self) -> str:
        return "" if self.available else f"the engine is not available ({self.cause})"

    def silence(self) -> float:
        return self.silent_for

    def send(self, message: ToEngine) -> None:
        self.on_send(message)
        self.sent.append(message)

    def submitted(self) -> list[Submit]:
        self.settle()
        return [message for message in self.sent if isinstance(message, Submit)]

    def aborted(self) -> list[int]:
        self.settle()
        return [message.request_id for message in self.sent if isinstance(message, Abort)]

    def says(self, *outputs: SequenceOutput) -> None:
        self.events.outputs(list(outputs))


class Caller:
    """Keeps what comes back."""

    def __init__(self) -> None:
        self.responses: list[Response] = []
        self.error: RequestError | None = None
        self.ends = 0
        self.cancelled = False
        self.changed = threading.Condition()

    def send(self, response: Response, final: bool) -> None:
        with self.changed:
            self.responses.append(response)
            self.ends += final
            self.changed.notify_all()

    def fail(self, error: RequestError) -> None:
        with self.changed:
            self.error = error
            self.ends += 1
            self.changed.notify_all()

    def is_cancelled(self) -> bool:
        return self.cancelled

    def wait(self, what: Callable[[Caller], Any]) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: what(self), PATIENCE)

    def end(self) -> list[Delta]:
        """The deltas of the last response, or none if it was an error."""
        self.wait(lambda caller: caller.ends)
        return self.responses[-1].deltas if self.error is None else []


class World:
    def __init__(self, bridge: Bridge, engine: ScriptedEngine, tokenizer: Tokenizer) -> None:
        self.bridge, self.engine, self.tokenizer = bridge, engine, tokenizer
        engine.settle = self.settle

    def settle(self) -> None:
        read = threading.Event()
        self.bridge._feeder._notes.put(read.set)
        assert read.wait(PATIENCE)

    def submit(self, **request: Any) -> Caller:
        caller = Caller()
        self.submit_for(caller, **request)
        return caller

    def submit_for(
        self,
        caller: Caller,
        stream: bool = False,
        echo: str = "",
        client_id: str = "",
        resume_ids: Sequence[int] = (),
        **sampling: Any,
    ) -> None:
        params = SamplingParams(**{"seed": 7, **sampling})
        request = GenerationRequest([1, 2, 3], echo, stream, params, OutputOptions(), list(resume_ids))
        self.bridge.submit(request, caller, client_id)

    def ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text)

    def wait_idle(self) -> None:
        deadline = time.monotonic() + PATIENCE
        while self.bridge.active or self.bridge._in_flight.sequences:
            assert time.monotonic() < deadline
            time.sleep(0.002)
