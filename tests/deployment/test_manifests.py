"""k8s/: every overlay and component renders, as before, to what Kubernetes and the CRDs' schemas accept."""

from __future__ import annotations

import functools
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import jsonschema
import kubernetes_validate
import kubernetes_validate.utils
import pytest
import yaml

from helpers.checkov import check_policies
from helpers.manifests import (
    COMPONENTS,
    K8S,
    OVERLAYS,
    ROOT,
    Object,
    of_kind,
    overlay,
    pods,
    rendered,
    with_components,
)

VERSIONS = ("1.30", "1.32", "1.34", "1.37")
CRDS = {path.stem: json.loads(path.read_text()) for path in (Path(__file__).parent / "crds").glob("*.json")}
CLUSTER_SCOPED = {"Namespace", "PriorityClass"}
EXCEPTIONS = {
    "CKV_K8S_11": "No CPU limits: a quota stops threads in the middle of a step; `threads` and requests bound the use.",
    "CKV_K8S_15": "IfNotPresent: a node restarts pods while the registry is away; versions in tags are not moved.",
    "CKV_K8S_35": "TIDEWRIGHT_GATEWAY_LIMITS_STORE holds a password, and is no file; load tests get their key so.",
    "CKV_K8S_43": "No digests: whoever builds the images puts theirs into the overlay, or a copy of k8s/loadtest.",
}
"""Of checkov, with the reason; of load tests as well, whose processes a quota would make measure the quota."""


@pytest.fixture(scope="module", autouse=True)
def schemas_are_read_once() -> None:
    kubernetes_validate.utils.schema_contents = functools.cache(kubernetes_validate.utils.schema_contents)


def check_schemas(objects: Sequence[Object], version: str) -> None:
    for one in objects:
        name = f"{one['kind']}/{one['metadata']['name']}"
        if one["kind"] in CRDS:
            jsonschema.Draft202012Validator(CRDS[one["kind"]]).validate(one)
        else:
            try:
                kubernetes_validate.validate(one, version, strict=True)
            except kubernetes_validate.ValidationError as error:
                raise AssertionError(f"{name}, {version}: {list(error.path)}: {error.message}") from None
    for pod in pods(objects):
        whole = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}, "spec": pod.spec}
        kubernetes_validate.validate(whole, version, strict=True)


def test_every_folder_is_rendered() -> None:
    assert {"cpu-demo", "single-gpu", "tensor-parallel", "multi-node", "production"} <= set(OVERLAYS)
    for kind, names in (("overlays", OVERLAYS), ("components", COMPONENTS)):
        assert names == sorted(path.name for path in (K8S / kind).iterdir())


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", OVERLAYS)
def test_an_overlay_is_valid(name: str, version: str) -> None:
    check_schemas(overlay(name), version)


@pytest.mark.parametrize("name", COMPONENTS)
def test_a_component_alone_is_valid(name: str, tmp_path: Path) -> None:
    without, with_it = with_components([], tmp_path), with_components([name], tmp_path)
    assert with_it != without
    check_schemas(with_it, VERSIONS[-1])


def test_all_components_go_together(tmp_path: Path) -> None:
    chosen = [name for name in COMPONENTS if name not in ("autoscaling-hpa", "multi-node", "tls")] + ["tls"]
    objects = with_components(chosen, tmp_path)
    check_schemas(objects, VERSIONS[-1])
    (monitor,) = of_kind(objects, "ServiceMonitor")
    assert monitor["spec"]["endpoints"][0]["scheme"] == "https"


def test_the_guides_overlay_on_top_of_another_works(tmp_path: Path) -> None:
    (text,) = re.findall(
        r"```yaml\n(.*?kind: Kustomization\n.*?)```", (ROOT / "docs/deployment.md").read_text(), re.DOTALL
    )
    shutil.copytree(K8S, tmp_path / "tidewright" / "k8s")
    (tmp_path / "kustomization.yaml").write_text(text)
    objects = rendered(tmp_path)
    check_schemas(objects, VERSIONS[-1])
    assert of_kind(objects, "ScaledObject")
    for one in objects:
        assert (one["metadata"].get("namespace") == "tidewright") == (one["kind"] not in CLUSTER_SCOPED), one[
            "metadata"
        ]
        if one["metadata"]["name"] in ("tidewright-replica", "tidewright-gateway") and "template" in one.get(
            "spec", {}
        ):
            assert "replicas" not in one["spec"]
            assert all(
                c["image"].startswith("registry.internal/") for c in one["spec"]["template"]["spec"]["containers"]
            )


def test_adapters_are_one_volume_that_replicas_only_read(tmp_path: Path) -> None:
    """As docs/lora.md says: with the overlay there, on top of one that keeps models in volumes as well."""
    (text,) = re.findall(r"```yaml\n(.*?kind: Kustomization\n.*?)```", (ROOT / "docs/lora.md").read_text(), re.DOTALL)
    shutil.copytree(K8S, tmp_path / "tidewright" / "k8s")
    (tmp_path / "kustomization.yaml").write_text(text)
    objects = rendered(tmp_path)
    check_schemas(objects, VERSIONS[-1])
    (claim,) = of_kind(objects, "PersistentVolumeClaim")
    assert claim["spec"]["storageClassName"] == "shared-files"
    (pod,) = [pod for pod in pods(objects) if pod.owner == "StatefulSet/tidewright-replica"]
    (volume,) = [one for one in pod.spec["volumes"] if "persistentVolumeClaim" in one]
    assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    (mount,) = [one for one in pod.containers[0]["volumeMounts"] if one["name"] == volume["name"]]
    assert mount["readOnly"] is True
    assert {"name": "TIDEWRIGHT_ADAPTER_FOLDER", "value": mount["mountPath"]} in pod.containers[0]["env"]
    assert {"/var/cache/tidewright", "/etc/tidewright/replica"} <= {
        one["mountPath"] for one in pod.containers[0]["volumeMounts"]
    }


def test_a_misspelt_field_is_found() -> None:
    """The validators are strict, for built-in kinds, pods of other kinds, and CRDs."""
    for kind in ("Deployment", "PodMonitor", "LeaderWorkerSet"):
        name = "multi-node" if kind == "LeaderWorkerSet" else "production"
        (one,) = of_kind(json.loads(json.dumps(overlay(name))), kind)[:1]
        one["spec"]["replicaz"] = 1
        with pytest.raises((AssertionError, jsonschema.ValidationError)):
            check_schemas([one], VERSIONS[-1])
    (group,) = of_kind(json.loads(json.dumps(overlay("multi-node"))), "LeaderWorkerSet")
    group["spec"]["leaderWorkerTemplate"]["workerTemplate"]["spec"]["containerz"] = []
    with pytest.raises(kubernetes_validate.ValidationError):
        check_schemas([group], VERSIONS[-1])


def test_the_crds_schemas_are_strict_and_say_what_was_read() -> None:
    def closed(schema: object) -> bool:
        if isinstance(schema, list):
            return all(map(closed, schema))
        if not isinstance(schema, dict):
            return True
        opened = "properties" in schema and schema.get("additionalProperties") is not False
        return not opened and all(map(closed, schema.values()))

    assert CRDS
    for kind, schema in CRDS.items():
        jsonschema.Draft202012Validator.check_schema(schema)
        assert schema["x-upstream"], kind
        assert closed(schema), kind


def test_what_is_rendered_is_what_was_meant() -> None:
    """If the change is meant: python k8s/digests.py --write"""
    done = subprocess.run([sys.executable, K8S / "digests.py"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_digest_follows_any_change(tmp_path: Path) -> None:
    copy = tmp_path / "k8s"
    shutil.copytree(K8S, copy)
    (copy / "overlays" / "cpu-demo" / "serving.yaml").write_text("threads: 2\n")
    done = subprocess.run([sys.executable, copy / "digests.py"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "python k8s/digests.py --write" in done.stderr
    assert subprocess.run([sys.executable, copy / "digests.py", "--write"], check=False).returncode == 0
    before, after = ((one / "digests.txt").read_text().splitlines() for one in (K8S, copy))
    changed = {line.split()[1] for line in set(before) ^ set(after)}
    assert changed == {"cpu-demo"}


def test_prometheus_rules_are_those_of_monitoring() -> None:
    """python k8s/make_rules.py"""
    found = {one["metadata"]["name"]: one["spec"] for one in of_kind(overlay("production"), "PrometheusRule")}
    files = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / "monitoring" / "rules").glob("*.yml")}
    assert found == {f"tidewright-{name}": content for name, content in files.items()}


@pytest.mark.parametrize("name", OVERLAYS)
def test_everything_is_in_one_namespace_and_there_once(name: str) -> None:
    objects = overlay(name)
    keys = [(one["kind"], one["metadata"]["name"]) for one in objects]
    assert len(set(keys)) == len(keys)
    for one in objects:
        expected = None if one["kind"] in CLUSTER_SCOPED else "tidewright"
        assert one["metadata"].get("namespace") == expected, one["metadata"]["name"]


def test_a_change_of_configuration_rolls_the_pods(tmp_path: Path) -> None:
    """Names of ConfigMaps follow their content, and stand in the templates."""
    copy = tmp_path / "k8s"
    shutil.copytree(K8S, copy)
    with (copy / "overlays" / "production" / "gateway.yaml").open("a") as file:
        file.write("websocket: {ws_kept: 10}\n")
    before = {pod.owner: pod.spec for pod in pods(overlay("production"))}
    after = {pod.owner: pod.spec for pod in pods(rendered(copy / "overlays" / "production"))}
    assert [owner for owner in before if before[owner] != after[owner]] == ["Deployment/tidewright-gateway"]


def test_checkov_finds_nothing_but_what_is_excepted(tmp_path: Path) -> None:
    """In all that is rendered, load tests too, once each: it takes seconds to start. It knows built-in kinds only."""
    whole = with_components([name for name in COMPONENTS if name not in ("autoscaling-keda", "multi-node")], tmp_path)
    (tmp_path / "kustomization.yaml").unlink()
    found = {
        json.dumps(one): one
        for objects in (*map(overlay, OVERLAYS), whole, rendered(K8S / "loadtest"))
        for one in objects
    }
    for number, one in enumerate(found.values()):
        if one["kind"] not in CRDS:
            (tmp_path / f"{number}.yaml").write_text(yaml.safe_dump(one))
    check_policies(tmp_path, "kubernetes", EXCEPTIONS)
