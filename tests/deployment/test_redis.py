"""`production`, on the CPU: with Redis, responses are shared by gateways, and survive Redis' own end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from deployment.kubelet.manifests import patch
from deployment.load import PORT, Load
from deployment.stack import GATEWAYS, REPLICAS, Stack, manifests, secret, variable
from deployment.test_rollout import PATIENCE, kill
from helpers.hosts import or_skip

pytestmark = [pytest.mark.timeout(1800), pytest.mark.redis]
REDIS = ("StatefulSet", "tidewright-redis")
PROMPTS = ("The sea is", "Once upon a time")
MODEL = "smollm2-135m"
ON_THE_CPU = [
    patch(*REPLICAS, variable("TIDEWRIGHT_DEVICE", "cpu"), variable("TIDEWRIGHT_KV_CACHE_MEMORY", "256MiB")),
    patch(*GATEWAYS, variable("TIDEWRIGHT_GATEWAY_SERVED_MODEL_NAME", MODEL)),
    patch("ConfigMap", "tidewright-model", {"op": "replace", "path": "/data/model", "value": MODEL}),
]
"""With another device and model than those of the overlay; all else is as it stands there."""


@pytest.fixture(scope="module")
def stack(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with or_skip(), Stack() as running:
        objects = manifests(tmp_path_factory.mktemp("overlay") / "production", "production", 1, 2, *ON_THE_CPU)
        running.apply([*objects, running.secret, secret("tidewright-redis", password="hush")])
        running.wait_until(lambda: running.is_up() and running.is_rolled_out(*REDIS), PATIENCE)
        yield running


def test_a_response_outlives_redis_and_requests_do_without_it(stack: Stack) -> None:
    first, second = [
        httpx.Client(
            base_url=f"http://{pod.host.address}:{PORT}", headers={"Authorization": f"Bearer {stack.key}"}, timeout=120
        )
        for pod in stack.pods(*GATEWAYS)
    ]
    body = {"model": MODEL, "input": "Name three fruits.", "max_output_tokens": 8, "temperature": 0}
    with stack.network.node.inside(), first, second:
        made = first.post("/v1/responses", json=body).json()
        assert second.get(f"/v1/responses/{made['id']}").json()["output"] == made["output"]
        (pod,) = stack.pods(*REDIS)
        with Load(stack, stack.key, PROMPTS, 16) as load:
            stack.wait_until(lambda: load.done, PATIENCE)
            for restarts in (1, 2):  # the second time after a while, as Kubernetes backs off
                kill(pod)
                stack.wait_until(lambda restarts=restarts: pod.restarts == restarts and pod.ready, PATIENCE)
            enough = len(load.done) + len(PROMPTS)
            stack.wait_until(lambda: len(load.done) >= enough, PATIENCE)
        assert load.failed == []
        path = f"/v1/responses/{made['id']}"
        stack.wait_until(lambda: second.get(path).status_code == 200, PATIENCE)  # appendonly.aof is on a volume
        assert second.get(path).json()["output"] == made["output"]
