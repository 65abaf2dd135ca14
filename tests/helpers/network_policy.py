"""Whether NetworkPolicies let one pod reach another, by the rules in Kubernetes' documentation."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass, field

from helpers.manifests import Object, selects

OURS = "tidewright"


@dataclass(frozen=True)
class Place:
    """A pod, or with `address` something outside the cluster."""

    labels: dict[str, str] = field(default_factory=dict)
    namespace: str = OURS
    namespace_labels: dict[str, str] = field(default_factory=dict)
    address: str = ""

    @property
    def all_namespace_labels(self) -> dict[str, str]:
        return {"kubernetes.io/metadata.name": self.namespace, **self.namespace_labels}


def allows(policies: Sequence[Object], source: Place, target: Place, port: int, protocol: str = "TCP") -> bool:
    """Both ends must let the connection through."""
    leaves = source.address != "" or _passes(policies, "Egress", source, target, port, protocol)
    return leaves and (target.address != "" or _passes(policies, "Ingress", target, source, port, protocol))


def _passes(policies: Sequence[Object], way: str, pod: Place, other: Place, port: int, protocol: str) -> bool:
    """Policies that select a pod for a way isolate it, and then any of them may let a connection through."""
    about = [
        policy["spec"]
        for policy in policies
        if policy["metadata"]["namespace"] == pod.namespace
        and way in policy["spec"]["policyTypes"]
        and selects(policy["spec"]["podSelector"], pod.labels)
    ]
    rules = [rule for spec in about for rule in spec.get(way.lower(), ())]
    peers = "from" if way == "Ingress" else "to"
    return not about or any(
        _has_port(rule, port, protocol) and _has_peer(rule.get(peers, ()), other, pod.namespace) for rule in rules
    )


def _has_port(rule: Object, port: int, protocol: str) -> bool:
    ports = rule.get("ports")
    return not ports or any(one["port"] == port and one.get("protocol", "TCP") == protocol for one in ports)


def _has_peer(peers: Sequence[Object], other: Place, namespace: str) -> bool:
    """`namespace`: of the policy, which a peer without a namespaceSelector means."""
    return not peers or any(_is_peer(peer, other, namespace) for peer in peers)


def _is_peer(peer: Object, other: Place, namespace: str) -> bool:
    if "ipBlock" in peer:
        if not other.address:
            return False  # pods' addresses are in the excepted networks
        address, block = ipaddress.ip_address(other.address), peer["ipBlock"]
        return address in ipaddress.ip_network(block["cidr"]) and not any(
            address in ipaddress.ip_network(one) for one in block.get("except", ())
        )
    if other.address:
        return False
    if "namespaceSelector" in peer:
        in_namespace = selects(peer["namespaceSelector"], other.all_namespace_labels)
    else:
        in_namespace = other.namespace == namespace
    return in_namespace and selects(peer.get("podSelector", {}), other.labels)
