"""Requests in flight: hands them to the engine, makes text of its tokens, and ends each exactly once.

Four threads meet here. Triton's calls `submit`; the engine client's delivers tokens; the sender turns them into
responses; the canceller asks Triton who hung up. Only the sender answers a request once it was submitted.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
import time
from dataclasses import dataclass, field
from typing import Protocol

from tidewright.bridge.engine_client import EngineClient, EngineEvents
from tidewright.bridge.request import GenerationRequest
from tidewright.bridge.text_stream import TextStream
from tidewright.config import Settings
from tidewright.engine.messages import (
    Abort,
    EngineConfig,
    EngineStats,
    Ready,
    SequenceOutput,
    Submit,
    TokenLogprob,
)
from tidewright.errors import CancelledError, EngineUnavailableError, OverloadedError, RequestError
from tidewright.schema import FinishReason
from tidewright.tokenization import Tokenizer

log = logging.getLogger(__name__)

CANCEL_POLL_INTERVAL = 0.01  # seconds
CANCEL_POLL_SHARE = 0.05  # of one core, at most: asking Triton is a round trip to its process


@dataclass
class Chunk:
    """What one response carries."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    logprobs: list[list[TokenLogprob]] = field(default_factory=list)
    cumulative_logprob: float = 0.0


class Responder(Protocol):
    """The way back to one caller."""

    def send(self, chunk: Chunk, final: bool) -> None: ...

    def fail(self, error: RequestError) -> None: ...

    def is_cancelled(self) -> bool: ...


class _Stream:
    """One request in flight. The sender alone touches its text; `Bridge._changed` guards the rest."""

    def __init__(self, request: GenerationRequest, responder: Responder, tokenizer: Tokenizer) -> None:
        self.request = request
        self.responder = responder
        self.text = TextStream(tokenizer, request.sampling.stop_strings, request.sampling.min_tokens)
        self.arrived: list[SequenceOutput] = []
        self.error: RequestError | None = None
        self.chunk = Chunk(text=request.echo)

    def take(self, outputs: list[SequenceOutput]) -> None:
        """Add tokens to the next chunk, up to and including the one that ends the sequence."""
        chunk = self.chunk
        for output in outputs:
            for index, token_id in enumerate(output.token_ids):
                chunk.text += self.text.push(token_id)
                chunk.token_ids.append(token_id)
                if output.logprobs is not None:
                    chunk.logprobs.append(output.logprobs[index])
                    chunk.cumulative_logprob += output.logprobs[index][0].logprob
                if self.text.stopped:
                    chunk.finish_reason = "stop"
                    return
            if output.finish_reason is not None:
                chunk.text += self.text.finish()
                chunk.finish_reason = "stop" if self.text.stopped else output.finish_reason
                return


class Bridge:
    """Owns the engine client and every request between Triton and the engine."""

    def __init__(self, settings: Settings, config: EngineConfig, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._limit = settings.max_running + settings.max_waiting
        self._ids = itertools.count(1)
        self._streams: dict[int, _Stream] = {}
        self._dirty: dict[int, _Stream] = {}  # have something for the sender; in order of arrival
        self._changed = threading.Condition()
        self._stopping = threading.Event()
        self._client = EngineClient(
            config,
            EngineEvents(self._on_outputs, self._on_stats, self._on_up, self._on_lost),
            start_timeout=settings.start_timeout,
            heartbeat_timeout=settings.heartbeat_timeout,
        )
        self._threads = [
            threading.Thread(target=self._send_loop, name="sender", daemon=True),
            threading.Thread(target=self._cancel_loop, name="canceller", daemon=True),
        ]
        self.engine: Ready | None = None
        """What the running engine said of itself; kept while it restarts."""
        self.stats: EngineStats | None = None

    @property
    def engine_up(self) -> bool:
        return self._client.available

    @property
    def engine_restarts(self) -> int:
        return self._client.restarts

    @property
    def active(self) -> int:
        """Requests in flight."""
        return len(self._streams)

    def start(self) -> None:
        """Start the engine and wait for its model; raises `EngineStartError`."""
        self._client.start()
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End the engine; what is still in flight ends with `EngineUnavailableError`."""
        self._client.stop()
        self._fail_all("the server is shutting down")
        self._stopping.set()
        with self._changed:
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def submit(self, request: GenerationRequest, responder: Responder) -> None:
        """Queue a valid request; its answer comes through `responder`.

        Raises:
            OverloadedError: as many requests as may run and wait are already in flight.
            EngineUnavailableError: the engine is restarting.
        """
        request_id = next(self._ids)
        with self._changed:
            if len(self._streams) >= self._limit:
                raise OverloadedError(
                    f"{self._limit} requests are running or waiting, the most that max_running + max_waiting "
                    "allow; try again later"
                )
            self._streams[request_id] = _Stream(request, responder, self._tokenizer)
            self._changed.notify_all()
        try:
            self._client.send(Submit(request_id, request.prompt_token_ids, request.sampling))
        except EngineUnavailableError:
            with self._changed:
                # If the engine was lost in between, the sender has the stream and answers it.
                if self._streams.get(request_id) and self._streams[request_id].error is None:
                    del self._streams[request_id]
                    raise

    def _on_outputs(self, outputs: list[SequenceOutput]) -> None:
        with self._changed:
            for output in outputs:
                stream = self._streams.get(output.request_id)
                if stream is not None:
                    stream.arrived.append(output)
                    self._dirty[output.request_id] = stream
            self._changed.notify_all()

    def _on_stats(self, stats: EngineStats) -> None:
        self.stats = stats

    def _on_up(self, ready: Ready) -> None:
        self.engine = ready

    def _on_lost(self, cause: str) -> None:
        self._fail_all(f"the engine died while it worked on this request ({cause}); it is being restarted")

    def _fail_all(self, message: str) -> None:
        with self._changed:
            for request_id, stream in self._streams.items():
                stream.error = stream.error or EngineUnavailableError(message)
                self._dirty[request_id] = stream
            self._changed.notify_all()

    def _send_loop(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._dirty or self._stopping.is_set())
                if not self._dirty:
                    return
                request_id = next(iter(self._dirty))
                stream = self._dirty.pop(request_id)
                outputs, stream.arrived = stream.arrived, []
            try:
                over = self._answer(stream, outputs)
            except Exception:
                log.exception("request %d could not be answered", request_id)
                stream.responder.fail(RequestError("the response could not be made; see the server's log"))
                over = True
            if over:
                with self._changed:
                    self._streams.pop(request_id, None)
                    self._dirty.pop(request_id, None)
                if stream.chunk.finish_reason is None or stream.text.stopped:
                    self._abort(request_id)

    def _answer(self, stream: _Stream, outputs: list[SequenceOutput]) -> bool:
        """Send what there is to send of one stream; True when the request is over."""
        stream.take(outputs)
        chunk = stream.chunk
        if chunk.finish_reason == "invalid":
            # The bridge checked all that it knows, so this is a limit that only the engine knows.
            stream.responder.fail(RequestError("the engine refused the request; see its log"))
            return True
        if chunk.finish_reason is None and stream.error is not None:
            stream.responder.fail(stream.error)
            return True
        final = chunk.finish_reason is not None
        if final or (stream.request.stream and chunk.token_ids):
            stream.responder.send(chunk, final)
            if not final:
                stream.chunk = Chunk(cumulative_logprob=chunk.cumulative_logprob)
        return final

    def _abort(self, request_id: int) -> None:
        with contextlib.suppress(EngineUnavailableError):  # then there is nothing left to abort
            self._client.send(Abort(request_id))

    def _cancel_loop(self) -> None:
        while not self._stopping.is_set():
            with self._changed:
                self._changed.wait_for(lambda: self._streams or self._stopping.is_set())
                streams = list(self._streams.items())
            began = time.monotonic()
            for request_id, stream in streams:
                if stream.error is None and stream.responder.is_cancelled():
                    self._abort(request_id)
                    with self._changed:
                        stream.error = stream.error or CancelledError("cancelled by the client")
                        self._dirty[request_id] = stream
                        self._changed.notify_all()
            took = time.monotonic() - began
            self._stopping.wait(max(CANCEL_POLL_INTERVAL, took / CANCEL_POLL_SHARE))
