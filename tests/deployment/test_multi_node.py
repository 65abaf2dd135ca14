"""One model over two pods, as the overlay multi-node-cpu has them: two ranks that know one secret, and a gateway."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from deployment.kubelet.manifests import Manifest
from deployment.load import Load
from deployment.stack import GATEWAYS, GROUPS, Stack, group_manifests, secret
from deployment.test_rollout import PATIENCE, kill, while_loaded
from helpers.hosts import or_skip
from helpers.oracle import Oracle

pytestmark = pytest.mark.timeout(1800)
PROMPTS = ("The sea is", "Once upon a time", "The oldest tree", "A letter to my friend")
LENGTH = 32
LEADER, WORKER = "tidewright-replica-0", "tidewright-replica-0-1"
RIGHT, WRONG, ANOTHER = (secrets.token_hex(32) for _ in range(3))
WORKERS_SECRET = "of-the-worker"


@pytest.fixture(scope="module")
def stack(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """The worker's Secret has a name of its own, and at first another content than the leader's."""
    with or_skip(), Stack() as running:
        objects = group_manifests(tmp_path_factory.mktemp("overlay") / "group", "multi-node-cpu")
        (group,) = [one for one in objects if one["kind"] == GROUPS[0]]
        spec = group["spec"]["leaderWorkerTemplate"]["workerTemplate"]["spec"]
        (volume,) = [one for one in spec["volumes"] if "secret" in one]
        volume["secret"] = {**volume["secret"], "secretName": WORKERS_SECRET}
        running.apply([*objects, running.secret, rendezvous(RIGHT), rendezvous(WRONG, WORKERS_SECRET)])
        yield running


@pytest.fixture
def up(stack: Stack) -> Stack:
    stack.apply([rendezvous(RIGHT, WORKERS_SECRET)])
    stack.wait_until(lambda: stack.is_rolled_out(*GROUPS) and stack.is_rolled_out(*GATEWAYS), PATIENCE)
    return stack


def rendezvous(content: str, name: str = "tidewright-rendezvous") -> Manifest:
    return secret(name, secret=content)


@pytest.fixture(scope="module")
def texts(oracle: Oracle) -> dict[str, str]:
    found = {}
    for prompt in PROMPTS:
        ids = oracle.ids(prompt)
        found[prompt] = oracle.tokenizer.decode(oracle.greedy(ids, LENGTH))
    return found


def load(stack: Stack) -> Load:
    return Load(stack, stack.key, PROMPTS, LENGTH)


def test_a_worker_with_another_secret_says_so_and_the_leader_waits(stack: Stack) -> None:
    """The next test's fixture gives it the right one, and the two come up."""
    stack.wait_until(lambda: len(stack.pods(*GROUPS)) == 2 and stack.pod(WORKER).restarts, PATIENCE)
    stack.wait_until(lambda: "its rendezvous secret is not rank 0's" in stack.pod(WORKER).container().log, PATIENCE)
    leader = stack.pod(LEADER)
    assert (leader.ready, leader.restarts) == (False, 0)


def test_two_pods_compute_what_one_would(up: Stack, oracle: Oracle) -> None:
    stack = up
    assert [pod.name for pod in stack.pods(*GROUPS)] == [LEADER, WORKER]
    for stream in load(stack).once():
        ids = oracle.ids(stream.prompt)
        tokens = oracle.greedy(ids, LENGTH, guess=oracle.ids(stream.prompt + stream.text)[len(ids) :])
        assert (stream.error, stream.text) == ("", oracle.tokenizer.decode(tokens))


@pytest.mark.parametrize(("pod", "what"), [(WORKER, ""), (LEADER, "tidewright.engine")])
def test_a_rank_dies_under_load(up: Stack, texts: dict[str, str], pod: str, what: str) -> None:
    """The other pod waits for the next group of ranks, and the streams go on."""
    stack = up
    restarts = {one.name: one.restarts for one in stack.pods(*GROUPS)}
    streams = load(stack)
    while_loaded(stack, texts, lambda: kill(stack.pod(pod), what), lambda: stack.is_rolled_out(*GROUPS), streams)
    after = {one.name: one.restarts for one in stack.pods(*GROUPS)}
    assert after == {**restarts, pod: restarts[pod] + (not what)}


def test_another_secret_counts_from_the_next_group_on(up: Stack, texts: dict[str, str]) -> None:
    """Neither pod is restarted for it; ranks that are there compute on."""
    stack = up
    worker, leader = stack.pod(WORKER), stack.pod(LEADER)
    restarts = [leader.restarts, worker.restarts]
    stack.apply([rendezvous(ANOTHER), rendezvous(ANOTHER, WORKERS_SECRET)])

    def act() -> None:
        kill(worker, "tidewright.distributed.rank")

    while_loaded(stack, texts, act, lambda: leader.container().log.count("engine_restarted"), load(stack))
    assert [leader.restarts, worker.restarts] == restarts
