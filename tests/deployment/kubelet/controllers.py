"""Which pods there should be: Deployment, StatefulSet, LeaderWorkerSet. Each call makes the steps that are due now."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import secrets
from collections.abc import Callable, Sequence

from deployment.kubelet.manifests import Manifest
from deployment.kubelet.pod import Pod

Create = Callable[[Manifest, str, str], None]
"""A pod, its owner, the revision of its template."""

_HASH, _ORDINAL = "pod-template-hash", "apps.kubernetes.io/pod-index"
_LWS = "leaderworkerset.sigs.k8s.io"


def revision_of(template: Manifest) -> str:
    return hashlib.sha256(json.dumps(template, sort_keys=True).encode()).hexdigest()[:10]


def deployment(manifest: Manifest, pods: Sequence[Pod], create: Create) -> None:
    """`pods`: its own, including those that are ending."""
    spec = manifest["spec"]
    wanted = spec.get("replicas", 1)
    update = spec.get("strategy", {}).get("rollingUpdate", {})
    surge = _part(update.get("maxSurge", "25%"), wanted, math.ceil)
    unavailable = _part(update.get("maxUnavailable", "25%"), wanted, math.floor)
    if not surge and not unavailable:
        unavailable = 1
    revision = revision_of(spec["template"])
    living = [pod for pod in pods if not pod.deleting.is_set()]
    new = [pod for pod in living if pod.revision == revision]
    old = [pod for pod in living if pod.revision != revision]
    delay = spec.get("minReadySeconds", 0)
    for _ in range(min(wanted - len(new), wanted + (surge if old else 0) - len(living))):
        name = f"{manifest['metadata']['name']}-{revision}-{secrets.token_hex(3)[:5]}"
        create(_pod(manifest, spec["template"], name, {_HASH: revision}), _owner(manifest), revision)
    for pod in _least_useful(new, delay)[: max(0, len(new) - wanted)]:
        pod.delete()
    spare = sum(pod.available(delay) for pod in living) - (wanted - unavailable)
    for pod in _least_useful(old, delay):
        if not pod.available(delay):
            pod.delete()
        elif spare > 0:
            pod.delete()
            spare -= 1


def stateful_set(manifest: Manifest, pods: Sequence[Pod], create: Create) -> None:
    """A pod is made again only when the one of its name is gone."""
    spec = manifest["spec"]
    name, wanted = manifest["metadata"]["name"], spec.get("replicas", 1)
    revision, delay = revision_of(spec["template"]), spec.get("minReadySeconds", 0)
    in_parallel = spec.get("podManagementPolicy") == "Parallel"
    found = {int(pod.name.rpartition("-")[2]): pod for pod in pods}
    for ordinal in range(wanted):
        pod = found.get(ordinal)
        if pod is None:
            create(_numbered(manifest, f"{name}-{ordinal}", ordinal), _owner(manifest), revision)
        if not in_parallel and (pod is None or not pod.available(delay)):
            return
    for ordinal in sorted(found, reverse=True):
        if ordinal >= wanted:
            found[ordinal].delete()
            if not in_parallel:
                return
    if spec.get("updateStrategy", {}).get("type", "RollingUpdate") != "RollingUpdate":
        return
    partition = spec.get("updateStrategy", {}).get("rollingUpdate", {}).get("partition", 0)
    for ordinal in range(wanted - 1, partition - 1, -1):
        pod = found.get(ordinal)
        if pod is not None and pod.revision != revision:
            return pod.delete()
        if pod is None or not pod.available(delay):
            return  # the next one waits for it


def leader_worker_set(manifest: Manifest, pods: Sequence[Pod], create: Create) -> None:
    """Groups of a leader and its workers. An update, and by the default policy a restart, makes a whole group again."""
    spec = manifest["spec"]
    name, template = manifest["metadata"]["name"], spec["leaderWorkerTemplate"]
    size, revision = template.get("size", 1), revision_of(template)
    stay_together = template.get("restartPolicy", "RecreateGroupOnPodRestart") == "RecreateGroupOnPodRestart"
    after_leader = spec.get("startupPolicy", "LeaderCreated") == "LeaderReady"
    for group in range(spec.get("replicas", 1)):
        leader = f"{name}-{group}"
        members = {pod.name: pod for pod in pods if pod.name == leader or pod.name.startswith(f"{leader}-")}
        broken = stay_together and any(pod.restarts or pod.deleting.is_set() for pod in members.values())
        if broken or any(pod.revision != revision for pod in members.values()):
            for pod in members.values():
                pod.delete()
            continue
        for index in range(size):
            member = f"{leader}-{index}" if index else leader
            if member in members or (index and after_leader and not members[leader].ready):
                continue
            part = template.get("leaderTemplate") if not index else None
            pod = _group_member(manifest, part or template["workerTemplate"], member, (group, index, size))
            create(pod, _owner(manifest), revision)
            if not index:
                break  # its workers in the next round
    for pod in pods:
        if int(pod.labels[f"{_LWS}/group-index"]) >= spec.get("replicas", 1):
            pod.delete()


def _group_member(manifest: Manifest, template: Manifest, name: str, place: tuple[int, int, int]) -> Manifest:
    group, index, size = place
    owner, namespace = manifest["metadata"]["name"], manifest["metadata"].get("namespace", "default")
    labels = {f"{_LWS}/name": owner, f"{_LWS}/group-index": str(group), f"{_LWS}/worker-index": str(index)}
    pod = _pod(manifest, template, name, labels)
    pod["metadata"].setdefault("annotations", {})[f"{_LWS}/size"] = str(size)
    pod["spec"] |= {"hostname": name, "subdomain": owner}
    variables = {
        "LWS_LEADER_ADDRESS": f"{owner}-{group}.{owner}.{namespace}",
        "LWS_GROUP_SIZE": str(size),
        "LWS_WORKER_INDEX": str(index),
    }
    for container in (*pod["spec"]["containers"], *pod["spec"].get("initContainers", ())):
        own = [{"name": key, "value": value} for key, value in variables.items()]
        container["env"] = [*own, *container.get("env", ())]
    return pod


def _numbered(manifest: Manifest, name: str, ordinal: int) -> Manifest:
    """A pod of a StatefulSet, with its claims."""
    labels = {"statefulset.kubernetes.io/pod-name": name, _ORDINAL: str(ordinal)}
    pod = _pod(manifest, manifest["spec"]["template"], name, labels)
    pod["spec"] |= {"hostname": name, "subdomain": manifest["spec"]["serviceName"]}
    claims = [one["metadata"]["name"] for one in manifest["spec"].get("volumeClaimTemplates", ())]
    volumes = [{"name": one, "persistentVolumeClaim": {"claimName": f"{one}-{name}"}} for one in claims]
    others = [one for one in pod["spec"].get("volumes", ()) if one["name"] not in claims]
    pod["spec"]["volumes"] = [*others, *volumes]
    return pod


def _pod(manifest: Manifest, template: Manifest, name: str, labels: dict[str, str]) -> Manifest:
    pod = copy.deepcopy(template)
    metadata = pod.setdefault("metadata", {})
    metadata |= {"name": name, "namespace": manifest["metadata"].get("namespace", "default")}
    metadata["labels"] = {**metadata.get("labels", {}), **labels}
    return pod


def _owner(manifest: Manifest) -> str:
    return f"{manifest['kind']}/{manifest['metadata']['name']}"


def _part(value: int | str, whole: int, rounding: Callable[[float], int]) -> int:
    return value if isinstance(value, int) else rounding(int(value.rstrip("%")) / 100 * whole)


def _least_useful(pods: Sequence[Pod], delay: float) -> list[Pod]:
    """What is deleted first: what is not ready, then what is youngest."""
    return sorted(pods, key=lambda pod: (pod.available(delay), -pod.created_at))


CONTROLLERS = {"Deployment": deployment, "StatefulSet": stateful_set, "LeaderWorkerSet": leader_worker_set}
