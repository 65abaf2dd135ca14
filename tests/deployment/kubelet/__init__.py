"""Runs rendered Kubernetes manifests as processes of this machine, for tests. This is no kubelet.

It does what our manifests use: pods with a network and file system of their own, DNS, probes, endpoints, restarts,
termination, and the controllers Deployment, StatefulSet and LeaderWorkerSet. It has one node and one namespace, no API
server, no scheduler and no images: a container's files are this machine's, read-only, and an image is a name for one of
the commands in `image.py`. Resources, quotas, NetworkPolicies, PodDisruptionBudgets and autoscalers are ignored.

| file | what it is |
|---|---|
| `cluster.py` | the objects, the loop that reconciles them, endpoints, events |
| `controllers.py` | which pods there should be |
| `pod.py`, `container.py` | from the first container to the last: order, restarts, termination |
| `probes.py` | startup, readiness, liveness |
| `sandbox.py`, `image.py`, `volumes.py` | the file system, user and namespaces of a container |
| `network.py`, `dns.py` | a bridge, a network namespace for each pod, names |
| `environment.py`, `manifests.py` | variables; kustomize's output |
"""
