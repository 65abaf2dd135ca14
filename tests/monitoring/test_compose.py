"""compose.yaml and what it mounts, as far as that can be checked without a Docker engine."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tidewright.config import Settings
from tidewright_gateway.config import GatewaySettings

ROOT = Path(__file__).resolve().parents[2]
COMPOSE = ROOT / "compose.yaml"
PROFILES = ("core", "observability")
KEY = "monitoring/compose/prometheus.key"


def config(*profiles: str) -> dict[str, Any]:
    """The file as docker-compose understands it."""
    chosen = [part for profile in profiles for part in ("--profile", profile)]
    command = ["docker-compose", "-f", str(COMPOSE), *chosen, "config"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return yaml.safe_load(done.stdout)


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    return config(*PROFILES)["services"]


@pytest.mark.parametrize("profile", PROFILES)
def test_each_profile_is_valid_and_has_services(profile: str) -> None:
    every = yaml.safe_load(COMPOSE.read_text())["services"]
    names = {name for name, service in every.items() if profile in service["profiles"]}
    assert names
    assert names <= config(profile)["services"].keys()


def test_every_mounted_file_exists(services: dict[str, Any]) -> None:
    for name, service in services.items():
        for volume in service.get("volumes", ()):
            source = str(volume).split(":")[0]
            if not source.startswith("/"):
                continue  # a volume
            path = Path(source).relative_to(ROOT)
            assert str(path) == KEY or (ROOT / path).exists(), (name, source)


def test_images_are_pinned_and_ports_are_private(services: dict[str, Any]) -> None:
    for name, service in services.items():
        assert re.search(r":(cpu|gateway|v?\d+\.\d+)", service["image"]), name
        for port in service.get("ports", ()):
            assert str(port).startswith("127.0.0.1:"), (name, port)


def test_our_services_options_exist(services: dict[str, Any]) -> None:
    """Every variable and flag is an option of the command that gets it."""
    of_gateway = {f"TIDEWRIGHT_GATEWAY_{name.upper()}" for name in GatewaySettings.model_fields}
    of_serve = {f"TIDEWRIGHT_{name.upper()}" for name in Settings.model_fields}
    flags = {f"--{name.replace('_', '-')}" for name in Settings.model_fields} | {"--no-fallback"}
    for name, service in services.items():
        if not service["image"].startswith("tidewright:"):
            continue
        assert set(service["environment"]) <= of_gateway | of_serve, name
        assert {part for part in service["command"] if part.startswith("--")} <= flags, name
    GatewaySettings.model_validate(
        {
            name.removeprefix("TIDEWRIGHT_GATEWAY_").lower(): value
            for name, value in services["gateway"]["environment"].items()
            if name in of_gateway
        }
    )


def test_services_are_reached_by_their_names(services: dict[str, Any]) -> None:
    """Hosts in the gateway's options, in Prometheus', the collector's and Grafana's are services."""
    texts = [str(services["gateway"]["environment"]), str(services["grafana"]["environment"])]
    texts += [(ROOT / "monitoring" / name).read_text() for name in ("compose/prometheus.yml", "otel/collector.yml")]
    hosts = set(re.findall(r"(?:[\"',/ ])([a-z][a-z0-9-]+):(?:\d{4,5})", "\n".join(texts)))
    assert {"replica-0", "replica-1", "redis", "gateway", "alertmanager", "prometheus", "jaeger", "loki"} <= hosts
    assert hosts <= services.keys()


def test_prometheus_accepts_its_configuration(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "monitoring" / "rules", tmp_path / "rules")
    shutil.copy(ROOT / "monitoring" / "compose" / "prometheus.yml", tmp_path)
    (tmp_path / "tidewright.key").write_text("tw-prometheus-secret\n")
    done = subprocess.run(
        ["promtool", "check", "config", str(tmp_path / "prometheus.yml")], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_collectors_pipelines_have_their_parts() -> None:
    parts = yaml.safe_load((ROOT / "monitoring" / "otel" / "collector.yml").read_text())
    assert set(parts["service"]["extensions"]) == parts["extensions"].keys()
    used: dict[str, set[str]] = {"receivers": set(), "processors": set(), "exporters": set()}
    for pipeline in parts["service"]["pipelines"].values():
        for kind, names in used.items():
            names.update(pipeline[kind])
    assert used == {kind: set(parts[kind]) for kind in used}
    # The endpoint that compose.yaml names.
    assert parts["receivers"]["otlp"]["protocols"]["http"]["endpoint"].endswith(":4318")


def test_the_dockerfile_has_the_targets_and_copies_what_exists(services: dict[str, Any]) -> None:
    text = (ROOT / "docker" / "Dockerfile").read_text()
    targets = set(re.findall(r"^FROM \S+ AS (\S+)$", text, re.MULTILINE))
    assert {service["build"]["target"] for service in services.values() if "build" in service} <= targets
    for line in re.findall(r"^COPY (?!--from)(.*)$", text, re.MULTILINE):
        *sources, _ = line.split()
        assert all((ROOT / source).exists() for source in sources), line
