"""Our overlays on the small kubelet: with a key, a prepared model, and less time to wait than in production."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import yaml

from deployment.kubelet.cluster import Cluster
from deployment.kubelet.manifests import K8S, Manifest, overlay, patch, render
from helpers.needs import needs
from tidewright.cache import cache_dir
from tidewright_gateway.auth.keys import KeyEntry, make_key

REPLICAS, GATEWAYS = ("StatefulSet", "tidewright-replica"), ("Deployment", "tidewright-gateway")
GROUPS = ("LeaderWorkerSet", "tidewright-replica")
_ENV = "/spec/template/spec/containers/0/env/-"


@needs("cluster")
class Stack(Cluster):
    """Applies nothing by itself. Failed containers start again ten times as soon as in Kubernetes."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"seed": prepared, "pace": 0.1, **options})
        self.key, hashed = make_key("tests")
        entry = msgspec.to_builtins(KeyEntry("tests", (hashed,)))
        self.secret = secret("tidewright-keys", **{"keys.yaml": yaml.safe_dump({"keys": [entry]})})

    def is_up(self) -> bool:
        return self.is_rolled_out(*REPLICAS) and self.is_rolled_out(*GATEWAYS)


def manifests(
    folder: Path, base: str, replicas: int, gateways: int, *patches: Manifest, components: Sequence[Path] = ()
) -> list[Manifest]:
    """An overlay in float32, in which texts are the same to the byte on any replica, with shorter waits."""
    exact = {"op": "add", "path": _ENV, "value": {"name": "TIDEWRIGHT_DTYPE", "value": "float32"}}
    one_thread = {"op": "add", "path": _ENV, "value": {"name": "TIDEWRIGHT_THREADS", "value": "1"}}
    path = overlay(
        folder,
        K8S / "overlays" / base,
        namespace="tidewright",
        components=[os.path.relpath(component.resolve(), folder.resolve()) for component in components],
        replicas=[{"name": REPLICAS[1], "count": replicas}, {"name": GATEWAYS[1], "count": gateways}],
        patches=[
            patch(*REPLICAS, exact, one_thread, soon(2), hook(1)),
            patch(*GATEWAYS, soon(1), hook(2)),
            *patches,
        ],
    )
    return render(path)


def group_manifests(folder: Path, base: str) -> list[Manifest]:
    """An overlay with one replica over several pods, and one gateway."""
    exact = {"name": "TIDEWRIGHT_DTYPE", "value": "float32"}
    leader, worker = (f"/spec/leaderWorkerTemplate/{one}Template/spec/containers/0" for one in ("leader", "worker"))
    path = overlay(
        folder,
        K8S / "overlays" / base,
        replicas=[{"name": GATEWAYS[1], "count": 1}],
        patches=[
            patch(
                *GROUPS,
                {"op": "add", "path": f"{leader}/env/-", "value": exact},
                {"op": "replace", "path": f"{leader}/lifecycle/preStop/exec/command/1", "value": "1"},
                {"op": "replace", "path": f"{worker}/lifecycle/preStop/exec/command/1", "value": "2"},
            ),
            patch(*GATEWAYS, soon(1), hook(2)),
        ],
    )
    return render(path)


def soon(seconds: int) -> Manifest:
    return {"op": "replace", "path": "/spec/minReadySeconds", "value": seconds}


def hook(seconds: int) -> Manifest:
    path = "/spec/template/spec/containers/0/lifecycle/preStop/exec/command/1"
    return {"op": "replace", "path": path, "value": str(seconds)}


def variable(name: str, value: str) -> Manifest:
    """Of the first container."""
    return {"op": "add", "path": _ENV, "value": {"name": name, "value": value}}


def secret(name: str, **files: str) -> Manifest:
    metadata = {"name": name, "namespace": "tidewright"}
    return {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "stringData": files}


def prepared(name: str, volume: Path) -> None:
    """A model cache begins with what this machine has prepared: preparing takes seconds, and has tests of its own."""
    if not name.startswith("cache"):
        return
    for part in ("models", "kernels"):
        shutil.copytree(cache_dir() / part, volume / part, copy_function=_link)
    for folder, _, _ in os.walk(volume):
        os.chmod(folder, 0o777)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy(source, target)
