"""A real gateway process in front of real Tritons."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import openai
from prometheus_client.parser import text_string_to_metric_families

from helpers.echo_replica import EchoReplica
from helpers.needs import needs
from helpers.triton import RunningServer
from tidewright.bench.machine import free_ports

MODEL = "smollm2-135m"
_COMMAND = [sys.executable, "-m", "tidewright_gateway"]


@needs("gateway")
class RunningGateway:
    def __init__(self, model_dir: Path, *servers: RunningServer | EchoReplica, **options: Any) -> None:
        (self.port,) = free_ports(1)
        self.url = f"http://127.0.0.1:{self.port}"
        values = {
            "model": model_dir,
            "served_model_name": MODEL,
            "port": self.port,
            "replicas": ",".join(server.grpc_url for server in servers),
            "fallback": False,
            "cache_size": 0,  # most tests are about what the replicas do
            **options,
        }
        self._environment = {
            **os.environ,
            **{f"TIDEWRIGHT_GATEWAY_{name.upper()}": str(value) for name, value in values.items()},
        }
        self.http = httpx.Client(base_url=self.url, timeout=120, trust_env=False)
        self.openai = openai.OpenAI(
            base_url=f"{self.url}/v1", api_key="none", max_retries=0, http_client=httpx.Client(trust_env=False)
        )

    def run_to_its_end(self) -> subprocess.CompletedProcess[str]:
        """For one that can't start."""
        return subprocess.run(_COMMAND, env=self._environment, capture_output=True, text=True, timeout=60)

    def __enter__(self) -> RunningGateway:
        self.process = subprocess.Popen(_COMMAND, env=self._environment)
        deadline = time.monotonic() + 60
        while not self.is_live():
            assert self.process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()
        self.openai.close()
        self.process.terminate()
        assert self.process.wait(30) in (0, -15, -9)  # the last where a test killed it

    def is_live(self) -> bool:
        try:
            return self.http.get("/health/live").status_code == 200
        except httpx.TransportError:
            return False

    def post(self, path: str, body: dict[str, Any], **options: Any) -> httpx.Response:
        return self.http.post(path, json={"model": MODEL, **body}, **options)

    def metric(self, name: str, **labels: str) -> float:
        """Sum over the series that have these labels."""
        found = 0.0
        for family in text_string_to_metric_families(self.http.get("/metrics").text):
            for sample in family.samples:
                if sample.name == f"tidewright_gateway_{name}" and labels.items() <= sample.labels.items():
                    found += sample.value
        return found
