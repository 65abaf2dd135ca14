"""The component network-policies: connections that the parts need are let through, and no others."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.manifests import Object, Pod, of_kind, overlay, pods, with_components
from helpers.network_policy import Place, allows


def ours(component: str, **more: str) -> Place:
    return Place({"app.kubernetes.io/name": "tidewright", "app.kubernetes.io/component": component, **more})


GATEWAY, REPLICA, REDIS = ours("gateway"), ours("replica"), ours("redis")
LEADER, WORKER = ours("replica", **{"tidewright-ranks": "true"}), ours("worker", **{"tidewright-ranks": "true"})
STRANGER_HERE = Place({"app": "debug"})
STRANGER = Place({"app": "other"}, "other")
# It has our labels, and is not ours.
PRETENDER = Place(GATEWAY.labels, "other")
CLIENT = Place({"app": "chat"}, "apps", {"tidewright-access": "clients"})
PROMETHEUS = Place({"app.kubernetes.io/name": "prometheus"}, "monitoring")
GRAFANA = Place({"app.kubernetes.io/name": "grafana"}, "monitoring")
COLLECTOR = Place({"app": "collector"}, "tracing", {"tidewright-access": "traces"})
DNS = Place({"k8s-app": "kube-dns"}, "kube-system")
INTERNET, METADATA, INSIDE = (Place(address=one) for one in ("151.101.0.223", "169.254.169.254", "10.1.2.3"))
INTERNET_6, METADATA_6 = Place(address="2a04:4e42::223"), Place(address="fd00:ec2::254")
INSIDE_6 = Place(address="64:ff9b::a01:203")

TABLE = [
    # from, to, port, protocol, allowed
    *[(one, DNS, 53, protocol, True) for one in (GATEWAY, REPLICA, REDIS, WORKER) for protocol in ("UDP", "TCP")],
    (STRANGER_HERE, DNS, 53, "UDP", False),
    (GATEWAY, DNS, 443, "TCP", False),
    (GATEWAY, STRANGER, 53, "UDP", False),
    # The API.
    (CLIENT, GATEWAY, 8080, "TCP", True),
    (CLIENT, GATEWAY, 9000, "TCP", False),
    (STRANGER, GATEWAY, 8080, "TCP", False),
    (STRANGER_HERE, GATEWAY, 8080, "TCP", False),
    (REPLICA, GATEWAY, 8080, "TCP", False),
    # Triton.
    (GATEWAY, REPLICA, 8001, "TCP", True),
    (GATEWAY, LEADER, 8001, "TCP", True),
    (GATEWAY, REPLICA, 8000, "TCP", False),
    (CLIENT, REPLICA, 8001, "TCP", False),
    (GATEWAY, STRANGER, 8001, "TCP", False),
    (CLIENT, REPLICA, 8000, "TCP", False),
    (PRETENDER, REPLICA, 8001, "TCP", False),
    (REPLICA, REPLICA, 8001, "TCP", False),
    (REDIS, REPLICA, 8001, "TCP", False),
    # Metrics.
    (PROMETHEUS, REPLICA, 8002, "TCP", True),
    (PROMETHEUS, LEADER, 8002, "TCP", True),
    (PROMETHEUS, GATEWAY, 8080, "TCP", True),
    (PROMETHEUS, GATEWAY, 9000, "TCP", False),
    (PROMETHEUS, REPLICA, 8001, "TCP", False),
    (GRAFANA, REPLICA, 8002, "TCP", False),
    (CLIENT, REPLICA, 8002, "TCP", False),
    # Redis.
    (GATEWAY, REDIS, 6379, "TCP", True),
    (REPLICA, REDIS, 6379, "TCP", False),
    (CLIENT, REDIS, 6379, "TCP", False),
    (GATEWAY, STRANGER, 6379, "TCP", False),
    (PRETENDER, REDIS, 6379, "TCP", False),
    # Ranks on several hosts, on any port.
    (WORKER, LEADER, 29400, "TCP", True),
    (LEADER, WORKER, 40123, "TCP", True),
    (WORKER, WORKER, 40123, "TCP", True),
    (REPLICA, WORKER, 40123, "TCP", False),
    (GATEWAY, WORKER, 29400, "TCP", False),
    (WORKER, STRANGER, 40123, "TCP", False),
    (CLIENT, LEADER, 29400, "TCP", False),
    # Spans.
    (GATEWAY, COLLECTOR, 4318, "TCP", True),
    (REPLICA, COLLECTOR, 4318, "TCP", True),
    (REPLICA, STRANGER, 4318, "TCP", False),
    (GATEWAY, COLLECTOR, 80, "TCP", False),
    # Models, and keys of an OpenID provider.
    (REPLICA, INTERNET, 443, "TCP", True),
    (GATEWAY, INTERNET, 443, "TCP", True),
    (WORKER, INTERNET, 443, "TCP", True),
    (REDIS, INTERNET, 443, "TCP", False),
    (REPLICA, INTERNET, 22, "TCP", False),
    (REPLICA, METADATA, 443, "TCP", False),
    (REPLICA, METADATA, 80, "TCP", False),
    (GATEWAY, INSIDE, 443, "TCP", False),
    (REPLICA, INTERNET_6, 443, "TCP", True),
    (REPLICA, METADATA_6, 443, "TCP", False),
    (REPLICA, INSIDE_6, 443, "TCP", False),
    (GATEWAY, STRANGER, 8080, "TCP", False),
]


@pytest.fixture(scope="module")
def policies() -> list[Object]:
    return of_kind(overlay("production"), "NetworkPolicy")


@pytest.mark.parametrize(("source", "target", "port", "protocol", "allowed"), TABLE)
def test_who_may_reach_whom(
    policies: list[Object], source: Place, target: Place, port: int, protocol: str, allowed: bool
) -> None:
    assert allows(policies, source, target, port, protocol) == allowed


def test_without_policies_everything_goes() -> None:
    """Else the table would say nothing."""
    assert all(allows([], source, target, port, protocol) for source, target, port, protocol, _ in TABLE)


def test_the_table_is_about_the_labels_and_ports_of_the_real_pods(tmp_path: Path) -> None:
    every = [*pods(overlay("production")), *pods(with_components(["multi-node", "redis"], tmp_path))]
    known = {one.component: one for one in every}
    assert known.keys() == {"gateway", "replica", "redis", "worker"}
    for place in (GATEWAY, REPLICA, REDIS, LEADER, WORKER):
        assert any(place.labels.items() <= pod.labels.items() for pod in every), place
    served = {(pod.component, port) for pod in every for port in _ports(pod)}
    reached = {
        (place.labels["app.kubernetes.io/component"], port) for _, place, port, _, ok in TABLE if ok and place in _OURS
    }
    assert served <= reached | {("replica", 8000)}  # Triton's HTTP is for `tidewright health` inside the pod


_OURS = (GATEWAY, REPLICA, REDIS, LEADER, WORKER)


def _ports(pod: Pod) -> Iterator[int]:
    for container in pod.containers:
        yield from (port["containerPort"] for port in container.get("ports", ()))
