"""The small kubelet itself, with shells as containers: what tests of the real thing rely on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from deployment.kubelet.cluster import Cluster
from deployment.kubelet.environment import expand
from deployment.kubelet.manifests import Manifest
from helpers.hosts import or_skip

_OBEDIENT = "trap 'echo TERM; exit 0' TERM; while :; do sleep 0.05; done"
_FILE = {"exec": {"command": ["test", "-e", "/tmp/ready"]}, "periodSeconds": 0.1, "failureThreshold": 1}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with or_skip(), Cluster(pace=0.02) as running:
        yield running


def _workload(kind: str, name: str, script: str, replicas: int = 1, pod: Any = (), **container: Any) -> list[Manifest]:
    one = {"name": "main", "image": "redis:7", "command": ["sh", "-c", script], **container}
    spec = {"containers": [one], "securityContext": {"runAsUser": 10001}, **dict(pod)}
    metadata = {"name": name, "namespace": "here"}
    template = {"metadata": {"labels": {"app": name}}, "spec": spec}
    service = {"kind": "Service", "metadata": metadata, "spec": {"selector": {"app": name}, "clusterIP": "None"}}
    workload = {"serviceName": name, "replicas": replicas, "template": template}
    return [service, {"kind": kind, "metadata": metadata, "spec": workload}]


def test_variables_volumes_and_user_are_the_pods(cluster: Cluster) -> None:
    cluster.apply(
        [
            {"kind": "ConfigMap", "metadata": {"name": "config"}, "data": {"file": "first", "WHO": "you"}},
            {"kind": "Secret", "metadata": {"name": "secret"}, "data": {"word": "aHVzaA=="}},
            *_workload(
                "StatefulSet",
                "full",
                _OBEDIENT,
                pod={
                    "volumes": [
                        {"name": "config", "configMap": {"name": "config"}},
                        {"name": "small", "emptyDir": {"medium": "Memory", "sizeLimit": "1Mi"}},
                    ]
                },
                env=[
                    {"name": "IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
                    {"name": "LABEL", "valueFrom": {"fieldRef": {"fieldPath": "metadata.labels['app']"}}},
                    {"name": "WORD", "valueFrom": {"secretKeyRef": {"name": "secret", "key": "word"}}},
                    {"name": "HAIL", "value": "hello $(WORD), $(NOBODY), $$(WORD)"},
                ],
                envFrom=[{"configMapRef": {"name": "config"}}],
                volumeMounts=[{"name": "config", "mountPath": "/etc/it"}, {"name": "small", "mountPath": "/dev/shm"}],
                securityContext={"readOnlyRootFilesystem": True, "allowPrivilegeEscalation": False},
            ),
        ]
    )
    cluster.wait_until(lambda: cluster.is_rolled_out("StatefulSet", "full"))
    pod = cluster.pod("full-0")
    running = pod.container().running
    assert running is not None

    def said(script: str) -> str:
        return running.execute(["sh", "-c", script], 10).stdout.strip()

    assert said("echo $IP $LABEL $WORD $WHO") == f"{pod.host.address} full hush you"
    assert said("echo $HAIL") == "hello hush, $(NOBODY), $(WORD)"
    assert said("id -u; hostname; ls /proc | grep -x 1; cat /etc/it/file") == "10001\nfull-0\n1\nfirst"
    assert "Read-only" in said("echo 2>&1 > /x")
    assert "Read-only" in said("echo 2>&1 > /etc/it/x") or "denied" in said("echo 2>&1 > /etc/it/x")
    assert "No space" in said("head -c 2m /dev/zero 2>&1 > /dev/shm/x")
    assert said("grep CapEff /proc/self/status").endswith("0000000000000000")
    assert said("getent hosts full-0.full").split()[0] == pod.host.address
    cluster.change("ConfigMap", "config", lambda config: config["data"].update(file="second"))
    assert said("cat /etc/it/file; echo $WHO") == "secondyou"


def test_what_is_missing_is_waited_for_with_an_event(cluster: Cluster) -> None:
    volume = {"volumes": [{"name": "keys", "secret": {"secretName": "late"}}]}
    cluster.apply(_workload("Deployment", "waiting", _OBEDIENT, pod=volume))
    cluster.wait_until(lambda: cluster.said("waiting", "FailedMount"))
    assert 'secret "late" not found' in cluster.said("waiting", "FailedMount")[0]
    cluster.apply([{"kind": "Secret", "metadata": {"name": "late"}}])
    cluster.wait_until(lambda: cluster.is_rolled_out("Deployment", "waiting"))


def test_readiness_decides_on_endpoints_and_liveness_restarts(cluster: Cluster) -> None:
    probes = {
        "readinessProbe": _FILE,
        "livenessProbe": {"exec": {"command": ["test", "!", "-e", "/tmp/dead"]}, "periodSeconds": 0.1},
    }
    mounts = {"volumes": [{"name": "tmp", "emptyDir": {}}]}
    mounted = [{"name": "tmp", "mountPath": "/tmp"}]
    script = f"rm -f /tmp/dead; {_OBEDIENT}"
    cluster.apply(_workload("StatefulSet", "probed", script, pod=mounts, volumeMounts=mounted, **probes))
    cluster.wait_until(lambda: cluster.said("probed-0", "Unhealthy"))
    assert cluster.endpoints("probed") == []
    pod = cluster.pod("probed-0")
    pod.container().running.execute(["touch", "/tmp/ready"], 5)  # type: ignore[union-attr]
    cluster.wait_until(lambda: cluster.endpoints("probed") == [pod.host.address])
    pod.container().running.execute(["touch", "/tmp/dead"], 5)  # type: ignore[union-attr]
    cluster.wait_until(lambda: pod.restarts == 1 and pod.ready)
    assert "TERM" in pod.log


def test_the_end_of_a_pod(cluster: Cluster) -> None:
    """Out of the endpoints at once, preStop while it runs, SIGTERM, SIGKILL after the grace period."""
    hook = {"lifecycle": {"preStop": {"exec": {"command": ["sh", "-c", "echo HOOK > /tmp/hook; sleep 0.3"]}}}}
    deaf = "trap 'cat /tmp/hook' TERM; while :; do sleep 0.05; done"
    grace = {"terminationGracePeriodSeconds": 1, "volumes": [{"name": "tmp", "emptyDir": {}}]}
    mounted = [{"name": "tmp", "mountPath": "/tmp"}]
    cluster.apply(_workload("StatefulSet", "ending", deaf, pod=grace, volumeMounts=mounted, **hook))
    cluster.wait_until(lambda: cluster.is_rolled_out("StatefulSet", "ending"))
    pod = cluster.pod("ending-0")
    cluster.delete("StatefulSet", "ending")
    cluster.wait_until(lambda: not cluster.endpoints("ending"))
    pod.join()
    assert pod.container().log.split()[0] == "HOOK"
    assert cluster.said("ending-0", "Killing")


@pytest.mark.parametrize("kind", ["Deployment", "StatefulSet"])
def test_an_update_goes_on_only_while_new_pods_become_ready(cluster: Cluster, kind: str) -> None:
    """A broken one stops it; the way back mends it."""
    name = f"rolling-{kind.lower()}"
    objects = _workload(kind, name, _OBEDIENT, replicas=3)
    objects[1]["spec"] |= {
        "podManagementPolicy": "Parallel",
        "minReadySeconds": 0.3,
    }  # longer than the broken one lives
    cluster.apply(objects)
    cluster.wait_until(lambda: cluster.is_rolled_out(kind, name))
    before = {pod.host.address for pod in cluster.pods(kind, name)}

    def breaks(manifest: Manifest) -> None:
        manifest["spec"]["template"]["spec"]["containers"][0]["command"] = ["false"]

    cluster.change(kind, name, breaks)
    cluster.wait_until(lambda: cluster.said(name, "BackOff"))
    left = before & set(cluster.endpoints(name))
    assert len(left) == (3 if kind == "Deployment" else 2)
    cluster.apply(objects)
    cluster.wait_until(lambda: cluster.is_rolled_out(kind, name))
    assert left <= {pod.host.address for pod in cluster.pods(kind, name)}


def test_a_restart_makes_new_pods_each_time_and_outlives_what_is_applied(cluster: Cluster) -> None:
    objects = _workload("StatefulSet", "again", _OBEDIENT)
    cluster.apply(objects)
    seen = set()
    for _ in range(3):
        cluster.wait_until(lambda: cluster.is_rolled_out("StatefulSet", "again"))
        seen.add(cluster.pod("again-0").host.address)
        cluster.restart("StatefulSet", "again")
    cluster.wait_until(lambda: cluster.is_rolled_out("StatefulSet", "again"))
    revision = cluster.pod("again-0").revision
    cluster.apply(objects)
    assert cluster.is_rolled_out("StatefulSet", "again")
    assert cluster.pod("again-0").revision == revision
    assert len(seen) == 3


def test_expand() -> None:
    assert expand("$(A)$$(A)$(B)$", {"A": "x"}) == "x$(A)$(B)$"
