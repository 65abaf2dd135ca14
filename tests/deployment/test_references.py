"""k8s/ against the code: paths, ports, images, Secrets and other names exist."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

import yaml

from helpers.manifests import (
    K8S,
    ROOT,
    Object,
    Pod,
    of_kind,
    pods,
    selects,
)
from helpers.rendered import all_pods, ports_of
from tidewright_gateway.websocket.backend import PATH as WEBSOCKET

SECRETS = {
    # name: the keys that are read
    "tidewright-keys": {"keys.yaml"},
    "tidewright-hub": {"token"},
    "tidewright-redis": {"password"},
    "tidewright-metrics": {"key"},
    "tidewright-rendezvous": {"secret"},
    "tidewright-tls": {"tls.crt", "tls.key", "ca.crt"},
}
"""That the operator makes, as docs/deployment.md says."""
OTHER_IMAGES = {"redis:7.4-bookworm"}


def test_paths_of_probes_and_monitors_are_the_gateways(every: dict[str, Sequence[Object]]) -> None:
    routes = set(re.findall(r"^## \w+ (/\S+)$", (ROOT / "docs" / "gateway-api.md").read_text(), re.MULTILINE))
    routes.add(WEBSOCKET)
    asked = set()
    for _, objects, pod in all_pods(every):
        for container in pod.containers:
            asked |= {
                (kind, container[kind]["httpGet"]["path"])
                for kind in ("startupProbe", "readinessProbe", "livenessProbe")
                if "httpGet" in container.get(kind, {})
            }
        for monitor in of_kind(objects, "ServiceMonitor"):
            asked |= {("monitor", one["path"]) for one in monitor["spec"]["endpoints"]}
        for route in of_kind(objects, "HTTPRoute"):
            paths = {match["path"]["value"] for rule in route["spec"]["rules"] for match in rule["matches"]}
            assert not [one for one in ("/metrics", "/admin") if one in paths]
            asked |= {("exact", one) for one in paths - {"/v1", "/health"}}
    assert {path for _, path in asked} <= routes
    assert {("livenessProbe", "/health/live"), ("readinessProbe", "/health/ready")} <= asked
    assert ("livenessProbe", "/health/ready") not in asked


def test_every_port_named_is_one(every: dict[str, Sequence[Object]]) -> None:
    for name, objects in every.items():
        services = {one["metadata"]["name"]: one for one in of_kind(objects, "Service")}
        found = list(pods(objects))
        for service in services.values():
            behind = [pod for pod in found if service["spec"]["selector"].items() <= pod.labels.items()]
            assert behind, (name, service["metadata"]["name"])
            for port in service["spec"]["ports"]:
                for pod in behind:
                    assert ports_of(pod).get(port["targetPort"]) == port["port"], (name, pod.owner, port)
        for pod in found:
            for container in pod.containers:
                for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                    for how in ("httpGet", "tcpSocket"):
                        if how in container.get(probe, {}):
                            assert container[probe][how]["port"] in ports_of(pod), (name, pod.owner)
        for monitor in of_kind(objects, "ServiceMonitor"):
            behind_it = [
                one for one in services.values() if selects(monitor["spec"]["selector"], one["metadata"]["labels"])
            ]
            assert len(behind_it) == 1, name
            assert {one["port"] for one in monitor["spec"]["endpoints"]} <= {
                port["name"] for port in behind_it[0]["spec"]["ports"]
            }
        for monitor in of_kind(objects, "PodMonitor"):
            watched = [pod for pod in found if selects(monitor["spec"]["selector"], pod.labels)]
            assert watched, name
            assert all(
                ports_of(pod)[one["port"]] == 8002 for pod in watched for one in monitor["spec"]["podMetricsEndpoints"]
            )
        for route in of_kind(objects, "HTTPRoute"):
            for rule in route["spec"]["rules"]:
                for backend in rule["backendRefs"]:
                    assert backend["port"] in {port["port"] for port in services[backend["name"]]["spec"]["ports"]}


def test_every_image_is_a_target_of_the_dockerfile(every: dict[str, Sequence[Object]]) -> None:
    targets = set(re.findall(r"^FROM \S+ AS (\S+)$", (ROOT / "docker" / "Dockerfile").read_text(), re.MULTILINE))
    used = set()
    for where, _, pod in all_pods(every):
        for container in pod.all_containers:
            if container["image"] not in OTHER_IMAGES:
                found = re.fullmatch(r"(?:[\w.]+/)?tidewright:(?:\d+\.\d+\.\d+-)?([a-z]+)", container["image"])
                assert found, (where, container["image"])
                used.add(found[1])
            if container["name"] == "gateway":
                assert container["image"].endswith("gateway")
    assert used <= targets | {"gpu"}
    assert used == {"cpu", "gpu", "gateway"}


def test_every_reference_is_there_or_for_the_operator_to_make(every: dict[str, Sequence[Object]]) -> None:
    used: set[tuple[str, str]] = set()
    for where, objects, pod in all_pods(every):
        there = {(one["kind"], one["metadata"]["name"]): one for one in objects}
        assert ("ServiceAccount", pod.spec["serviceAccountName"]) in there, where
        if "priorityClassName" in pod.spec:
            assert ("PriorityClass", pod.spec["priorityClassName"]) in there, where
        for volume in pod.spec["volumes"]:
            if "configMap" in volume:
                assert ("ConfigMap", volume["configMap"]["name"]) in there, where
            if "persistentVolumeClaim" in volume:
                assert ("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]) in there, where
            if "secret" in volume:
                used |= {(volume["secret"]["secretName"], key) for key in files_below(pod, volume["name"])}
        for container in pod.all_containers:
            for one in container.get("env", ()):
                source = one.get("valueFrom", {})
                if reference := source.get("configMapKeyRef"):
                    assert reference["key"] in there["ConfigMap", reference["name"]]["data"], where
                if reference := source.get("secretKeyRef"):
                    used.add((reference["name"], reference["key"]))
        for monitor in of_kind(objects, "ServiceMonitor"):
            for one in monitor["spec"]["endpoints"]:
                secrets = [one["authorization"]["credentials"]]
                secrets += [one["tlsConfig"]["ca"]["secret"]] if "tlsConfig" in one else []
                used |= {(secret["name"], secret["key"]) for secret in secrets}
    assert used <= {(name, key) for name, keys in SECRETS.items() for key in keys}
    assert {name for name, _ in used} == SECRETS.keys()


def files_below(pod: Pod, volume: str) -> set[str]:
    """Names of files in a mounted Secret that options name."""
    (mount,) = {one["mountPath"] for c in pod.containers for one in c["volumeMounts"] if one["name"] == volume}
    text = " ".join(str(one.get("value", "")) for one in pod.containers[0]["env"])
    text += (K8S / "base" / "gateway.yaml").read_text()
    found = set(re.findall(rf"{mount}/([\w.]+)", text))
    assert found, volume
    return found


def test_the_secrets_are_in_the_guide() -> None:
    text = (ROOT / "docs" / "deployment.md").read_text()
    for name, keys in SECRETS.items():
        assert f"`{name}`" in text, name
        assert all(key in text for key in keys), name


def test_the_guides_commands_make_the_secrets(tmp_path: Path) -> None:
    """Run as they stand there, but for what a cluster would do with them."""
    for name in ("keys.yaml", "prometheus.key", "tls.crt", "tls.key", "ca.crt"):
        (tmp_path / name).write_text("a")
    guide = (ROOT / "docs" / "deployment.md").read_text()
    made = {}
    for command in re.findall(r"^kubectl -n tidewright create secret .*$", guide, re.MULTILINE):
        done = subprocess.run(
            ["bash", "-c", f"{command} --dry-run=client -o yaml"],
            cwd=tmp_path,
            env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), "HF_TOKEN": "hf_a"},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, (command, done.stderr)
        secret = yaml.safe_load(done.stdout)
        assert secret["metadata"]["namespace"] == "tidewright"
        assert all(secret["data"].values()), command
        made[secret["metadata"]["name"]] = set(secret["data"])
    assert made == SECRETS
