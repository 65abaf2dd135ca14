"""Three replicas and two gateways under load: updates, scaling, and what dies meanwhile. No request may fail, and no
text may differ by a byte from that of an undisturbed run.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from deployment.kubelet.manifests import Manifest, patch
from deployment.kubelet.pod import Pod
from deployment.load import PORT, PROMPTS, Load
from deployment.stack import GATEWAYS, REPLICAS, Stack, manifests, secret, variable
from helpers.hosts import or_skip
from helpers.needs import needs
from tidewright.launch.control import control

pytestmark = pytest.mark.timeout(1800)
PATIENCE = 600.0  # seconds; a machine that does much else as well
# Two for each replica. An engine that has a stream takes a whole core, which the pods that start need: so clients pause
# as long as they stream, and what is done to the pods is done while most of them stream.
CLIENTS, LENGTH, PAUSE = 6, 32, 3.0
Texts = dict[str, str]


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> list[Manifest]:
    return manifests(tmp_path_factory.mktemp("overlay") / "demo", "cpu-demo", 3, 2)


@pytest.fixture(scope="module")
def stack(objects: list[Manifest], model_dir: Path) -> Iterator[Stack]:
    """Without its Secret at first."""
    with or_skip(), Stack() as running:
        running.apply(objects)
        running.wait_until(lambda: running.said("tidewright-gateway", "FailedMount"))
        yield running


@pytest.fixture
def up(stack: Stack, objects: list[Manifest]) -> Stack:
    """As the manifests have it, whatever the test before left."""
    stack.apply([*objects, stack.secret])
    stack.wait_until(stack.is_up, PATIENCE)
    return stack


@pytest.fixture(scope="module")
def calm_texts() -> Texts:
    """Filled by the first test that has nothing to disturb it."""
    return {}


@pytest.fixture
def texts(up: Stack, calm_texts: Texts) -> Texts:
    if not calm_texts:
        found = clients(up).once()
        assert [stream.error for stream in found if stream.error] == []
        calm_texts.update({stream.prompt: stream.text for stream in found})
    return calm_texts


def clients(stack: Stack) -> Load:
    return Load(stack, stack.key, PROMPTS[:CLIENTS], LENGTH, PAUSE)


def check(load: Load, texts: Texts) -> None:
    """Nothing failed, each stream came to its end, and its text is right."""
    assert [(stream.prompt, stream.error) for stream in load.failed] == []
    assert {stream.finish for stream in load.done} == {"length"}
    assert [stream.text for stream in load.done if stream.text != texts[stream.prompt]] == []


def while_loaded(
    stack: Stack, texts: Texts, act: Callable[[], None], until: Callable[[], object], load: Load | None = None
) -> Load:
    """From the midst of streams, to some after."""
    load = load or clients(stack)
    with load:
        stack.wait_until(lambda: load.running > len(texts) / 2, PATIENCE)
        act()
        stack.wait_until(until, PATIENCE)
        enough = len(load.done) + len(texts)
        stack.wait_until(lambda: len(load.done) >= enough, PATIENCE)
    check(load, texts)
    return load


@needs("chaos")
def kill(pod: Pod, what: str = "") -> None:
    """SIGKILL: to its process 1 and so to all, or to the oldest whose command line has `what`."""
    running = pod.container().running
    assert running is not None
    found = [one for one in running.processes() if what in " ".join(one.cmdline())]
    min(found, key=lambda one: one.create_time()).send_signal(signal.SIGKILL)


def test_a_missing_secret_is_waited_for(stack: Stack) -> None:
    assert 'secret "tidewright-keys" not found' in stack.said("tidewright-gateway", "FailedMount")[0]
    assert stack.endpoints("tidewright-gateway") == []
    stack.apply([stack.secret])
    stack.wait_until(stack.is_up, PATIENCE)


def test_each_pod_is_restricted_and_answers(up: Stack, texts: Texts) -> None:
    assert all(texts.values())
    for pod in (*up.pods(*REPLICAS), *up.pods(*GATEWAYS)):
        running = pod.container().running
        assert running is not None
        assert running.execute(["sh", "-c", "id -u; touch /x /usr/x"], 30).stdout.startswith("10001\ntouch: cannot")
        assert pod.restarts == 0


def test_update_of_the_replicas(up: Stack, texts: Texts) -> None:
    before = {pod.host.address for pod in up.pods(*REPLICAS)}
    while_loaded(up, texts, lambda: up.restart(*REPLICAS), lambda: up.is_rolled_out(*REPLICAS))
    assert not before & {pod.host.address for pod in up.pods(*REPLICAS)}
    assert up.said("tidewright-replica", "Killing") == []  # each ended within its grace period


def test_update_of_the_gateways(up: Stack, texts: Texts) -> None:
    """A stream ends at its gateway, which ends only then; clients reconnect between two requests."""
    before = {pod.host.address for pod in up.pods(*GATEWAYS)}
    while_loaded(up, texts, lambda: up.restart(*GATEWAYS), lambda: up.is_rolled_out(*GATEWAYS))
    assert not before & {pod.host.address for pod in up.pods(*GATEWAYS)}
    assert up.said("tidewright-gateway", "Killing") == []


def test_scale_down_and_up(up: Stack, texts: Texts) -> None:
    while_loaded(up, texts, lambda: up.scale(*REPLICAS, 1), lambda: len(up.pods(*REPLICAS)) == 1)
    while_loaded(up, texts, lambda: up.scale(*REPLICAS, 3), lambda: up.is_rolled_out(*REPLICAS))


def test_a_pod_an_engine_and_a_stub_are_killed(up: Stack, texts: Texts) -> None:
    first, second, third = up.pods(*REPLICAS)
    before = [pod.restarts for pod in up.pods(*REPLICAS)]

    def act() -> None:
        kill(first)
        kill(second, "tidewright.engine")
        kill(third, "/tokenizer/")

    while_loaded(up, texts, act, lambda: first.restarts == before[0] + 1 and up.is_rolled_out(*REPLICAS))
    assert [second.restarts, third.restarts] == before[1:]


def test_a_stub_of_the_decoder_is_killed(up: Stack, texts: Texts) -> None:
    pod = up.pods(*REPLICAS)[0]
    restarts = pod.restarts
    with up.network.node.inside():
        url = f"http://{pod.host.address}:8000"
        while_loaded(up, texts, lambda: kill(pod, "/decoder/"), lambda: is_well(url))
    assert pod.restarts == restarts  # `serve` mends it


def is_well(url: str) -> bool:
    try:
        control(url, "health", 5)
    except Exception:
        return False
    return True


def test_a_node_is_gone(up: Stack, texts: Texts) -> None:
    """Nobody says goodbye, and its address stays in the Service's name for as long as Kubernetes hopes."""
    pod = up.pods(*REPLICAS)[1]
    try:
        while_loaded(up, texts, lambda: pod.host.plug(is_in=False), lambda: True)
    finally:
        pod.host.plug(is_in=True)


def test_a_version_that_never_becomes_ready_stops_the_update(up: Stack, texts: Texts, tmp_path: Path) -> None:
    before = {pod.host.address for pod in up.pods(*REPLICAS)}
    broken = patch(*REPLICAS, variable("TIDEWRIGHT_MAX_MODEL_LEN", "100000000"))
    worse = manifests(tmp_path / "broken", "cpu-demo", 3, 2, broken)
    while_loaded(up, texts, lambda: up.apply(worse), lambda: up.said("tidewright-replica-2", "BackOff"))
    assert len(before & set(up.endpoints("tidewright-replicas"))) == 2
    assert "max_model_len" in up.pod("tidewright-replica-2").log


def test_a_key_that_is_added_to_the_secret_counts_at_once(up: Stack) -> None:
    other = Stack()
    pod = up.pods(*GATEWAYS)[0]
    with up.network.node.inside(), httpx.Client(base_url=f"http://{pod.host.address}:{PORT}") as http:
        headers = {"Authorization": f"Bearer {other.key}"}
        assert http.get("/v1/models", headers=headers).status_code == 401
        up.apply([secret("tidewright-keys", **other.secret["stringData"])])
        up.wait_until(lambda: http.get("/v1/models", headers=headers).status_code == 200)
