"""The HTTP side of a Triton that answers as a test wants, and a server object around it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

import msgspec

from helpers.two_models import WELL
from tidewright.launch.errors import LaunchError
from tidewright.launch.server import Stub
from tidewright.schema import DecoderStatus

HANG = "hang"
DEAD = (500, b'{"error": "Stub process is not healthy."}')


def status(said: DecoderStatus) -> bytes:
    return msgspec.json.encode({"text_output": msgspec.json.encode(said).decode()})


class ScriptedTriton:
    """In the place of a TritonServer. `answers` decides by path and body; HANG leaves the caller without an answer."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.broken: dict[str, Any] = {}
        """By what a question is about, as `of`: another answer than a good one."""
        self.running, self.asked_to_end, self.exit_code = True, False, None
        self.settings = SimpleNamespace(
            heartbeat_timeout=2.0,
            start_timeout=5,
            shutdown_grace=0,
            task="generate",
            models=[],
            model_name="first",
            device="cpu",
            of=lambda name: SimpleNamespace(device="cpu", tensor_parallel_size=1),
        )
        self.models_with_engine = {"decoder", "fallback"}
        self.starts = 0
        self.start_errors: list[Exception] = []
        self.fails_after_start: dict[str, Any] = {}
        """As `broken`."""
        self.removed: list[str] = []
        self.killed: list[str] = []
        self.kill_mends = False
        """Nothing is broken any more once a stub was killed."""
        self.http_url = self.metrics_url = ""

    def embeds(self, model: str) -> bool:
        return self.settings.task == "embed"

    def stub(self, model: str) -> Stub:
        process = SimpleNamespace(
            kill=lambda: self._killed(model), cpu_times=lambda: SimpleNamespace(user=0.0, system=0.0)
        )
        return Stub(process, f"region of {model}")  # type: ignore[arg-type]

    def _killed(self, model: str) -> None:
        if self.kill_mends:
            self.broken.clear()
        self.killed.append(model)

    def remove_region(self, name: str) -> None:
        self.removed.append(name)

    def start_again(self) -> None:
        self.starts += 1
        if self.start_errors:
            raise self.start_errors.pop(0)
        self.running = True
        self.broken.clear()
        self.broken |= self.fails_after_start

    def answer(self, path: str, body: dict[str, Any]) -> Any:
        question = of(path, body)
        self.asked.append(question)
        good = status(WELL) if question.startswith("status") else b"{}"
        return self.broken.get(question, (200, good))

    def count(self, question: str) -> int:
        return self.asked.count(question)


def of(path: str, body: dict[str, Any]) -> str:
    """`health decoder`, `token decoder`, `embedding decoder`, `load decoder`, `infer tokenizer`, `live`, `metrics`."""
    parts = path.strip("/").split("/")
    if parts[-1] in ("live", "metrics", "index", "ready"):
        return parts[-1]
    model = parts[parts.index("models") + 1]
    if parts[-1] == "generate":
        return f"{body.get('control', 'embedding' if body.get('embed') else 'token')} {model}"
    return f"{parts[-1]} {model}"


@contextlib.contextmanager
def scripted_triton() -> Iterator[ScriptedTriton]:
    triton, over = ScriptedTriton(), threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = msgspec.json.decode(self.rfile.read(length)) if length else {}
            answer = triton.answer(self.path, body)
            if answer == HANG:
                over.wait(60)
                return
            status, content = answer
            with contextlib.suppress(OSError):
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        do_GET = do_POST  # noqa: N815 - the base class's name

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    triton.http_url = f"http://127.0.0.1:{server.server_address[1]}"
    triton.metrics_url = f"{triton.http_url}/metrics"
    yield triton
    over.set()
    server.shutdown()
    server.server_close()


def fails(*errors: str) -> list[Exception]:
    return [LaunchError(error) for error in errors]
