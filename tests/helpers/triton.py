"""A real Triton on free ports, and a small gRPC client for it."""

from __future__ import annotations

import json
import queue
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import tritonclient.grpc as grpcclient
from prometheus_client.parser import text_string_to_metric_families

from helpers.needs import needs
from tidewright.bench.machine import free_ports
from tidewright.config import Settings
from tidewright.launch.server import TritonServer

_DTYPES = {"BYTES": np.object_, "BOOL": np.bool_, "INT32": np.int32}
STREAM_TIMEOUT = 120  # seconds without a response: something hangs


def tensor(name: str, value: Any) -> grpcclient.InferInput:
    """An input tensor: text and bytes as BYTES, bool as BOOL, ints as INT32."""
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    datatype = "BOOL" if isinstance(values[0:1] and values[0], bool) else "INT32"
    if values and isinstance(values[0], (str, bytes)):
        datatype = "BYTES"
        values = [item.encode() if isinstance(item, str) else item for item in values]
    made = grpcclient.InferInput(name, [len(values)], datatype)
    made.set_data_from_numpy(np.array(values, dtype=_DTYPES[datatype]))
    return made


@dataclass
class Generation:
    """All responses to one request, joined."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    chunks: list[str] = field(default_factory=list)
    responses: list[dict[str, Any]] = field(default_factory=list)  # outputs of each
    outputs: dict[str, Any] = field(default_factory=dict)  # the last of each name
    error: Exception | None = None
    ended: int = 0  # how often the final flag came

    def take(self, result: grpcclient.InferResult) -> None:
        response = result.get_response()
        if response.outputs:
            self.responses.append({output.name: result.as_numpy(output.name) for output in response.outputs})
            self.outputs |= self.responses[-1]
            if "text_output" in self.responses[-1]:
                delta = result.as_numpy("text_output")[0].decode()
                self.chunks.append(delta)
                self.text += delta
                self.token_ids += result.as_numpy("output_ids").tolist()
        self.ended += response.parameters["triton_final_response"].bool_param


class Stream:
    """One gRPC stream, over which requests go out and their responses come back by request id."""

    def __init__(self, url: str) -> None:
        self.client = grpcclient.InferenceServerClient(url)
        self._arrived: queue.Queue[tuple[Any, Any]] = queue.Queue()
        self.generations: dict[str, Generation] = {}
        self._errors: list[Exception] = []
        self.broken: Exception | None = None
        """The connection's error; nothing comes any more."""
        self.client.start_stream(lambda result, error: self._arrived.put((result, error)))

    def send(self, request_id: str, model: str = "decoder", parameters: dict | None = None, **inputs: Any) -> None:
        if isinstance(inputs.get("sampling_parameters"), dict):
            inputs["sampling_parameters"] = json.dumps(inputs["sampling_parameters"])
        self.generations[request_id] = Generation()
        self.client.async_stream_infer(
            model,
            [tensor(name, value) for name, value in inputs.items()],
            request_id=request_id,
            enable_empty_final_response=True,
            parameters=parameters,
        )

    @property
    def is_silent(self) -> bool:
        """Nothing came that was not taken."""
        return self._arrived.empty()

    def next(self, timeout: float = STREAM_TIMEOUT) -> None:
        """Take one response."""
        result, error = self._arrived.get(timeout=timeout)
        if error is not None and error.status():  # of the call as a whole; those of requests have none
            self.broken = error
        elif error is not None:
            self._errors.append(error)
        else:
            self.generations[result.get_response().id].take(result)

    def finish(self, timeout: float = STREAM_TIMEOUT) -> dict[str, Generation]:
        """Wait until every request has ended, with an error at the latest when the connection breaks."""
        while not self.broken and len(self._unended()) > len(self._errors):
            self.next(timeout)
        # The client library drops the request id of an error, so errors go to those that got no answer.
        unended = self._unended()
        if self.broken:
            self._errors += [self.broken] * (len(unended) - len(self._errors))
        for generation, error in zip(unended, self._errors, strict=True):
            generation.error = error
            generation.ended += 1
        self._errors.clear()
        return self.generations

    def _unended(self) -> list[Generation]:
        return [generation for generation in self.generations.values() if not generation.ended]

    def close(self, cancel: bool = False) -> None:
        self.client.stop_stream(cancel_requests=cancel)
        self.client.close()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        """Cancels what has not ended. Nothing else: Triton (2.51) never forgets a request of a stream that is cancelled
        between its last response and its end, can't unload the model then, and sometimes crashes."""
        ended = sum(generation.ended > 0 for generation in self.generations.values()) + len(self._errors)
        self.close(cancel=ended < len(self.generations))


@needs("server")
class RunningServer:
    """A `TritonServer` with the calls that tests make."""

    def __init__(self, model_dir: Path, **options: Any) -> None:
        http, grpc, metrics = free_ports(3)
        ports = {"http_port": http, "grpc_port": grpc, "metrics_port": metrics}
        # One thread: where others compute too, two that wait for each other at each product take many times as long.
        self.settings = Settings(**{**ports, "shutdown_grace": 0, "heartbeat_interval": 0.1, "threads": 1, **options})
        self.triton = TritonServer(self.settings, model_dir)

    def __enter__(self) -> RunningServer:
        try:
            self.triton.start()
            self.triton.wait_ready()
        except BaseException:
            self.triton.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.triton.stop()

    def revive(self) -> None:
        """Of tests that share it, a Triton that has ended fails only the one that ran then."""
        if not self.triton.running:
            self.triton.start_again()

    def is_well(self) -> bool:
        """It answers, and its decoder takes requests and can generate."""
        if not self.triton.running:
            return False
        url = f"{self.triton.http_url}/v2/models/decoder/generate"
        try:
            answer = httpx.post(url, json={"text_input": "a", "max_tokens": 1}, timeout=10, trust_env=False)
        except httpx.TransportError:
            return False
        return answer.status_code == 200 and "error" not in answer.json()

    @property
    def grpc_url(self) -> str:
        return f"127.0.0.1:{self.settings.grpc_port}"

    def stream(self) -> Stream:
        return Stream(self.grpc_url)

    def generate(self, model: str = "decoder", parameters: dict | None = None, **inputs: Any) -> Generation:
        """One request over a gRPC stream of its own, to its end."""
        with self.stream() as stream:
            stream.send("1", model, parameters, **inputs)
            return stream.finish()["1"]

    def post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        return httpx.post(f"{self.triton.http_url}/v2/models/{path}", json=body, timeout=120, trust_env=False)

    def control(self, word: str, model: str = "decoder") -> httpx.Response:
        return self.post(f"{model}/generate", {"control": word})

    def metrics(self) -> dict[tuple[str, str], float]:
        """All of our series, as Prometheus' own parser reads them: name without prefix, value of the label or ""."""
        url = f"http://127.0.0.1:{self.settings.metrics_port}/metrics"
        found = {}
        for family in text_string_to_metric_families(httpx.get(url, timeout=5, trust_env=False).text):
            for sample in family.samples:
                if sample.name.startswith("tidewright_"):
                    (label,) = sample.labels.values() or ("",)
                    # The parser adds _total to a counter that lacks it.
                    name = re.sub(r"_(bucket|sum|count)_total$", r"_\1", sample.name)
                    found[name.removeprefix("tidewright_"), label] = sample.value
        return found

    def metric(self, name: str) -> float:
        return self.metrics()[name, ""]

    def wait_idle(self, timeout: float = 60) -> None:
        """Until nothing is in flight for a while (metrics lag), and check that every block is back in the pool."""
        deadline = time.monotonic() + timeout
        idle_since = None
        while time.monotonic() < deadline:
            active = self.metric("requests_active") + self.metric("requests_running")
            if active or not self.metric("kv_blocks_free") == self.metric("kv_blocks") > 0:
                idle_since = None
            elif idle_since is None:
                idle_since = time.monotonic()
            elif time.monotonic() - idle_since > 0.6:
                return
            time.sleep(0.05)
        raise AssertionError(
            f"after {timeout} s: {self.metric('requests_active')} active, "
            f"{self.metric('kv_blocks_free')} of {self.metric('kv_blocks')} blocks free"
        )
