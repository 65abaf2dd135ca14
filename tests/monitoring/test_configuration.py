"""Prometheus and Alertmanager accept their configurations, alerts say all they must, and their runbooks exist."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers.documents import anchors

ROOT = Path(__file__).resolve().parents[2]
MONITORING = ROOT / "monitoring"
RUNBOOKS = ROOT / "docs" / "troubleshooting.md"
ALERTS: list[dict[str, Any]] = [
    rule
    for group in yaml.safe_load((MONITORING / "rules" / "alerts.yml").read_text())["groups"]
    for rule in group["rules"]
]
POD = {
    "__address__": "10.0.0.7:5000",
    "__meta_kubernetes_pod_ip": "10.0.0.7",
    "__meta_kubernetes_pod_name": "gateway-0",
    "__meta_kubernetes_namespace": "serving",
    "__meta_kubernetes_pod_node_name": "node-1",
    "__meta_kubernetes_pod_phase": "Running",
}
NAME = "__meta_kubernetes_pod_label_app_kubernetes_io_name"
COMPONENT = "__meta_kubernetes_pod_label_app_kubernetes_io_component"
GATEWAY = {NAME: "tidewright", COMPONENT: "gateway"}
REPLICA = {NAME: "tidewright", COMPONENT: "replica"}
PORT = "__meta_kubernetes_pod_annotation_prometheus_io_port"


def run(*command: str | Path) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """With the key that is not in the repository."""
    where = tmp_path / "monitoring"
    shutil.copytree(MONITORING, where)
    (where / "tidewright.key").write_text("tw-prometheus-secret\n")
    return where


def in_kubernetes(copy: Path, pods: list[dict[str, str]]) -> Path:
    """The configuration with these pods in place of Kubernetes' API, which Debian's Prometheus is built without."""
    config = yaml.safe_load((copy / "prometheus.kubernetes.yml").read_text())
    for job in config["scrape_configs"]:
        assert job.pop("kubernetes_sd_configs") == [{"role": "pod"}]
        job["static_configs"] = [{"targets": [pod["__address__"]], "labels": pod} for pod in pods]
        if "authorization" in job:
            job["authorization"]["credentials_file"] = "tidewright.key"
    (manager,) = config["alerting"]["alertmanagers"]
    assert manager.pop("kubernetes_sd_configs") == [{"role": "pod"}]
    manager["static_configs"] = [{"targets": ["alertmanager:9093"]}]
    file = copy / "prometheus.yml"
    file.write_text(yaml.safe_dump(config))
    return file


@pytest.mark.parametrize("name", ["prometheus.yml", "prometheus.file_sd.yml"])
def test_prometheus_accepts_its_configuration(name: str, copy: Path) -> None:
    assert "rules found" in run("promtool", "check", "config", copy / name)


def test_prometheus_accepts_the_configuration_for_kubernetes(copy: Path) -> None:
    assert "rules found" in run("promtool", "check", "config", in_kubernetes(copy, [POD]))


@pytest.mark.parametrize(
    ("job", "labels", "address"),
    [
        ("gateway", GATEWAY, "10.0.0.7:8080"),
        ("gateway", GATEWAY | {PORT: "9443"}, "10.0.0.7:9443"),
        ("triton", REPLICA, "10.0.0.7:8002"),
        ("triton", REPLICA | {PORT: "9002"}, "10.0.0.7:9002"),
        ("node", {NAME: "prometheus-node-exporter"}, "10.0.0.7:9100"),
        ("dcgm", {NAME: "dcgm-exporter"}, "10.0.0.7:9400"),
        ("gateway", REPLICA, None),
        ("triton", {NAME: "other"}, None),
        ("gateway", {}, None),
        ("gateway", GATEWAY | {NAME: "other"}, None),
        ("gateway", GATEWAY | {"__meta_kubernetes_pod_phase": "Succeeded"}, None),
    ],
)
def test_a_pod_becomes_the_right_target(job: str, labels: dict[str, str], address: str | None, copy: Path) -> None:
    file = in_kubernetes(copy, [POD | labels])
    (found,) = json.loads(run("promtool", "check", "service-discovery", "--timeout=500ms", file, job))
    target = found["labels"]
    assert target.get("__address__") == address
    if address and job in ("gateway", "triton"):
        assert (target["namespace"], target["pod"], target["node"]) == ("serving", "gateway-0", "node-1")


def test_the_lists_of_targets_have_the_ports_that_the_programs_listen_on(copy: Path) -> None:
    for job, port in {"gateway": 8080, "triton": 8002, "node": 9100, "dcgm": 9400}.items():
        for name in ("prometheus.yml", "prometheus.file_sd.yml"):
            found = json.loads(run("promtool", "check", "service-discovery", "--timeout=500ms", copy / name, job))
            assert [one["labels"]["instance"] for one in found] == [f"127.0.0.1:{port}"]


@pytest.mark.parametrize("name", ["prometheus.yml", "prometheus.file_sd.yml", "prometheus.kubernetes.yml"])
def test_what_critical_alerts_need_is_scraped_each_second(name: str) -> None:
    jobs = {job["job_name"]: job for job in yaml.safe_load((MONITORING / name).read_text())["scrape_configs"]}
    assert {jobs[job]["scrape_interval"] for job in ("gateway", "triton")} == {"1s"}


def test_alertmanager_accepts_its_configuration() -> None:
    assert "SUCCESS" in run("amtool", "check-config", MONITORING / "alertmanager.yml")


@pytest.mark.parametrize("severity", ["critical", "warning", "info"])
def test_each_severity_has_its_receiver(severity: str) -> None:
    command = ["amtool", "config", "routes", "test", f"--config.file={MONITORING / 'alertmanager.yml'}"]
    assert run(*command, f"severity={severity}", "alertname=Any").strip() == severity


@pytest.mark.parametrize("alert", ALERTS, ids=lambda one: one["alert"])
def test_an_alert_says_all_that_it_must(alert: dict[str, Any]) -> None:
    assert alert["labels"]["severity"] in ("critical", "warning", "info")
    assert alert["labels"]["component"]
    assert set(alert["annotations"]) == {"summary", "description", "runbook_url"}
    page, _, anchor = alert["annotations"]["runbook_url"].partition("#")
    assert ROOT / page == RUNBOOKS
    assert anchor == alert["alert"].lower()
    assert anchor in anchors(RUNBOOKS)


def test_inhibitions_name_alerts_that_exist() -> None:
    config = yaml.safe_load((MONITORING / "alertmanager.yml").read_text())
    names: set[str] = set()
    for rule in config["inhibit_rules"]:
        for matcher in (*rule["source_matchers"], *rule["target_matchers"]):
            if found := re.fullmatch(r'alertname=~?"([\w|]+)"', matcher):
                names |= set(found[1].split("|"))
    assert names <= {alert["alert"] for alert in ALERTS}


def test_each_alert_of_one_replica_is_inhibited_with_all_replicas() -> None:
    """Their label `scope` is what the inhibition matches."""
    for alert in ALERTS:
        is_of_one = re.search(
            r"replica_up|job=\"triton\"|tidewright_(adapter|engine|healthy|kv|preemptions|steps)|nv_",
            alert["expr"],
        )
        assert (alert["labels"].get("scope") == "replica") == bool(is_of_one or alert["alert"] == "ModelProcessDead"), (
            alert["alert"]
        )
