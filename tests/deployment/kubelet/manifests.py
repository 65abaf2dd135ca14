"""kustomize's output as objects, and overlays of a test's own on top of ours."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import yaml

Manifest = dict[str, Any]

K8S = Path(__file__).resolve().parents[3] / "k8s"


def render(folder: Path) -> list[Manifest]:
    """What `kubectl apply -k` would apply."""
    run = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return [found for found in yaml.safe_load_all(run.stdout) if found]


def overlay(folder: Path, *bases: Path, **fields: Any) -> Path:
    """Writes a kustomization into `folder` that has these bases, and fields such as `patches`; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    relative = [os.path.relpath(base.resolve(), folder.resolve()) for base in bases]
    content = {"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization", "resources": relative}
    (folder / "kustomization.yaml").write_text(yaml.safe_dump({**content, **fields}))
    return folder


def patch(kind: str, name: str, *operations: Manifest) -> Manifest:
    """A JSON 6902 patch, as a field of a kustomization."""
    return {"target": {"kind": kind, "name": name}, "patch": yaml.safe_dump(list(operations))}


def key(manifest: Manifest) -> tuple[str, str]:
    return manifest["kind"], manifest["metadata"]["name"]
