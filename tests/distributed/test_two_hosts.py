"""Tensor parallelism over two hosts that have only a cable in common: their tokens, and what happens when it is cut."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import transformers
from click.testing import CliRunner

from helpers.checkpoints import SIZES, expected, prompt, save
from helpers.engine_process import PATIENCE, config, hear_failed, hear_ready, submit, tokens_of
from helpers.engine_process import Bridge as EngineBridge
from helpers.engine_process import bridge as engine_bridge
from helpers.hosts import Host, Worker, or_skip, two_hosts, worker
from helpers.oracle import PROMPTS, Oracle
from helpers.scripted import Caller
from tidewright.bridge.bridge import Bridge
from tidewright.bridge.request import GenerationRequest, OutputOptions
from tidewright.cache import MANIFEST
from tidewright.config import Settings
from tidewright.engine.messages import Submit
from tidewright.launch.cli import main
from tidewright.launch.worker_command import KNOCK_INTERVAL
from tidewright.schema import SamplingParams
from tidewright.tokenization import Tokenizer

RENDEZVOUS = "10.77.0.1:29400"
SECRET, SECRET_VARIABLE = "a secret of some length", "TIDEWRIGHT_RENDEZVOUS_SECRET_FILE"
GREEDY = {"temperature": 0.0, "seed": 0}
LENGTH = 230  # of an answer that is disturbed, in tokens
SEEDED = {"seed": 7, "top_p": 0.9, "frequency_penalty": 0.3}

Model = tuple[Path, transformers.PreTrainedModel]


@pytest.fixture(autouse=True, scope="module")
def secret_file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Of workers and settings that have no other one."""
    file = tmp_path_factory.mktemp("secret") / "rendezvous"
    file.write_text(SECRET)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(SECRET_VARIABLE, str(file))
        yield


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    with or_skip(), two_hosts() as made:
        yield made


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """6 query and 2 KV heads."""
    folder = tmp_path_factory.mktemp("model")
    (folder / MANIFEST).write_text("{}")  # so that `tidewright worker` takes the folder as it is
    return folder, save(folder, transformers.LlamaConfig(**SIZES), shards=True)


@contextmanager
def rank_0(host: Host, folder: Path, **changes: Any) -> Iterator[EngineBridge]:
    values = {"tensor_parallel_size": 2, "nodes": 2, "rendezvous": RENDEZVOUS}
    values["rendezvous_secret_file"] = os.environ[SECRET_VARIABLE]
    with host.inside(), engine_bridge() as started:
        started.begin(config(folder, **(values | changes)))
        yield started


# The same tokens.


def test_two_hosts_give_the_tokens_of_transformers_and_of_one_rank(
    hosts: tuple[Host, Host], model: Model, tmp_path: Path
) -> None:
    folder, oracle = model
    prompts = [prompt(length, seed=length) for length in (1, 17, 70)]
    greedy = [Submit(i, ids, SamplingParams(max_tokens=16, ignore_eos=True, **GREEDY)) for i, ids in enumerate(prompts)]
    drawn = [
        Submit(i, ids, SamplingParams(max_tokens=24, ignore_eos=True, **SEEDED)) for i, ids in enumerate(prompts, 9)
    ]
    with engine_bridge() as alone:
        alone.begin(config(folder))
        hear_ready(alone)
        wanted = tokens_of(alone, drawn)
    with worker(hosts[1], tmp_path / "log", RENDEZVOUS, folder), rank_0(hosts[0], folder) as started:
        hear_ready(started)
        tokens = tokens_of(started, greedy + drawn)
    assert [tokens[i] for i in range(len(prompts))] == [expected(oracle, ids, 16) for ids in prompts]
    assert {i: tokens[i] for i in wanted} == wanted


def test_two_hosts_serve_the_embedded_model(
    hosts: tuple[Host, Host], model_dir: Path, oracle: Oracle, tmp_path: Path
) -> None:
    prompts = [oracle.ids(PROMPTS[name]) for name in ("english", "code", "chinese")]
    requests = [Submit(i, ids, SamplingParams(max_tokens=8, **GREEDY)) for i, ids in enumerate(prompts)]
    with worker(hosts[1], tmp_path / "log", RENDEZVOUS, model_dir), rank_0(hosts[0], model_dir) as started:
        hear_ready(started)
        tokens = tokens_of(started, requests)
    assert list(tokens.values()) == [oracle.greedy(ids, 8, guess=tokens[i]) for i, ids in enumerate(prompts)]


# Something dies.


@contextmanager
def served(host: Host, folder: Path, tokenizer: Path) -> Iterator[Bridge]:
    """By the real bridge, on that host."""
    settings = Settings(
        dtype="float32",
        threads=1,
        kv_cache_memory="16MiB",
        heartbeat_interval=0.1,
        heartbeat_timeout=HEARTBEAT_TIMEOUT,
        start_timeout=30.0,
        tensor_parallel_size=2,
        nodes=2,
        rendezvous=RENDEZVOUS,
    )
    bridge = Bridge(settings, settings.engine_config(folder), Tokenizer(tokenizer))
    with host.inside():
        bridge.start()
    try:
        yield bridge
    finally:
        bridge.stop()


def ask(bridge: Bridge, sampling: dict[str, Any]) -> Caller:
    caller = Caller()
    params = SamplingParams(max_tokens=LENGTH, ignore_eos=True, **sampling)
    bridge.submit(GenerationRequest(prompt(9, seed=1), "", True, params, OutputOptions()), caller)
    return caller


def tokens_so_far(caller: Caller) -> list[int]:
    return [token for response in caller.responses for delta in response.deltas for token in delta.token_ids]


UNREACHABLE = "rank 1 can't be reached any longer"
# The kernel looks for the other end once a second; under 6 s a collective may fail before it has seen.
HEARTBEAT_TIMEOUT = 9.0


@pytest.mark.parametrize("which", [0, 1])
def test_a_cut_cable_is_noticed_on_both_sides_and_streams_go_on_where_it_is_mended(
    hosts: tuple[Host, Host],
    model: Model,
    model_dir: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    which: int,
) -> None:
    """`which`: the host whose end of the cable is pulled out; the other one only hears nothing any longer."""

    def cut(bridge: Bridge, other: Worker) -> None:
        hosts[which].plug(is_in=False)
        wait_for(lambda: "engine lost" in caplog.text)
        other.wait_until(lambda said: "The group has ended" in said)
        hosts[which].plug(is_in=True)

    undisturbed_and_disturbed(hosts, model, model_dir, tmp_path, cut)
    assert f"engine lost: {UNREACHABLE}" in caplog.text


def test_a_killed_rank_0_is_followed_by_the_next_one(
    hosts: tuple[Host, Host], model: Model, model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def kill(bridge: Bridge, other: Worker) -> None:
        assert bridge.engine
        os.kill(bridge.engine.pid, signal.SIGKILL)
        wait_for(lambda: "engine lost" in caplog.text)

    undisturbed_and_disturbed(hosts, model, model_dir, tmp_path, kill)
    assert "engine lost: killed by SIGKILL" in caplog.text


def undisturbed_and_disturbed(
    hosts: tuple[Host, Host],
    model: Model,
    model_dir: Path,
    tmp_path: Path,
    disturb: Callable[[Bridge, Worker], None],
) -> None:
    """The same requests twice, the second time with a disturbance."""
    folder, oracle = model
    with worker(hosts[1], tmp_path / "log", RENDEZVOUS, folder) as other:
        with served(hosts[0], folder, model_dir) as bridge:
            undisturbed = [ask(bridge, sampling) for sampling in (GREEDY, SEEDED)]
            for caller in undisturbed:
                caller.end()
            first = bridge.engine
            disturbed = [ask(bridge, sampling) for sampling in (GREEDY, SEEDED)]
            for caller in disturbed:
                caller.wait(lambda caller: len(tokens_so_far(caller)) > 20)
            disturb(bridge, other)
            counts = [len(tokens_so_far(caller)) for caller in disturbed]
            assert all(20 < count < LENGTH for count in counts)  # it was in the middle
            for caller in disturbed:
                caller.end()
            assert bridge.engine_restarts >= 1
            assert bridge.engine != first
        assert "The group has ended; waiting for the next one." in other.said
        assert "Traceback" not in other.said
    assert tokens_so_far(disturbed[0]) == expected(oracle, prompt(9, seed=1), LENGTH)
    assert [tokens_so_far(caller) for caller in disturbed] == [tokens_so_far(caller) for caller in undisturbed]
    assert [caller.ends for caller in disturbed] == [1, 1]


def wait_for(what: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_cut_cable_is_noticed_when_there_is_nothing_to_do(
    hosts: tuple[Host, Host], model: Model, tmp_path: Path
) -> None:
    with worker(hosts[1], tmp_path / "log", RENDEZVOUS, model[0]) as other:
        with rank_0(hosts[0], model[0], heartbeat_timeout=HEARTBEAT_TIMEOUT) as started:
            hear_ready(started)
            hosts[1].plug(is_in=False)
            assert hear_failed(started).startswith(UNREACHABLE)
            assert started.exit_code() == 1
            other.wait_until(lambda said: "rank 0 can't be reached any longer" in said and "The group has" in said)


def test_a_rank_that_was_cut_off_while_it_waited_for_a_third_comes_again(
    hosts: tuple[Host, Host], tmp_path: Path
) -> None:
    """Nobody has told it to join yet, and rank 0 must not take the lost one for the one that comes."""
    oracle = save(tmp_path, transformers.LlamaConfig(**{**SIZES, "num_attention_heads": 3, "num_key_value_heads": 3}))
    (tmp_path / MANIFEST).write_text("{}")
    port = int(RENDEZVOUS.partition(":")[2])
    with (
        rank_0(hosts[0], tmp_path, tensor_parallel_size=3, nodes=3) as started,
        worker(hosts[1], tmp_path / "log 1", RENDEZVOUS, tmp_path) as first,
    ):
        wait_for(lambda: hosts[1].connections_to(port))
        hosts[1].plug(is_in=False)
        first.wait_until(lambda said: "rank 0 can't be reached any longer" in said)
        hosts[1].plug(is_in=True)
        with worker(hosts[1], tmp_path / "log 2", RENDEZVOUS, tmp_path, "--node-rank", "2"):
            hear_ready(started)
            tokens = tokens_of(started, [submit(1, temperature=0, max_tokens=8)])
            assert tokens[1] == expected(oracle, submit(1).prompt_token_ids, 8)
            started.process.kill()


# The worker.


def test_a_worker_waits_for_rank_0_and_says_once_that_it_can_t_be_reached(
    hosts: tuple[Host, Host], model: Model, tmp_path: Path
) -> None:
    hosts[1].plug(is_in=False)
    with worker(hosts[1], tmp_path / "log", RENDEZVOUS, model[0]) as other:
        other.wait_until(lambda said: "Can't reach rank 0 at 10.77.0.1:29400: Network is unreachable." in said)
        time.sleep(3 * KNOCK_INTERVAL)
        hosts[1].plug(is_in=True)
        time.sleep(3 * KNOCK_INTERVAL)  # rank 0 is not there yet, of which there is nothing to say
        assert other.said.count("\n") == 2
        with rank_0(hosts[0], model[0]) as started:
            hear_ready(started)
            assert len(tokens_of(started, [submit(1)])[1]) == 4


def test_a_worker_that_can_t_be_of_the_group_says_why_and_ends(
    hosts: tuple[Host, Host], model: Model, model_dir: Path, tmp_path: Path
) -> None:
    def reason_of(name: str, folder: Path, *options: str) -> str:
        with worker(hosts[1], tmp_path / name, RENDEZVOUS, folder, *options) as other:
            wait_for(lambda: other.process.poll() is not None)
            assert other.process.returncode == 1
        _, reason, error = other.said.splitlines()
        assert error == "Error: a rank of this host can't join rank 0; the line above says why"
        return reason

    with rank_0(hosts[0], model[0], tensor_parallel_size=6) as started:
        assert "there is no rank 6: tensor_parallel_size is 6" in reason_of("a", model[0], "--node-rank", "6")
        assert "start the others with --ranks 3" in reason_of("b", model[0], "--node-rank", "1")
        assert "rank 3 has another model than rank 0" in reason_of("c", model_dir, "--node-rank", "3")
        started.process.kill()


def test_a_worker_without_rank_0_s_secret_says_why_and_ends_and_the_next_one_joins(
    hosts: tuple[Host, Host], model: Model, tmp_path: Path
) -> None:
    (tmp_path / "another").write_text("another secret of it\n")
    with rank_0(hosts[0], model[0]) as started:
        wrong = ("--node-rank", "1", "--rendezvous-secret-file", str(tmp_path / "another"))
        with worker(hosts[1], tmp_path / "wrong", RENDEZVOUS, model[0], *wrong) as other:
            wait_for(lambda: other.process.poll() is not None)
            assert other.process.returncode == 1
        _, reason, error = other.said.splitlines()
        assert "its rendezvous secret is not rank 0's; give both the same" in reason
        assert error == "Error: a rank of this host can't join rank 0; the line above says why"
        with worker(hosts[1], tmp_path / "right", RENDEZVOUS, model[0]):
            hear_ready(started)
            assert len(tokens_of(started, [submit(1)])[1]) == 4
        started.process.kill()
        assert started.process.stderr is not None
        said = started.process.stderr.read().decode()
    assert SECRET not in said + other.said
    assert "a connection from 10.77.0.2 was refused: " in said
    assert "is not rank 0's" in said


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "can't read the rendezvous secret {}: No such file or directory"),
        ("", "the rendezvous secret {} has 0 bytes; at least 16 are needed"),
        ("  short \n", "the rendezvous secret {} has 5 bytes"),
        ("x" * 4097, "the rendezvous secret {} is longer than 4096 bytes"),
    ],
)
@pytest.mark.parametrize("command", ["worker", "serve"])
def test_a_secret_that_is_none_is_explained(tmp_path: Path, content: str | None, problem: str, command: str) -> None:
    file = tmp_path / "secret"
    if content is not None:
        file.write_text(content)
    assert problem.format(file) in refusal(command, "127.0.0.1:29400", str(file))


@pytest.mark.parametrize("command", ["worker", "serve"])
@pytest.mark.parametrize("address", ["10.77.0.1:29400", "some.host:29400"])
def test_a_rendezvous_that_other_hosts_reach_needs_a_secret(command: str, address: str) -> None:
    """At once, before a model is prepared."""
    host = address.partition(":")[0]
    assert f"the rendezvous {host} can be reached from other hosts" in refusal(command, address, "")


def refusal(command: str, address: str, secret_file: str) -> str:
    own = ["--node-rank", "1"] if command == "worker" else ["--nodes", "2", "--tensor-parallel-size", "2"]
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        result = CliRunner().invoke(main, [command, "--rendezvous", address, *own], env={SECRET_VARIABLE: secret_file})
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert result.exit_code == 1
    return result.stderr.replace("\n", "")


@pytest.mark.parametrize("text", ["somewhere", "10.77.0.1:", "10.77.0.1:70000", "0.0.0.0:29400", "a..b:1"])
def test_a_rendezvous_that_is_none_is_explained(text: str) -> None:
    result = CliRunner().invoke(main, ["worker", "--rendezvous", text, "--node-rank", "1"])
    assert result.exit_code == 2
    assert f"rendezvous is '{text}', but must be HOST:PORT" in result.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_worker_whatever_it_does(
    hosts: tuple[Host, Host], model: Model, tmp_path: Path, number: int
) -> None:
    with worker(hosts[1], tmp_path / "waiting", RENDEZVOUS, model[0]) as waiting:
        waiting.wait_until(lambda said: "Waiting for rank 0" in said)
        assert waiting.end(number) == 0
    with rank_0(hosts[0], model[0]) as started, worker(hosts[1], tmp_path / "busy", RENDEZVOUS, model[0]) as busy:
        hear_ready(started)
        started.say(submit(1, max_tokens=200))
        assert busy.end(number) == 0
        assert hear_failed(started) == "rank 1 died; see its host's log"
    assert "Traceback" not in waiting.said + busy.said
