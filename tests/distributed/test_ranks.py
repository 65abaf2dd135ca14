"""Tensor-parallel ranks as real processes: the tokens of one rank and of transformers; how they meet and end."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import pytest
import transformers

from helpers.checkpoints import SIZES, expected, prompt, save
from helpers.engine_process import (
    PATIENCE,
    Bridge,
    bridge,
    config,
    hear_failed,
    hear_ready,
    heartbeat,
    submit,
    tokens_of,
)
from helpers.oracle import PROMPTS, Oracle
from tidewright.bench.machine import free_ports
from tidewright.distributed.fingerprint import model_fingerprint
from tidewright.distributed.handshake import Frames, SecretMismatchError, introduce
from tidewright.distributed.placement import place
from tidewright.distributed.rank_messages import Hello, Refused, decode_from_leader
from tidewright.distributed.ranks import Ranks
from tidewright.engine.engine import Engine
from tidewright.engine.messages import Failed, Heartbeat, ResizeCache, StepOutputs, Submit, encode
from tidewright.schema import SamplingParams


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, transformers.PreTrainedModel]:
    """6 query and 2 KV heads."""
    folder = tmp_path_factory.mktemp("model")
    return folder, save(folder, transformers.LlamaConfig(**SIZES), shards=True)


def descendants(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


@contextmanager
def group(model: Path, size: int, **changes: Any) -> Iterator[Bridge]:
    """An engine of so many ranks; in the end none may be left."""
    with bridge() as started:
        started.begin(config(model, tensor_parallel_size=size, **changes))
        hear_ready(started)
        family = [psutil.Process(started.process.pid), *descendants(started.process)]
        assert len(family) == size
        yield started
        started.connection.close()
        _, alive = psutil.wait_procs(family, timeout=10)
        assert not alive


def a_bit_of_everything() -> list[Submit]:
    """Prefixes to share, chunks, guesses, penalties, draws; more than the pool holds at once."""
    common = prompt(20, seed=9)
    repeating = prompt(5, seed=3) * 6
    cases: list[tuple[list[int], dict[str, Any]]] = [
        (common + prompt(4, seed=1), {"temperature": 0}),
        (common + prompt(7, seed=2), {"temperature": 0, "logprobs": 2, "prompt_logprobs": 1}),
        (repeating, {"temperature": 0}),
        (repeating, {"seed": 5}),
        (prompt(90, seed=4), {"seed": 6, "top_p": 0.9, "frequency_penalty": 0.5, "min_tokens": 9}),
        (prompt(3, seed=5), {"seed": 7, "priority": -1, "bad_words": ["x"]}),
        (repeating, {"seed": 8, "allowed_token_ids": [*{*repeating[:3]}, 30]}),
    ]
    options = {"max_tokens": 24, "ignore_eos": True, "seed": 0}
    return [Submit(i, ids, SamplingParams(**(options | params))) for i, (ids, params) in enumerate(cases)]


HARD = {"block_size": 4, "max_batched_tokens": 32, "speculative_tokens": 3}


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.heavy
def test_any_number_of_ranks_gives_the_same_tokens(tmp_path: Path, size: int) -> None:
    """As one rank, and greedy ones as transformers.

    3 query and 3 KV heads for 2 ranks with uneven parts; 8 and 2 for 4, which share KV heads and run ahead. Even parts:
    the embedded model, below.
    """
    heads = {2: (3, 3), 4: (8, 2)}[size]
    sizes = {**SIZES, "num_attention_heads": heads[0], "num_key_value_heads": heads[1], "head_dim": 8}
    oracle = save(tmp_path, transformers.LlamaConfig(**sizes), shards=True)
    shared = {**HARD, "kv_cache_memory": f"{49 * heads[1]}KiB"}
    own_way = {"speculative_tokens": 0, "async_scheduling": "on"} if size == 4 else {}
    with bridge() as alone:
        alone.begin(config(tmp_path, **shared))
        hear_ready(alone)
        wanted = tokens_of(alone, a_bit_of_everything())
    # Of the KV cache each rank has its own share.
    own = max(heads[1] // size, 1) if heads[1] % size == 0 or size > heads[1] else 2
    with group(tmp_path, size, **{**shared, **own_way, "kv_cache_memory": f"{49 * own}KiB"}) as started:
        assert tokens_of(started, a_bit_of_everything()) == wanted
        for request in a_bit_of_everything():
            if request.sampling.temperature == 0:
                assert wanted[request.request_id] == expected(oracle, request.prompt_token_ids, 24)
        preemptions = 0
        while not preemptions:
            message = started.hear()
            preemptions = message.stats.preemptions if isinstance(message, Heartbeat) else 0


def test_two_ranks_with_a_quantized_cache_give_the_tokens_of_one(checkpoint: tuple[Path, Any]) -> None:
    """A scale belongs to one head, so a rank that has some of the heads stores the same codes."""
    # What steps take decides how much of a prompt comes and how many run: one rank measures it, both must agree.
    options = {**HARD, "kv_cache_dtype": "int8", "tpot_target": 0.005}
    requests = [request for request in a_bit_of_everything() if request.sampling.temperature == 0]
    alone = Engine(place(config(checkpoint[0], **options), 0))
    wanted: dict[int, list[int]] = {request.request_id: [] for request in requests}
    for request in requests:
        assert alone.submit(request) is None
    while alone.has_work:
        for output in alone.step():
            wanted[output.request_id] += output.token_ids
    with group(checkpoint[0], 2, **options) as started:
        assert tokens_of(started, requests) == wanted


@pytest.mark.heavy
def test_two_ranks_resize_their_caches_alike(checkpoint: tuple[Path, Any]) -> None:
    """A rank compares its plans, blocks included, with rank 0's. The first resize comes while there is no step."""
    requests = [request for request in a_bit_of_everything() if request.sampling.temperature == 0]
    with group(checkpoint[0], 2, **HARD, max_model_len=96, kv_cache_memory="96KiB") as started:
        wanted = tokens_of(started, requests)
        started.say(ResizeCache(30))
        assert heartbeat(started, lambda stats: stats.cache_resizes == 1).blocks_total == 30
        resizes = [ResizeCache(num_blocks) for num_blocks in (60, 24, 40, 24) * 3]
        assert tokens_of(started, requests, resizes) == wanted
        assert heartbeat(started, lambda stats: stats.cache_resizes > 3).blocks_free > 0


@pytest.mark.heavy
def test_three_ranks_of_the_embedded_model(model_dir: Path, oracle: Oracle) -> None:
    """Each has one of its KV heads and three of its query heads."""
    greedy = SamplingParams(temperature=0, max_tokens=12, seed=0)
    prompts = [oracle.ids(PROMPTS[name]) for name in ("english", "numbers", "korean")]
    with group(model_dir, 3, kv_cache_memory="64MiB") as started:
        tokens = tokens_of(started, [Submit(i, ids, greedy) for i, ids in enumerate(prompts)])
    assert list(tokens.values()) == [oracle.greedy(ids, 12, guess=tokens[i]) for i, ids in enumerate(prompts)]


@pytest.mark.heavy
def test_aborts_and_deadlines_reach_every_rank(checkpoint: tuple[Path, Any]) -> None:
    """Every rank checks the plans: were a request still running anywhere, the engine would end."""
    with group(checkpoint[0], 2) as started:
        started.say(submit(1, max_tokens=200))
        started.say(Submit(2, [5, 6], SamplingParams(max_tokens=250, timeout=0.2, seed=1), time.monotonic() + 0.2))
        while not isinstance(message := started.hear(), StepOutputs) or not message.outputs:
            pass
        ended = {o.request_id for o in message.outputs if o.finish_reason}  # on a busy machine, 2 has by now
        started.say(submit(3, max_tokens=30))
        assert {o.request_id for o in started.outputs({1, 2, 3} - ended) if o.finish_reason} | ended == {1, 2, 3}
        assert len(tokens_of(started, [submit(4)])[4]) == 4


@pytest.mark.heavy
def test_two_engines_of_two_ranks_on_one_host(checkpoint: tuple[Path, Any]) -> None:
    with group(checkpoint[0], 2) as first, group(checkpoint[0], 2) as second:
        second.say(submit(1, max_tokens=30))
        tokens = tokens_of(first, [submit(1, max_tokens=30)])[1]
        assert [token for output in second.outputs({1}) for token in output.token_ids] == tokens


@pytest.mark.parametrize("busy", [False, True])
@pytest.mark.heavy
def test_a_killed_rank_ends_the_engine_with_the_cause(checkpoint: tuple[Path, Any], busy: bool) -> None:
    with group(checkpoint[0], 2) as started:
        if busy:
            started.say(submit(1, max_tokens=200))
            while not isinstance(started.hear(), StepOutputs):
                pass
        descendants(started.process)[0].kill()
        assert hear_failed(started) == "rank 1 died (signal 9)"
        assert started.exit_code() == 1


@pytest.mark.parametrize("busy", [False, True])
@pytest.mark.heavy
def test_a_stuck_rank_ends_the_engine(checkpoint: tuple[Path, Any], busy: bool) -> None:
    with group(checkpoint[0], 2, heartbeat_timeout=3.0) as started:
        if busy:
            started.say(submit(1, max_tokens=200))
            while not isinstance(started.hear(), StepOutputs):
                pass
        descendants(started.process)[0].send_signal(signal.SIGSTOP)
        message = hear_failed(started)
        assert busy or message == "rank 1 is stuck: no answer for 1.5 s"
        assert started.exit_code() == 1


@pytest.mark.heavy
def test_ranks_end_with_a_killed_rank_0(checkpoint: tuple[Path, Any]) -> None:
    with group(checkpoint[0], 2) as started:
        started.say(submit(1, max_tokens=200))
        started.process.kill()


def test_heads_that_can_t_be_shared_are_explained(checkpoint: tuple[Path, Any]) -> None:
    with bridge() as started:
        started.begin(config(checkpoint[0], tensor_parallel_size=3))
        assert "6 query heads and 2 KV heads can only be shared by 1, 2, 6 ranks" in hear_failed(started)
        family = descendants(started.process)
        assert started.exit_code() == 1
        assert not psutil.wait_procs(family, timeout=10)[1]


# Ranks of other hosts, started by hand.


@contextmanager
def two_hosts(model: Path, **changes: Any) -> Iterator[tuple[Bridge, str]]:
    """Rank 0, waiting for rank 1 of another host; and where."""
    address = f"127.0.0.1:{free_ports(1)[0]}"
    with bridge() as started:
        started.begin(config(model, tensor_parallel_size=2, nodes=2, rendezvous=address, **changes))
        yield started, address


@contextmanager
def rank(
    address: str,
    number: int,
    model: Path,
    program: tuple[str, ...] = ("-m", "tidewright.distributed.rank"),
    secret_file: str = "",
) -> Any:
    host, port = address.split(":")
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex((host, int(port))) == 0:
                break
        time.sleep(0.05)
    command = [sys.executable, *program, address, str(number), "0", str(model), secret_file]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def ask_to_join(address: str, hello: Hello | bytes, secret: bytes | None = None) -> str | None:
    """What a rank is told; None if it is hung up on."""
    host, port = address.split(":")
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            connected = socket.create_connection((host, int(port)))
            break
        except ConnectionRefusedError:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    if isinstance(hello, Hello):
        introduce(Frames(connected, deadline), secret)
        connected.settimeout(None)
    connection = Connection(connected.detach())
    connection.send_bytes(hello if isinstance(hello, bytes) else encode(hello))
    try:
        answer = decode_from_leader(connection.recv_bytes())
    except (EOFError, ConnectionResetError):
        return None
    assert isinstance(answer, Refused)
    return answer.message


def other_weights(model: Path, folder: Path) -> Path:
    """A copy whose files have the same names and sizes."""
    shutil.copytree(model, folder)
    for file in folder.glob("*.safetensors"):
        file.write_bytes(os.urandom(file.stat().st_size))
    return folder


@pytest.mark.heavy
def test_who_does_not_belong_is_refused_and_the_group_still_comes_together(
    checkpoint: tuple[Path, Any], tmp_path: Path
) -> None:
    model, version = model_fingerprint(checkpoint[0]), "0.1.0"
    other = model_fingerprint(other_weights(checkpoint[0], tmp_path / "other"))
    with two_hosts(checkpoint[0]) as (started, address):
        assert "of another version than rank 0" in str(ask_to_join(address, b"\x00GET / HTTP/1.1"))
        # As a rank began before there was a handshake.
        assert "of another version than rank 0" in str(ask_to_join(address, encode(Hello(1, version, model))))
        # Hung up on without being read, so the reason may be lost.
        assert ask_to_join(address, b"x" * 100_000) in (
            None,
            "it is of another version than rank 0; install the same on all hosts",
        )
        assert "there is no rank 2: tensor_parallel_size is 2" in str(ask_to_join(address, Hello(2, version, model)))
        assert "there is no rank 0" in str(ask_to_join(address, Hello(0, version, model)))
        assert "rank 1 runs Tidewright 9.9" in str(ask_to_join(address, Hello(1, "9.9", model)))
        assert "rank 1 has another model" in str(ask_to_join(address, Hello(1, version, other)))
        with rank(address, 1, checkpoint[0]):
            hear_ready(started)
            assert len(tokens_of(started, [submit(1)])[1]) == 4


@pytest.mark.heavy
def test_only_ranks_that_know_the_secret_are_heard(checkpoint: tuple[Path, Any], tmp_path: Path) -> None:
    """And rank 0 goes on waiting, and logs each that was refused."""
    file = tmp_path / "secret"
    file.write_text("0123456789abcdef\n")
    hello = Hello(1, "0.1.0", model_fingerprint(checkpoint[0]))
    with two_hosts(checkpoint[0], rendezvous_secret_file=str(file)) as (started, address):
        with pytest.raises(SecretMismatchError, match="is not rank 0's"):
            ask_to_join(address, hello, b"0123456789abcdeX")
        with pytest.raises(SecretMismatchError, match="rank 0 asks for a rendezvous secret, and this rank has none"):
            ask_to_join(address, hello)
        assert "there is no rank 9" in str(ask_to_join(address, Hello(9, "0.1.0", ""), b"0123456789abcdef"))
        with rank(address, 1, checkpoint[0], secret_file=str(file)):
            hear_ready(started)
            assert len(tokens_of(started, [submit(1)])[1]) == 4
        started.process.kill()
        assert started.process.stderr is not None
        said = started.process.stderr.read().decode()
    assert said.count("a connection from 127.0.0.1 was refused: ") == 3


@pytest.mark.heavy
def test_ranks_of_one_host_prove_it_too(checkpoint: tuple[Path, Any], tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text("0123456789abcdef")
    with group(checkpoint[0], 2, rendezvous_secret_file=str(file)) as started:
        assert len(tokens_of(started, [submit(1)])[1]) == 4


def test_a_secret_that_can_t_be_read_ends_the_start_with_the_reason(checkpoint: tuple[Path, Any]) -> None:
    with bridge() as started:
        started.begin(config(checkpoint[0], tensor_parallel_size=2, rendezvous_secret_file="/nowhere/secret"))
        assert hear_failed(started) == "can't read the rendezvous secret /nowhere/secret: No such file or directory"
        assert started.exit_code() == 1


@pytest.mark.heavy
def test_a_rank_that_does_not_come_is_named_with_the_command_that_starts_it(checkpoint: tuple[Path, Any]) -> None:
    with two_hosts(checkpoint[0], start_timeout=3.0) as (started, address):
        message = hear_failed(started)
        assert message.startswith(f"no rank 1 came to {address} within 2.4 s")
        assert f"tidewright worker --rendezvous {address} --node-rank 1 --ranks 1" in message
        assert started.exit_code() == 1


@pytest.mark.heavy
def test_a_rank_that_can_t_load_its_weights_ends_the_start_with_its_reason(
    checkpoint: tuple[Path, Any], tmp_path: Path
) -> None:
    """Its files are broken where the fingerprint did not look."""
    broken = other_weights(checkpoint[0], tmp_path / "broken")
    program = (
        "-c",
        "import sys; from tidewright.distributed import rank\n"
        f"rank.model_fingerprint = lambda folder: {model_fingerprint(checkpoint[0])!r}\n"
        "sys.exit(rank.main())",
    )
    with two_hosts(checkpoint[0]) as (started, address), rank(address, 1, broken, program):
        assert "rank 1: " in (message := hear_failed(started))
        assert "not a readable safetensors file" in message
        assert started.exit_code() == 1


@pytest.mark.heavy
def test_another_plan_is_noticed_before_anything_is_computed(checkpoint: tuple[Path, Any]) -> None:
    """The rank schedules one token less than it should."""
    program = (
        "-c",
        "import sys; from tidewright.distributed import rank; from tidewright.engine import scheduler\n"
        "take = scheduler.Scheduler._take\n"
        "scheduler.Scheduler._take = lambda self, s, budget: take(self, s, min(budget, 2))\n"
        "sys.exit(rank.main())",
    )
    with two_hosts(checkpoint[0]) as (started, address), rank(address, 1, checkpoint[0], program) as other:
        hear_ready(started)
        started.say(submit(1))
        assert hear_failed(started) == "rank 1: it made another plan than rank 0; both are in the log"
        assert started.exit_code() == 1
        assert b"request 1: 2 tokens from 0" in other.stderr.read()
        assert started.process.stderr is not None
        assert b"request 1: 5 tokens from 0" in started.process.stderr.read()


@pytest.mark.heavy
def test_a_rank_that_lacks_memory_in_a_step_says_how_large_the_next_engines_may_be(
    checkpoint: tuple[Path, Any],
) -> None:
    """No rank can take a step back alone: the others wait for it in a collective."""
    program = (
        "-c",
        "import sys, torch; from tidewright.distributed import rank; from tidewright.engine import model_runner\n"
        "def launch(self, plan):\n"
        "    raise torch.OutOfMemoryError('CUDA out of memory')\n"
        "model_runner.ModelRunner.launch = launch\n"
        "sys.exit(rank.main())",
    )
    with two_hosts(checkpoint[0]) as (started, address), rank(address, 1, checkpoint[0], program):
        hear_ready(started)
        started.say(submit(1, prompt=9))
        while not isinstance(message := started.hear(), Failed):
            pass
        what = "rank 1: a step of 9 tokens in 1 sequences ran out of memory (CUDA out of memory)"
        assert (message.message, message.step_tokens) == (what, 4)
        assert started.exit_code() == 1


@pytest.mark.heavy
def test_a_rank_may_load_for_longer_than_a_collective_may_take(checkpoint: tuple[Path, Any]) -> None:
    """Hosts differ: one has the model in memory already, another reads it from a slow disk."""
    program = (
        "-c",
        "import sys, time; from tidewright.distributed import follower, process_group\n"
        "join, load = process_group.join_group, follower.ModelRunner\n"
        "process_group.join_group = lambda *args: (time.sleep(2), join(*args))[1]\n"
        "follower.ModelRunner = lambda *args: (time.sleep(2), load(*args))[1]\n"
        "from tidewright.distributed import rank; sys.exit(rank.main())",
    )
    with two_hosts(checkpoint[0], heartbeat_timeout=3.0) as (started, address):
        with rank(address, 1, checkpoint[0], program):
            hear_ready(started)
            assert len(tokens_of(started, [submit(1)])[1]) == 4


def test_rank_0_knows_its_address_where_it_was_given_a_name(checkpoint: tuple[Path, Any]) -> None:
    """Of the address it finds the network interface that the ranks' traffic takes."""
    name = f"localhost:{free_ports(1)[0]}"
    ranks = Ranks(config(checkpoint[0], tensor_parallel_size=2, nodes=2, rendezvous=name))
    ranks.close()
    assert ranks.host == "127.0.0.1"
