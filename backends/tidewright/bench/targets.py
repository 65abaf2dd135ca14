"""The systems that the benchmark measures, behind one call: run these requests, say when their tokens came.

Clients do as little as they can while a run lasts, for they share the cores with what they measure.
"""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from tidewright.bench.workloads import Outcome, Request, failed
from tidewright.bridge.engine_client import EngineClient, EngineEvents
from tidewright.config import Settings
from tidewright.engine.messages import EngineStats, Ready, Submit
from tidewright.launch.server import TritonServer
from tidewright.schema import SamplingParams

SILENCE = 600  # seconds without any token after which a run is given up


class TargetError(RuntimeError):
    """A system could not be measured; the message says why."""


class Target(Protocol):
    """A system under measurement."""

    name: str

    def run(self, requests: Sequence[Request]) -> list[Outcome]:
        """Send each request when it arrives, greedy and with EOS ignored; outcomes in the order of the requests."""

    def close(self) -> None: ...


class Notes:
    """Collects what arrives of each request of a run."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self._requests = requests
        self.began = time.perf_counter()
        self._first: dict[int, float] = {}
        self._last: dict[int, float] = {}
        self._tokens = [0] * len(requests)
        self._responses = [0] * len(requests)

    def wait_for(self, number: int) -> None:
        """Until request `number` arrives."""
        time.sleep(max(0.0, self.began + self._requests[number].at - time.perf_counter()))

    def take(self, number: int, at: float, tokens: int) -> None:
        self._first.setdefault(number, at)
        self._last[number] = at
        self._tokens[number] += tokens
        self._responses[number] += 1

    def outcomes(self, errors: dict[int, str]) -> list[Outcome]:
        """Raises TargetError if a request ended without an error and yet without all its tokens."""
        return [failed(errors[number]) if number in errors else self._outcome(number) for number in self._numbers()]

    def _numbers(self) -> range:
        return range(len(self._requests))

    def _outcome(self, number: int) -> Outcome:
        request, tokens = self._requests[number], self._tokens[number]
        if tokens != request.max_tokens:
            raise TargetError(f"{tokens} tokens came where {request.max_tokens} were asked for")
        due = self.began + request.at
        return Outcome(self._first[number] - due, self._last[number] - due, tokens, self._responses[number])


class TritonTarget:
    """Ours as a client sees it: gRPC streaming from one of the models that take token ids."""

    def __init__(self, grpc_url: str, model: str = "decoder", name: str = "tidewright") -> None:
        import tritonclient.grpc as grpcclient

        self._grpc, self._model, self.name = grpcclient, model, name
        self._client = grpcclient.InferenceServerClient(grpc_url)
        self._arrived: queue.Queue[tuple[float, Any, Exception | None]] = queue.Queue()
        self._client.start_stream(lambda result, error: self._arrived.put((time.perf_counter(), result, error)))

    def run(self, requests: Sequence[Request]) -> list[Outcome]:
        inputs = [self._inputs(request) for request in requests]
        notes = Notes(requests)
        for number, tensors in enumerate(inputs):
            notes.wait_for(number)
            self._client.async_stream_infer(
                self._model, tensors, request_id=str(number), enable_empty_final_response=True
            )
        ended: set[int] = set()
        errors: list[str] = []
        while len(ended) + len(errors) < len(requests):
            at, result, error = self._arrived.get(timeout=SILENCE)
            if error is not None:
                errors.append(str(error))
                continue
            response = result.get_response()
            if response.outputs:
                notes.take(int(response.id), at, len(result.as_numpy("output_ids")))
            if response.parameters["triton_final_response"].bool_param:
                ended.add(int(response.id))
        # The client library drops the request id of an error, so errors go to those that got no answer.
        return notes.outcomes(dict(zip((n for n in range(len(requests)) if n not in ended), errors, strict=True)))

    def _inputs(self, request: Request) -> list[Any]:
        import numpy as np  # here, for `tidewright --help` comes by this file

        options = {"temperature": 0, "max_tokens": request.max_tokens, "ignore_eos": True}
        tensors = []
        for name, datatype, value in (
            ("input_ids", "INT32", np.array(request.prompt, dtype=np.int32)),
            ("stream", "BOOL", np.array([True])),
            ("sampling_parameters", "BYTES", np.array([json.dumps(options).encode()], dtype=np.object_)),
        ):
            tensors.append(self._grpc.InferInput(name, list(value.shape), datatype))
            tensors[-1].set_data_from_numpy(value)
        return tensors

    def close(self) -> None:
        self._client.stop_stream()
        self._client.close()


class EngineTarget:
    """The engine process alone, without Triton and without making text."""

    name = "engine alone"

    def __init__(self, settings: Settings, model_dir: Path) -> None:
        self._arrived: queue.Queue[tuple[float, Any]] = queue.Queue()
        self._stats: EngineStats | None = None
        self._beat = threading.Event()
        self.ready: Ready | None = None
        events = EngineEvents(
            outputs=lambda outputs: self._arrived.put((time.perf_counter(), outputs)),
            stats=self._take_stats,
            up=lambda ready: setattr(self, "ready", ready),
            lost=self._lost,
            out_of_memory=self._lost,
        )
        self._client = EngineClient(
            settings.engine_config(model_dir),
            events,
            start_timeout=settings.start_timeout,
            heartbeat_timeout=settings.heartbeat_timeout,
        )
        self._client.start()

    def run(self, requests: Sequence[Request]) -> list[Outcome]:
        notes = Notes(requests)
        for number, request in enumerate(requests):
            notes.wait_for(number)
            sampling = SamplingParams(temperature=0, max_tokens=request.max_tokens, ignore_eos=True, seed=0)
            self._client.send(Submit(number, request.prompt, sampling))
        ended = 0
        while ended < len(requests):
            at, outputs = self._arrived.get(timeout=SILENCE)
            if isinstance(outputs, Exception):
                raise outputs
            for output in outputs:
                notes.take(output.request_id, at, len(output.token_ids))
                ended += output.finish_reason is not None
        return notes.outcomes({})

    def _lost(self, cause: str) -> None:
        self._arrived.put((0.0, TargetError(f"the engine died: {cause}")))

    def stats(self) -> EngineStats:
        """The engine's counters now: those of the next heartbeat.

        Raises:
            TargetError: none came.
        """
        self._beat.clear()
        if not self._beat.wait(timeout=60) or self._stats is None:
            raise TargetError("the engine sends no heartbeat")
        return self._stats

    def _take_stats(self, stats: EngineStats) -> None:
        self._stats = stats
        self._beat.set()

    def close(self) -> None:
        self._client.stop()


class TransformersTarget:
    """transformers' generate, in this process; a batch of equal lengths that arrive together, so no padding."""

    name = "transformers"

    def __init__(self, model_dir: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self._torch = torch
        self._model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16).eval()

    def run(self, requests: Sequence[Request]) -> list[Outcome]:
        max_tokens = requests[0].max_tokens
        ids = self._torch.tensor([request.prompt for request in requests])
        clock = _FirstTokenClock()
        began = time.perf_counter()
        out = self._model.generate(
            ids,
            attention_mask=self._torch.ones_like(ids),
            max_new_tokens=max_tokens,
            min_new_tokens=max_tokens,
            do_sample=False,
            logits_processor=[clock],
        )
        last = time.perf_counter() - began
        # The clock ticks when the logits of a token are there; the first tick is the first token but for an argmax.
        return [Outcome(clock.first - began, last, out.shape[1] - ids.shape[1]) for _ in requests]

    def close(self) -> None:
        del self._model


class _FirstTokenClock:
    """A logits processor that changes nothing and remembers when it was first called."""

    def __init__(self) -> None:
        self.first = 0.0

    def __call__(self, input_ids: object, scores: object) -> object:
        self.first = self.first or time.perf_counter()
        return scores


@contextmanager
def running_server(settings: Settings, model_dir: Path) -> Iterator[tuple[TritonServer, float]]:
    """Our server, and the seconds that it took from start to the first generated token."""
    server = TritonServer(settings, model_dir)
    began = time.perf_counter()
    try:
        server.start()
        server.wait_ready()
        yield server, time.perf_counter() - began
    finally:
        server.stop()
