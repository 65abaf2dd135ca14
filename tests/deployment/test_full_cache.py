"""A model cache that is too small for the model: the pod says so and does not start, and nothing half-made stays."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from deployment.kubelet.manifests import K8S, overlay, patch, render
from deployment.stack import GATEWAYS, REPLICAS, Stack
from helpers.hosts import or_skip
from tidewright.launch.model_sources import download_embedded

MODEL = "/var/cache/tidewright/model.gguf"


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return download_embedded(tmp_path_factory.mktemp("download"))


def test_a_full_cache_is_said_and_left_clean(gguf: Path, tmp_path: Path) -> None:
    """With room for what the model is made from, and some of what is made."""
    size = gguf.stat().st_size + (40 << 20)
    tiny = {"medium": "Memory", "sizeLimit": str(size)}
    path = overlay(
        tmp_path / "overlay",
        K8S / "overlays" / "cpu-demo",
        namespace="tidewright",
        configMapGenerator=[{"name": "tidewright-model", "behavior": "merge", "literals": [f"model={MODEL}"]}],
        replicas=[{"name": REPLICAS[1], "count": 1}, {"name": GATEWAYS[1], "count": 0}],
        patches=[
            patch(
                *REPLICAS,
                {"op": "test", "path": "/spec/template/spec/volumes/1/name", "value": "cache"},
                {"op": "replace", "path": "/spec/template/spec/volumes/1/emptyDir", "value": tiny},
            )
        ],
    )

    def seed(name: str, volume: Path) -> None:
        if name == "cache":
            shutil.copy(gguf, volume / Path(MODEL).name)

    with or_skip(), Stack(seed=seed) as stack:
        stack.apply(render(path))
        stack.wait_until(lambda: stack.said("tidewright-replica-0", "BackOff"), 600)
        pod = stack.pod("tidewright-replica-0")
        assert not pod.ready
        assert pod.container("prepare").restarts >= 1
        assert pod.container("replica").log == ""
        assert "are free; free some space, or set TIDEWRIGHT_CACHE" in pod.container("prepare").log
        assert pod.volumes is not None
        left = {file for file in pod.volumes.path("cache").rglob("*") if file.is_file() and file.stat().st_size}
        assert {file.name for file in left} == {Path(MODEL).name}
