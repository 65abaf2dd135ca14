"""A real Prometheus and Alertmanager with the files of monitoring/, and a webhook that notes what it is told, when."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import yaml

from tidewright.bench.machine import free_ports

MONITORING = Path(__file__).resolve().parents[1] / "monitoring"
START = 60.0  # seconds


@dataclass(frozen=True)
class Notice:
    """One alert of one call of the webhook."""

    at: float  # time.time()
    receiver: str
    status: str  # firing or resolved
    name: str
    labels: dict[str, str]


class Webhook:
    def __init__(self) -> None:
        self.notices: list[Notice] = []
        self._changed = threading.Condition()
        webhook = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                webhook._take(body, time.time())
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Webhook:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _take(self, body: dict[str, Any], at: float) -> None:
        with self._changed:
            for alert in body["alerts"]:
                labels = alert["labels"]
                self.notices.append(Notice(at, body["receiver"], alert["status"], labels["alertname"], labels))
            self._changed.notify_all()

    def wait(self, is_it: Callable[[Notice], bool], since: float, timeout: float) -> Notice | None:
        """The first notice from `since` on that is the one; None if none comes in time."""
        deadline = time.monotonic() + timeout
        with self._changed:
            while True:
                for notice in self.notices:
                    if notice.at >= since and is_it(notice):
                        return notice
                if (left := deadline - time.monotonic()) <= 0:
                    return None
                self._changed.wait(left)


class Watchers:
    """Scrapes a gateway, with its key, and Tritons."""

    def __init__(self, gateway: str, tritons: list[str], key: str, folder: Path) -> None:
        """Addresses as HOST:PORT; those of `tritons` are of their metrics."""
        self._folder = folder / "monitoring"
        self._targets, self._key = {"gateway": [gateway], "triton": tritons}, key
        self._prometheus_port, self._alertmanager_port = free_ports(2)
        self.webhook = Webhook()
        self._exits = ExitStack()

    def __enter__(self) -> Watchers:
        with ExitStack() as exits:
            exits.enter_context(self.webhook)
            self._configure()
            self._start(exits, self._alertmanager_port, [
                "prometheus-alertmanager", f"--config.file={self._folder / 'alertmanager.yml'}",
                f"--storage.path={self._folder / 'alertmanager'}", "--cluster.listen-address=",
            ])  # fmt: skip
            self._start(exits, self._prometheus_port, [
                "prometheus", f"--config.file={self._folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={self._folder / 'prometheus'}",
            ])  # fmt: skip
            self._exits = exits.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._exits.close()

    def query(self, expr: str) -> list[dict[str, Any]]:
        url = f"http://127.0.0.1:{self._prometheus_port}/api/v1/query"
        answer = httpx.get(url, params={"query": expr}, trust_env=False).json()
        found: list[dict[str, Any]] = answer["data"]["result"]
        return found

    def firing(self) -> set[str]:
        return {one["metric"]["alertname"] for one in self.query('ALERTS{alertstate="firing"}')}

    def wait_up(self) -> None:
        """All targets are scraped."""
        number = sum(map(len, self._targets.values()))
        deadline = time.monotonic() + START
        while len(self.query('up{job=~"gateway|triton"} == 1')) < number:
            if time.monotonic() > deadline:
                raise RuntimeError("the targets are not up")
            time.sleep(0.2)

    def _configure(self) -> None:
        shutil.copytree(MONITORING, self._folder)
        (self._folder / "tidewright.key").write_text(self._key)
        config = yaml.safe_load((self._folder / "prometheus.file_sd.yml").read_text())
        config["scrape_configs"] = [job for job in config["scrape_configs"] if job["job_name"] in self._targets]
        config["alerting"]["alertmanagers"] = [
            {"static_configs": [{"targets": [f"127.0.0.1:{self._alertmanager_port}"]}]}
        ]
        (self._folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        for job, addresses in self._targets.items():
            (self._folder / "targets" / f"{job}.yml").write_text(yaml.safe_dump([{"targets": addresses}]))
        manager = self._folder / "alertmanager.yml"
        manager.write_text(manager.read_text().replace("http://127.0.0.1:9095", self.webhook.url))

    def _start(self, exits: ExitStack, port: int, command: list[str]) -> None:
        log = exits.enter_context((self._folder / f"{command[0]}.log").open("wb"))
        process = subprocess.Popen([*command, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log)
        exits.callback(process.wait)
        exits.callback(process.terminate)
        deadline = time.monotonic() + START
        while True:
            try:
                if httpx.get(f"http://127.0.0.1:{port}/-/ready", trust_env=False).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{command[0]} did not start: {Path(log.name).read_text()[-2000:]}")
            time.sleep(0.1)
