"""A small server with Elasticsearch's `_bulk` API, which can be stopped and started again on its port."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class BulkSink:
    def __init__(self, port: int) -> None:
        self.port = port
        self.documents: dict[str, tuple[str, float]] = {}
        """By id: the line as it came, and when (time.time())."""
        self.num_received = 0
        """With those that came twice."""
        self._server: ThreadingHTTPServer | None = None
        self._connections: set[socket.socket] = set()

    @property
    def lines(self) -> list[str]:
        return [line for line, _ in self.documents.values()]

    def start(self) -> None:
        sink = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                sink._connections.add(self.request)
                super().setup()

            def finish(self) -> None:
                sink._connections.discard(self.request)
                super().finish()

            def do_POST(self) -> None:
                body = self.rfile.read(length := int(self.headers.get("Content-Length", 0)))
                if len(body) < length:
                    return  # it was cut
                self._answer(sink.take(body) if self.path.endswith("_bulk") else {})

            def do_GET(self) -> None:
                self._answer({"cluster_name": "sink"})

            def do_HEAD(self) -> None:
                self._answer({})

            def _answer(self, answer: dict) -> None:
                data = json.dumps(answer).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        ThreadingHTTPServer.allow_reuse_address = True
        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        """Connections to it are cut, and refused from now on; what has come stays."""
        if self._server:
            self._server.shutdown()
            self._server.server_close()
            self._server = None
        for connection in list(self._connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def take(self, body: bytes) -> dict:
        lines, now, items = body.decode().split("\n"), time.time(), []
        for action, document in zip(lines[0::2], lines[1::2], strict=False):
            name = json.loads(action)["index"]["_id"]
            self.num_received += 1
            self.documents.setdefault(name, (document, now))
            items.append({"index": {"_index": "tidewright", "_id": name, "status": 201}})
        return {"took": 1, "errors": False, "items": items}

    def __enter__(self) -> BulkSink:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
