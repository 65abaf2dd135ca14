"""A real Alertmanager with monitoring/alertmanager.yml: what is said beside what."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tidewright.bench.machine import free_ports

CONFIG = Path(__file__).resolve().parents[2] / "monitoring" / "alertmanager.yml"


@pytest.fixture(scope="module")
def alertmanager(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    (port,) = free_ports(1)
    command = ["prometheus-alertmanager", f"--config.file={CONFIG}", "--cluster.listen-address="]
    command += [f"--web.listen-address=127.0.0.1:{port}", f"--storage.path={tmp_path_factory.mktemp('alertmanager')}"]
    with (
        subprocess.Popen(command, stderr=subprocess.DEVNULL) as process,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=30) as client,
    ):
        try:
            deadline = time.monotonic() + 60
            while not _is_ready(client):
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.05)
            yield client
        finally:
            process.terminate()


def _is_ready(client: httpx.Client) -> bool:
    try:
        return client.get("/-/ready").status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.parametrize(
    ("cause", "symptom", "same"),
    [
        ("ModelProcessDead", "TritonRequestsFail", "instance"),
        ("EngineDown", "TritonRequestsFail", "instance"),
        ("EngineRestartsOften", "TritonRequestsFail", "instance"),
        ("EngineDown", "EngineRestarted", "instance"),
        ("NoReplicaUsable", "RequestsFail", "cluster"),
    ],
)
def test_a_symptom_is_not_told_beside_its_cause(
    alertmanager: httpx.Client, cause: str, symptom: str, same: str
) -> None:
    """`same`: what they have in common; the symptom of another one is told."""
    run = f"{cause}-{symptom}"  # the alerts of each test have an instance, or a cluster, of their own
    mine, others = {same: run}, {same: f"{run}-other"}
    alerts = [(cause, mine), (symptom, {"model": "decoder", **mine}), (symptom, {"model": "decoder", **others})]
    body = [{"labels": {"alertname": name, "severity": "warning", **labels}} for name, labels in alerts]
    assert alertmanager.post("/api/v2/alerts", json=body).status_code == 200
    told = {}
    deadline = time.monotonic() + 30
    while len(told) < 3 or any(one["status"]["state"] == "unprocessed" for one in told.values()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
        found = alertmanager.get("/api/v2/alerts").json()
        told = {
            (one["labels"]["alertname"], one["labels"][same]): one
            for one in found
            if one["labels"].get(same, "").startswith(run)
        }
    assert told[cause, run]["status"]["state"] == "active"
    assert told[symptom, run]["status"]["state"] == "suppressed"
    assert told[symptom, f"{run}-other"]["status"]["state"] == "active"
