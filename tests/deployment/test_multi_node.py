"""One model over two pods, as the overlay multi-node-cpu has them: two ranks that know one secret, and a gateway."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from deployment.load import Load
from deployment.stack import GATEWAYS, GROUPS, Stack, group_manifests, secret
from deployment.test_rollout import PATIENCE, kill, while_loaded
from helpers.hosts import or_skip
from helpers.oracle import Oracle

pytestmark = pytest.mark.timeout(1800)
PROMPTS = ("The sea is", "Once upon a time", "The oldest tree", "A letter to my friend")
LENGTH = 32


@pytest.fixture(scope="module")
def stack(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with or_skip(), Stack() as running:
        rendezvous = secret("tidewright-rendezvous", secret=secrets.token_hex(32))
        objects = group_manifests(tmp_path_factory.mktemp("overlay") / "group", "multi-node-cpu")
        running.apply([*objects, running.secret, rendezvous])
        running.wait_until(lambda: running.is_rolled_out(*GROUPS) and running.is_rolled_out(*GATEWAYS), PATIENCE)
        yield running


@pytest.fixture(scope="module")
def texts(oracle: Oracle) -> dict[str, str]:
    found = {}
    for prompt in PROMPTS:
        ids = oracle.ids(prompt)
        found[prompt] = oracle.tokenizer.decode(oracle.greedy(ids, LENGTH))
    return found


def load(stack: Stack) -> Load:
    return Load(stack, stack.key, PROMPTS, LENGTH)


def test_two_pods_compute_what_one_would(stack: Stack, texts: dict[str, str]) -> None:
    assert [pod.name for pod in stack.pods(*GROUPS)] == ["tidewright-replica-0", "tidewright-replica-0-1"]
    for stream in load(stack).once():
        assert (stream.error, stream.text) == ("", texts[stream.prompt])


@pytest.mark.parametrize(
    ("pod", "what"), [("tidewright-replica-0-1", ""), ("tidewright-replica-0", "tidewright.engine")]
)
def test_a_rank_dies_under_load(stack: Stack, texts: dict[str, str], pod: str, what: str) -> None:
    """The other pod waits for the next group of ranks, and the streams go on."""
    restarts = {one.name: one.restarts for one in stack.pods(*GROUPS)}
    streams = load(stack)
    while_loaded(stack, texts, lambda: kill(stack.pod(pod), what), lambda: stack.is_rolled_out(*GROUPS), streams)
    after = {one.name: one.restarts for one in stack.pods(*GROUPS)}
    assert after == {**restarts, pod: restarts[pod] + (not what)}


def test_another_secret_counts_from_the_next_group_on(stack: Stack, texts: dict[str, str]) -> None:
    """Neither pod is restarted for it; ranks that are there compute on."""
    worker, leader = stack.pod("tidewright-replica-0-1"), stack.pod("tidewright-replica-0")
    restarts = [leader.restarts, worker.restarts]
    stack.apply([secret("tidewright-rendezvous", secret=secrets.token_hex(32))])

    def act() -> None:
        kill(worker, "tidewright.engine.rank")

    while_loaded(stack, texts, act, lambda: leader.container().log.count("engine_restarted"), load(stack))
    assert [leader.restarts, worker.restarts] == restarts
