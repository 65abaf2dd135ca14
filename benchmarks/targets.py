"""The systems that the benchmark measures, behind one call: run some prompts at once, say when tokens came."""

from __future__ import annotations

import json
import queue
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from tidewright.bridge.engine_client import EngineClient, EngineEvents
from tidewright.config import Settings
from tidewright.engine.messages import Ready, Submit
from tidewright.launch.server import TritonServer
from tidewright.schema import SamplingParams


@dataclass(frozen=True)
class Timing:
    """One batch of requests that started together; seconds from their start."""

    first: list[float]  # first token of each request
    last: float  # last token of the last request
    tokens: int  # generated in all
    responses: int = 0


class Target(Protocol):
    name: str

    def run(self, prompts: list[list[int]], max_tokens: int) -> Timing: ...


class TritonTarget:
    """Ours as a client sees it: gRPC streaming from `decoder`."""

    name = "tidewright"

    def __init__(self, grpc_url: str) -> None:
        import tritonclient.grpc as grpcclient

        self._grpc = grpcclient
        self._client = grpcclient.InferenceServerClient(grpc_url)
        self._arrived: queue.Queue = queue.Queue()
        self._client.start_stream(lambda result, error: self._arrived.put((time.perf_counter(), result, error)))

    def run(self, prompts: list[list[int]], max_tokens: int) -> Timing:
        options = json.dumps({"temperature": 0, "max_tokens": max_tokens, "ignore_eos": True}).encode()
        requests = []
        for prompt in prompts:
            ids = self._grpc.InferInput("input_ids", [len(prompt)], "INT32")
            ids.set_data_from_numpy(np.array(prompt, dtype=np.int32))
            stream = self._grpc.InferInput("stream", [1], "BOOL")
            stream.set_data_from_numpy(np.array([True]))
            sampling = self._grpc.InferInput("sampling_parameters", [1], "BYTES")
            sampling.set_data_from_numpy(np.array([options], dtype=np.object_))
            requests.append([ids, stream, sampling])
        began = time.perf_counter()
        for number, inputs in enumerate(requests):
            self._client.async_stream_infer("decoder", inputs, request_id=str(number), enable_empty_final_response=True)
        first: dict[str, float] = {}
        ended = tokens = responses = 0
        last = began
        while ended < len(prompts):
            at, result, error = self._arrived.get(timeout=600)
            if error is not None:
                raise RuntimeError(f"a benchmark request failed: {error}")
            response = result.get_response()
            if response.outputs:
                responses += 1
                tokens += len(result.as_numpy("output_ids"))
                first.setdefault(response.id, at - began)
                last = at
            ended += response.parameters["triton_final_response"].bool_param
        return Timing(list(first.values()), last - began, tokens, responses)

    def close(self) -> None:
        self._client.stop_stream()
        self._client.close()


class EngineTarget:
    """The engine process alone, without Triton and without making text."""

    name = "engine alone"

    def __init__(self, settings: Settings, model_dir: Path) -> None:
        self._arrived: queue.Queue = queue.Queue()
        self.ready: Ready | None = None
        events = EngineEvents(
            outputs=lambda outputs: self._arrived.put((time.perf_counter(), outputs)),
            stats=lambda stats: None,
            up=lambda ready: setattr(self, "ready", ready),
            lost=lambda cause: self._arrived.put((0.0, RuntimeError(f"the engine died: {cause}"))),
        )
        self._client = EngineClient(
            settings.engine_config(model_dir),
            events,
            start_timeout=settings.start_timeout,
            heartbeat_timeout=settings.heartbeat_timeout,
        )
        self._client.start()

    def run(self, prompts: list[list[int]], max_tokens: int) -> Timing:
        sampling = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, seed=0)
        began = time.perf_counter()
        for number, prompt in enumerate(prompts):
            self._client.send(Submit(number, prompt, sampling))
        first: dict[int, float] = {}
        ended = tokens = 0
        last = began
        while ended < len(prompts):
            at, outputs = self._arrived.get(timeout=600)
            if isinstance(outputs, Exception):
                raise outputs
            for output in outputs:
                first.setdefault(output.request_id, at - began)
                tokens += len(output.token_ids)
                ended += output.finish_reason is not None
                last = at
        return Timing(list(first.values()), last - began, tokens)

    def close(self) -> None:
        self._client.stop()


class TransformersTarget:
    """transformers' generate, in this process; a batch of equal lengths needs no padding."""

    name = "transformers"

    def __init__(self, model_dir: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self._torch = torch
        self._model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16).eval()

    def run(self, prompts: list[list[int]], max_tokens: int) -> Timing:
        ids = self._torch.tensor(prompts)
        mask = self._torch.ones_like(ids)
        clock = _FirstTokenClock()
        began = time.perf_counter()
        out = self._model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=max_tokens,
            min_new_tokens=max_tokens,
            do_sample=False,
            logits_processor=[clock],
        )
        last = time.perf_counter() - began
        # The clock ticks when the logits of a token are there; the first tick is the first token but for an argmax.
        return Timing([clock.first - began] * len(prompts), last, out.numel() - ids.numel())

    def close(self) -> None:
        pass


class _FirstTokenClock:
    """A logits processor that changes nothing and remembers when it was first called."""

    def __init__(self) -> None:
        self.first = 0.0

    def __call__(self, input_ids: object, scores: object) -> object:
        self.first = self.first or time.perf_counter()
        return scores


@contextmanager
def running_server(settings: Settings, model_dir: Path) -> Iterator[tuple[TritonServer, float]]:
    """A server, and the seconds that it took from start to the first generated token."""
    server = TritonServer(settings, model_dir)
    began = time.perf_counter()
    try:
        server.start()
        server.wait_ready()
        yield server, time.perf_counter() - began
    finally:
        server.stop()
