"""k8s/loadtest: valid objects whose commands, names and policies fit each other, the gateway's and the image.

checkov's policies: test_manifests.py.
"""

from __future__ import annotations

from typing import Any

import click
import kubernetes_validate
import pytest

from helpers.dockerfile import stages
from helpers.manifests import K8S, Object, of_kind, overlay, rendered, selects
from loadtests.cli import main

NAMESPACE = "tidewright-loadtest"


@pytest.fixture(scope="module")
def objects() -> list[Object]:
    return rendered(K8S / "loadtest")


def named(objects: list[Object], kind: str, name: str) -> Any:
    (found,) = [one for one in of_kind(objects, kind) if one["metadata"]["name"] == name]
    return found


def parsed(container: Object) -> dict[str, Any]:
    name, *words = container["args"]
    command = main.get_command(click.Context(main), name)
    assert command
    return command.make_context(name, words).params


@pytest.mark.parametrize("version", ["1.30", "1.37"])
def test_all_is_valid_and_in_its_namespace(objects: list[Object], version: str) -> None:
    for one in objects:
        kubernetes_validate.validate(one, version, strict=True)
        assert one["kind"] == "Namespace" or one["metadata"]["namespace"] == NAMESPACE


def test_master_and_workers_fit_each_other(objects: list[Object]) -> None:
    master, workers = (named(objects, "Job", f"loadtest-{part}")["spec"] for part in ("master", "workers"))
    leader, (follower,) = master["template"]["spec"]["containers"][0], workers["template"]["spec"]["containers"]
    options = parsed(leader)
    assert options["expect_workers"] == workers["parallelism"] == workers["completions"]
    service = named(objects, "Service", parsed(follower)["master_host"])
    assert selects({"matchLabels": service["spec"]["selector"]}, master["template"]["metadata"]["labels"])
    (port,) = service["spec"]["ports"]
    assert port["port"] == leader["ports"][0]["containerPort"] == 5557
    assert options["output"] in [mount["mountPath"] for mount in leader["volumeMounts"]]
    keeper = master["template"]["spec"]["containers"][1]
    assert float(keeper["args"][-1]) >= 60 * options["minutes"] + 3600


def test_the_url_is_the_gateways_and_policies_let_them_through(objects: list[Object]) -> None:
    production = overlay("production")
    (gateway,) = [one for one in of_kind(production, "Service") if one["metadata"]["name"] == "tidewright-gateway"]
    leader = named(objects, "Job", "loadtest-master")["spec"]["template"]["spec"]["containers"][0]
    port = gateway["spec"]["ports"][0]["port"]
    assert parsed(leader)["url"] == f"http://tidewright-gateway.{gateway['metadata']['namespace']}:{port}"
    labels = named(objects, "Namespace", NAMESPACE)["metadata"]["labels"]
    (theirs,) = [one for one in of_kind(production, "NetworkPolicy") if one["metadata"]["name"] == "tidewright-gateway"]
    assert any(
        selects(peer["namespaceSelector"], labels) and "podSelector" not in peer
        for rule in theirs["spec"]["ingress"]
        for peer in rule["from"]
    )
    (ours,) = of_kind(objects, "NetworkPolicy")
    pods = named(list(production), "Deployment", "tidewright-gateway")["spec"]["template"]["metadata"]["labels"]
    assert any(selects(peer["podSelector"], pods) for rule in ours["spec"]["egress"] for peer in rule["to"])


def test_the_image_is_a_target_that_runs_the_command(objects: list[Object]) -> None:
    stage = stages()["loadtest"]
    assert stage.entrypoint == ["tini", "--", "python", "-m", "loadtests"]
    assert stage.last("USER") == "10001:10001"
    for job in of_kind(objects, "Job"):
        assert {one["image"] for one in job["spec"]["template"]["spec"]["containers"]} == {"tidewright:loadtest"}
