"""Kubernetes manifests as kustomize renders them, and the pods in them. Independent of what made them."""

from __future__ import annotations

import functools
import os
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
K8S = ROOT / "k8s"
OVERLAYS = sorted(path.parent.name for path in (K8S / "overlays").glob("*/kustomization.yaml"))
COMPONENTS = sorted(path.parent.name for path in (K8S / "components").glob("*/kustomization.yaml"))
BASE = "base"
Object = dict[str, Any]


@dataclass(frozen=True)
class Pod:
    """What a workload makes its pods of."""

    owner: str
    """Kind/name, and which of several templates."""
    labels: dict[str, str]
    spec: Object

    @property
    def component(self) -> str:
        return self.labels["app.kubernetes.io/component"]

    @property
    def containers(self) -> list[Object]:
        """The first is the one that serves; init containers are not among them."""
        return list(self.spec["containers"])

    @property
    def all_containers(self) -> list[Object]:
        return [*self.spec.get("initContainers", ()), *self.spec["containers"]]


def rendered(folder: Path) -> list[Object]:
    """Raises AssertionError with kustomize's words."""
    command = ["kubectl", "kustomize", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"{folder}: {done.stderr}"
    assert not done.stderr, f"{folder}: {done.stderr}"  # warnings, as of deprecated fields
    return [one for one in yaml.load_all(done.stdout, yaml.CSafeLoader) if one]


@functools.cache
def overlay(name: str) -> tuple[Object, ...]:
    """Or the base, which is none."""
    return tuple(rendered(K8S / name if name == BASE else K8S / "overlays" / name))


def with_components(names: Sequence[str], folder: Path) -> list[Object]:
    """The base with these components, made in an empty folder."""
    kustomization = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "namespace": "tidewright",
        "resources": [os.path.relpath(K8S / "base", folder)],
        "components": [os.path.relpath(K8S / "components" / name, folder) for name in names],
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    return rendered(folder)


def of_kind(objects: Sequence[Object], *kinds: str) -> list[Object]:
    return [one for one in objects if one["kind"] in kinds]


def pods(objects: Sequence[Object]) -> Iterator[Pod]:
    for one in objects:
        name = f"{one['kind']}/{one['metadata']['name']}"
        if one["kind"] in ("Deployment", "StatefulSet"):
            template = one["spec"]["template"]
            yield Pod(name, template["metadata"]["labels"], template["spec"])
        elif one["kind"] == "LeaderWorkerSet":
            for which in ("leaderTemplate", "workerTemplate"):
                template = one["spec"]["leaderWorkerTemplate"][which]
                yield Pod(f"{name} {which}", template["metadata"]["labels"], template["spec"])


def selects(selector: Object, labels: dict[str, str]) -> bool:
    """A label selector with matchLabels and matchExpressions."""
    for expression in selector.get("matchExpressions", ()):
        found, values = labels.get(expression["key"]), expression.get("values", ())
        verdict = {
            "In": found in values,
            "NotIn": found not in values,
            "Exists": found is not None,
            "DoesNotExist": found is None,
        }[expression["operator"]]
        if not verdict:
            return False
    return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())
