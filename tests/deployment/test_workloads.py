"""k8s/: pods are restricted, updates stop at a bad one, budgets, spreads and autoscalers are about what there is."""

from __future__ import annotations

from collections.abc import Sequence

import promql_parser
import yaml

from helpers.manifests import (
    K8S,
    Object,
    of_kind,
    pods,
    selects,
)
from helpers.rendered import all_pods, variables
from tidewright_gateway.metrics.catalogue import CATALOGUE


def test_pods_are_restricted(every: dict[str, Sequence[Object]]) -> None:
    """https://kubernetes.io/docs/concepts/security/pod-security-standards/#restricted, and what goes beyond it."""
    for where, _, pod in all_pods(every):
        spec, allowed = pod.spec, {"configMap", "secret", "emptyDir", "ephemeral", "persistentVolumeClaim", "name"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys(), where
        assert all(volume.keys() <= allowed for volume in spec["volumes"]), where
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] > 0
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert spec["automountServiceAccountToken"] is False, where
        # Else the Service tidewright-gateway would set TIDEWRIGHT_GATEWAY_PORT, an option.
        assert spec["enableServiceLinks"] is False, where
        for container in pod.all_containers:
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False, where
            assert context["capabilities"] == {"drop": ["ALL"]}, where
            assert context["readOnlyRootFilesystem"] is True, where
            assert container["terminationMessagePolicy"] == "FallbackToLogsOnError", where
            assert {"cpu", "memory"} <= container["resources"]["requests"].keys(), where
            assert "memory" in container["resources"]["limits"], where


def test_what_is_written_to_is_a_volume(every: dict[str, Sequence[Object]]) -> None:
    """The root file system is read-only."""
    for where, objects, pod in all_pods(every):
        volumes = {one["name"] for one in pod.spec["volumes"]}
        for one in of_kind(objects, "StatefulSet"):
            if pod.owner == f"StatefulSet/{one['metadata']['name']}":
                volumes |= {claim["metadata"]["name"] for claim in one["spec"].get("volumeClaimTemplates", ())}
        for container in pod.all_containers:
            mounts = {one["mountPath"]: one for one in container["volumeMounts"]}
            assert {one["name"] for one in mounts.values()} <= volumes, where
            if container["name"] == "redis":
                assert "/data" in mounts
                continue
            env = variables(container)
            assert "/tmp" in mounts, where
            assert env["TIDEWRIGHT_CACHE"] in mounts, where
            assert env.get("HF_HOME", env["TIDEWRIGHT_CACHE"]).startswith(env["TIDEWRIGHT_CACHE"]), where
            assert ("/dev/shm" in mounts) == (container["name"] in ("replica", "worker")), where
            read_only = mounts[env["TIDEWRIGHT_CACHE"]].get("readOnly", False)
            assert read_only == (container["name"] == "gateway"), where


def test_budgets_and_spreads_are_about_pods_that_there_are(every: dict[str, Sequence[Object]]) -> None:
    spreads = 0
    for name, objects in every.items():
        found = list(pods(objects))
        for budget in of_kind(objects, "PodDisruptionBudget"):
            assert any(selects(budget["spec"]["selector"], pod.labels) for pod in found), name
            assert budget["spec"]["maxUnavailable"] == 1
        for pod in found:
            for spread in pod.spec.get("topologySpreadConstraints", ()):
                spreads += 1
                assert selects(spread["labelSelector"], pod.labels), pod.owner
    assert spreads == 4


def test_updates_stop_at_a_pod_that_never_becomes_ready(every: dict[str, Sequence[Object]]) -> None:
    """And those that are ready serve on."""
    for name, objects in every.items():
        for one in of_kind(objects, "Deployment"):
            assert one["spec"]["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}, name
        for one in of_kind(objects, "StatefulSet"):
            if one["metadata"]["name"] == "tidewright-replica":
                assert one["spec"]["podManagementPolicy"] == "Parallel"
                assert one["spec"]["updateStrategy"] == {"type": "RollingUpdate", "rollingUpdate": {"partition": 0}}
        for one in of_kind(objects, "LeaderWorkerSet"):
            assert one["spec"]["rolloutStrategy"]["rollingUpdateConfiguration"]["maxUnavailable"] == 1


def test_autoscalers_scale_what_there_is_by_metrics_that_there_are(every: dict[str, Sequence[Object]]) -> None:
    series = known_series()
    adapter = yaml.safe_load((K8S / "components" / "autoscaling-hpa" / "prometheus-adapter.yaml").read_text())["rules"]
    served = {kind: {rule["name"]["as"] for rule in adapter[kind]} for kind in ("custom", "external")}
    for rule in (*adapter["custom"], *adapter["external"]):
        query = rule["metricsQuery"].replace("<<.LabelMatchers>>", 'namespace="a"')
        assert selected(query) | selected(rule["seriesQuery"]) <= series
    for kind in ("hpa", "keda"):
        objects = every[f"base and autoscaling-{kind}"]
        workloads = {
            (one["kind"], one["metadata"]["name"]): one for one in of_kind(objects, "Deployment", "StatefulSet")
        }
        scalers = of_kind(objects, "HorizontalPodAutoscaler", "ScaledObject")
        assert len(scalers) == 2
        for scaler in scalers:
            target = scaler["spec"]["scaleTargetRef"]
            workload = workloads[target["kind"], target["name"]]
            assert "replicas" not in workload["spec"], "each apply would set it back"
            containers = {one["name"] for one in workload["spec"]["template"]["spec"]["containers"]}
            assert (scaler["spec"].get("minReplicas") or scaler["spec"]["minReplicaCount"]) >= 1
            for metric in scaler["spec"].get("metrics", ()):
                if metric["type"] == "ContainerResource":
                    assert metric["containerResource"]["container"] in containers
                else:
                    where = {"Pods": "custom", "External": "external"}[metric["type"]]
                    assert metric[metric["type"].lower()]["metric"]["name"] in served[where]
            for trigger in scaler["spec"].get("triggers", ()):
                if trigger["type"] == "cpu":
                    assert trigger["metadata"]["containerName"] in containers
                else:
                    assert selected(trigger["metadata"]["query"]) <= series


def known_series() -> set[str]:
    found = set()
    for prefix, specs in CATALOGUE.items():
        for spec in specs:
            suffixes = ("_bucket", "_sum", "_count") if spec.kind == "histogram" else ("",)
            found |= {f"{prefix}{spec.name}{suffix}" for suffix in suffixes}
    return found


def selected(query: str) -> set[str]:
    """Names of the series in a query, which must be valid."""
    found = set()

    def walk(node: object) -> None:
        if isinstance(node, promql_parser.VectorSelector):
            found.add(str(node.name))
        for name in ("expr", "lhs", "rhs", "vector_selector", "param"):
            child = getattr(node, name, None)
            if child is not None and not isinstance(child, str):
                walk(child)
        for child in getattr(node, "args", None) or ():
            walk(child)

    walk(promql_parser.parse(query))
    assert found
    return found
