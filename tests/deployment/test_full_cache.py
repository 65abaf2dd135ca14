"""A model cache that is too small for the model: the pod says so and does not start, and nothing half-made stays."""

from __future__ import annotations

from pathlib import Path

from deployment.kubelet.manifests import K8S, overlay, patch, render
from deployment.stack import GATEWAYS, REPLICAS, Stack
from helpers.hosts import or_skip

ROOM = 60 << 20  # bytes: less than the embedded model's download has


def test_a_full_cache_is_said_and_left_clean(tmp_path: Path) -> None:
    tiny = {"medium": "Memory", "sizeLimit": str(ROOM)}
    path = overlay(
        tmp_path / "overlay",
        K8S / "overlays" / "cpu-demo",
        namespace="tidewright",
        replicas=[{"name": REPLICAS[1], "count": 1}, {"name": GATEWAYS[1], "count": 0}],
        patches=[
            patch(
                *REPLICAS,
                {"op": "test", "path": "/spec/template/spec/volumes/1/name", "value": "cache"},
                {"op": "replace", "path": "/spec/template/spec/volumes/1/emptyDir", "value": tiny},
            )
        ],
    )
    with or_skip(), Stack(seed=lambda name, volume: None) as stack:
        stack.apply(render(path))
        stack.wait_until(lambda: stack.said("tidewright-replica-0", "BackOff"), 600)
        pod = stack.pod("tidewright-replica-0")
        assert not pod.ready
        assert pod.container("prepare").restarts >= 1
        assert pod.container("replica").log == ""
        assert "are free; free some space, or set TIDEWRIGHT_CACHE" in pod.container("prepare").log
        assert pod.volumes is not None
        assert [file for file in pod.volumes.path("cache").rglob("*") if file.is_file() and file.stat().st_size] == []
