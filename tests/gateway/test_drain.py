"""Draining a replica through the gateway, and what readiness tells of replicas that take nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from helpers.api_keys import add
from helpers.echo_replica import EchoReplica
from helpers.gateway import MODEL, RunningGateway
from tidewright.bench.machine import free_ports
from tidewright_gateway.auth.callers import Role
from tidewright_gateway.auth.stores import FileStore

PROMPT = {"prompt": "Hi", "max_tokens": 3}


def until(reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def replicas() -> Iterator[tuple[EchoReplica, EchoReplica]]:
    with EchoReplica() as first, EchoReplica() as second:
        yield first, second


def drain(gateway: RunningGateway, body: object, **headers: str) -> httpx.Response:
    return gateway.http.post("/admin/drain", json=body, headers=headers)


def test_a_drained_replica_gets_nothing_new_and_finishes_what_it_has(
    model_dir: Path, replicas: tuple[EchoReplica, EchoReplica]
) -> None:
    first, second = replicas
    with RunningGateway(model_dir, first, second, generation_probe_interval=0, routing="round_robin") as gateway:
        assert gateway.http.get("/health/ready").json() == {"status": "ready"}
        first.pause = second.pause = 0.05
        body = {"model": MODEL, "prompt": "Once", "max_tokens": 20, "stream": True}
        with httpx.stream("POST", f"{gateway.url}/v1/completions", json=body, timeout=60, trust_env=False) as running:
            lines = running.iter_lines()
            next(lines)
            one = first if first.requests else second
            answer = drain(gateway, {"replica": one.grpc_url})
            assert (answer.status_code, answer.json()) == (200, {"draining": one.grpc_url})
            assert gateway.http.get("/health/ready").json() == {"status": "ready", "replicas_in_trouble": 1}
            told = {replica["address"]: replica for replica in gateway.http.get("/admin/status").json()["replicas"]}
            assert (told[one.grpc_url]["draining"], told[one.grpc_url]["in_flight"]) == (True, 1)
            assert "".join(lines).count(" word") == 19
        for _ in range(4):
            assert gateway.post("/v1/completions", PROMPT).status_code == 200
        assert len(one.requests) == 1


def test_a_replica_that_is_alone_need_not_be_named_and_leaves_nobody_ready(model_dir: Path) -> None:
    with EchoReplica() as replica, RunningGateway(model_dir, replica) as gateway:
        assert drain(gateway, {}).json() == {"draining": replica.grpc_url}
        assert gateway.http.get("/health/ready").status_code == 503


def test_what_can_not_be_drained_is_an_error_that_says_what_can(
    model_dir: Path, replicas: tuple[EchoReplica, EchoReplica]
) -> None:
    first, second = replicas
    nobody = f"127.0.0.1:{free_ports(1)[0]}"
    addresses = f"{first.grpc_url},{second.grpc_url},{nobody}"
    with RunningGateway(model_dir, replicas=addresses, generation_probe_interval=0) as gateway:
        for body, status, code in (
            ({}, 400, "invalid_value"),
            ({"replica": "10.0.0.1:1"}, 404, "no_such_replica"),
            ({"replica": nobody}, 503, "not_drained"),
            ({"replica": 7}, 400, "invalid_value"),
            ({"replicas": nobody}, 400, "invalid_value"),
            ([], 400, "invalid_value"),
        ):
            answer = drain(gateway, body)
            error = answer.json()["error"]
            assert (answer.status_code, error["code"]) == (status, code), body
            if body in ({}, {"replica": "10.0.0.1:1"}):
                assert first.grpc_url in error["message"]
        assert "replica: " in drain(gateway, {"replica": 7}).json()["error"]["message"]
        # A page of another site can send no JSON unasked.
        text = gateway.http.post("/admin/drain", content=b"{}", headers={"Content-Type": "text/plain"})
        assert text.status_code == 415
        assert not any(replica.status.draining for replica in replicas)


def test_it_is_for_admins(model_dir: Path, tmp_path: Path) -> None:
    store = FileStore(tmp_path / "keys.yaml")
    user, admin = add(store, "alice"), add(store, "ops", role=Role.ADMIN)
    with EchoReplica() as replica, RunningGateway(model_dir, replica, keys=tmp_path / "keys.yaml") as gateway:
        assert drain(gateway, {}).status_code == 401
        refused = drain(gateway, {}, Authorization=f"Bearer {user}")
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "admin_required")
        assert not replica.status.draining
        assert drain(gateway, {}, Authorization=f"Bearer {admin}").status_code == 200
        assert replica.status.draining
        until(lambda: gateway.http.get("/health/ready").status_code == 503)
