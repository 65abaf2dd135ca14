"""The real engine process over a socketpair: everything that the bridge may say to it, and how it ends."""

from __future__ import annotations

import fcntl
import re
import signal
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from helpers.engine_process import PATIENCE, Bridge, bridge, config, hear_failed, hear_ready, submit, tokens_of
from helpers.scheduling import make
from tidewright.distributed.placement import place
from tidewright.engine.adapters import Adapters
from tidewright.engine.engine import Engine
from tidewright.engine.messages import (
    Abort,
    EngineConfig,
    Failed,
    Heartbeat,
    LoadAdapter,
    Ready,
    SequenceOutput,
    Shutdown,
    StepOutputs,
    Submit,
)
from tidewright.engine.process import EngineProcess
from tidewright.sampling.grammar_compiler import Compiled, GrammarCompiler
from tidewright.schema import SamplingParams


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        initializer_range=0.3,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def engine(model: Path) -> Iterator[Bridge]:
    with bridge() as started:
        started.begin(config(model))
        ready = started.hear()
        assert isinstance(ready, Ready)
        assert ready.pid == started.process.pid
        assert (ready.vocab_size, ready.max_model_len, ready.block_size) == (64, 4096, 16)
        assert 0 < ready.load_seconds < PATIENCE
        yield started


def test_requests_are_answered_token_by_token(engine: Bridge) -> None:
    engine.say(submit(1, logprobs=2))
    engine.say(submit(2, max_tokens=3))
    outputs = engine.outputs({1, 2})
    for request_id, count in ((1, 4), (2, 3)):
        own = [output for output in outputs if output.request_id == request_id]
        assert [len(output.token_ids) for output in own] == [1] * count
        assert [output.finish_reason for output in own] == [None] * (count - 1) + ["length"]
        assert [bool(output.logprobs) for output in own] == [request_id == 1] * count
    engine.say(submit(3))
    again = engine.outputs({3})
    assert [o.token_ids for o in again] == [o.token_ids for o in outputs if o.request_id == 1]  # same seed


def test_abort_ends_a_request_without_output(engine: Bridge) -> None:
    engine.say(submit(1, max_tokens=4000))
    engine.say(submit(2, max_tokens=20))
    while not isinstance(engine.hear(), StepOutputs):
        pass
    engine.say(Abort(1))
    engine.say(Abort(77))
    outputs = engine.outputs({2})
    assert not any(output.finish_reason for output in outputs if output.request_id == 1)
    while True:
        message = engine.hear()
        if isinstance(message, Heartbeat) and message.stats.running == 0:
            break
        assert not isinstance(message, StepOutputs) or {o.request_id for o in message.outputs} <= {1}
    assert message.stats.blocks_free == message.stats.blocks_total
    assert message.stats.prompt_tokens == 10


def test_a_request_that_can_never_run_is_invalid(engine: Bridge) -> None:
    engine.say(Submit(1, [64], SamplingParams(seed=1)))
    engine.say(submit(2))
    outputs = engine.outputs({1, 2})
    assert (outputs[0].request_id, outputs[0].finish_reason) == (1, "invalid")
    assert outputs[0].message == "the prompt has token ids outside of 0 … 63"
    assert len(outputs) == 5


def test_heartbeats_come_busy_and_idle(engine: Bridge) -> None:
    for _ in range(3):
        assert isinstance(engine.hear(), Heartbeat)
    engine.say(submit(1, max_tokens=1000))
    busy, ended = 0, False
    while not ended:
        message = engine.hear()
        if isinstance(message, Heartbeat):
            busy += message.stats.running
        elif isinstance(message, StepOutputs):
            ended = any(output.finish_reason for output in message.outputs)
    assert busy > 1


def test_steps_go_on_while_the_bridge_does_not_read(engine: Bridge) -> None:
    def unread_bytes() -> bytes:
        return fcntl.ioctl(engine.connection.fileno(), termios.FIONREAD, bytes(4))

    engine.say(submit(1, max_tokens=3000))
    while not isinstance(message := engine.hear(), StepOutputs):
        pass
    before = b""
    while before != unread_bytes():  # until the socket is full and a send waits
        before = unread_bytes()
        time.sleep(0.3)
    outputs = [message.outputs]
    while not outputs[-1][-1].finish_reason:
        message = engine.hear()
        if isinstance(message, StepOutputs):
            outputs.append(message.outputs)
    assert sum(map(len, outputs)) == 3000
    assert max(map(len, outputs)) > 1  # those of several steps left together


def test_shutdown_is_a_clean_exit(engine: Bridge) -> None:
    engine.say(submit(1, max_tokens=4000))
    engine.say(Shutdown())
    assert engine.exit_code() == 0


def test_end_of_the_socket_ends_an_idle_process_at_once(model: Path) -> None:
    with bridge() as started:
        started.begin(config(model, heartbeat_interval=10 * PATIENCE))
        assert isinstance(started.hear(), Ready)
        assert isinstance(started.hear(), Heartbeat)  # the only one: no failing send can give the end away
        started.connection.close()
        assert started.exit_code() == 0


def test_end_of_the_socket_ends_the_process_amid_work(engine: Bridge) -> None:
    engine.say(submit(1, max_tokens=4000))
    engine.hear()
    engine.connection.close()
    assert engine.exit_code() == 0


def test_ctrl_c_is_not_the_engines_business(engine: Bridge) -> None:
    engine.process.send_signal(signal.SIGINT)
    engine.say(submit(1))
    assert len(engine.outputs({1})) == 4


BAD = [
    ({"model_dir": "/nowhere"}, "/nowhere/config.json can't be read"),
    ({"dtype": "int3"}, "dtype 'int3' is not supported; use one of: bfloat16, float16, float32"),
    (
        {"kv_cache_dtype": "fp4"},
        "kv_cache_dtype 'fp4' is not supported; use one of: auto, bfloat16, float16, float32, fp8, int8",
    ),
    (
        {"kv_cache_dtype": "float16", "attention": "native"},
        "attention 'native' needs a KV cache in torch.float32, as the weights, in fp8 or in int8, not in torch.float16",
    ),
    ({"device": "cuda:99"}, "device 'cuda:99' needs GPU 99, but torch sees "),
    ({"device": "toaster"}, "device 'toaster' is not one"),
    ({"device": "meta"}, "device 'meta' is not supported"),
    ({"attention": "magic"}, "attention 'magic' does not exist"),
    ({"kv_cache_memory": "1000"}, "one sequence may need 256"),
    ({"kv_cache_memory": "512KiB", "max_model_len": 4096}, "one sequence may need 4096"),
    ({"kv_cache_memory": "1000000GiB"}, "lower kv_cache_memory"),
    ({"max_model_len": 5000}, "max_model_len is 5000, but the model's limit is 4096"),
    ({"block_size": 0}, "block_size must be at least 1"),
]


def changed(model: Path, changes: dict[str, Any]) -> EngineConfig:
    values = {"model_dir": str(model)} | changes
    return config(Path(values.pop("model_dir")), **values)


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_a_bad_configuration_is_explained(model: Path, changes: dict[str, Any], message: str) -> None:
    """As the process makes its engine."""
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        Engine(place(changed(model, changes), 0))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("changes", "message"), [BAD[0], BAD[4]])
def test_the_process_gives_its_explanation_and_ends(model: Path, changes: dict[str, Any], message: str) -> None:
    with bridge() as started:
        started.begin(changed(model, changes))
        answer = started.hear()
        assert isinstance(answer, Failed)
        assert answer.message.startswith(message)
        assert started.exit_code() == 1


def test_configure_comes_first() -> None:
    with bridge() as started:
        started.say(Shutdown())
        assert started.hear() == Failed("expected Configure, not Shutdown")
        assert started.exit_code() == 1


def test_a_heartbeat_comes_before_the_first_step_is_over(model: Path) -> None:
    """As after a restart, when all that was in flight is there at once: what else could be repeated amid the step?"""
    slow = (
        "import sys, time; from tidewright.engine import __main__, model_runner\n"
        "launch = model_runner.ModelRunner.launch\n"
        "model_runner.ModelRunner.launch = lambda self, plan: (time.sleep(1), launch(self, plan))[1]\n"
        "__main__.main()"
    )
    with bridge("-c", slow) as started:
        started.begin(config(model))
        started.say(submit(1))
        assert isinstance(started.hear(), Ready)
        waiting = []
        while isinstance(message := started.hear(), Heartbeat):
            waiting.append(message.stats.waiting)
        assert isinstance(message, StepOutputs)
        assert 1 in waiting


def test_a_failing_step_ends_the_process_with_a_traceback(model: Path) -> None:
    broken = (
        "import sys; from unittest import mock; from tidewright.engine import __main__; "
        "from tidewright.sampling import sampler; "
        "sampler.sample = mock.Mock(side_effect=RuntimeError('out of luck')); __main__.main()"
    )
    with bridge("-c", broken) as started:
        started.begin(config(model))
        assert isinstance(started.hear(), Ready)
        started.say(submit(1))
        assert started.exit_code() == 1
        assert started.process.stderr is not None
        assert b"RuntimeError: out of luck" in started.process.stderr.read()


def test_an_engine_that_finds_no_memory_at_its_start_says_so(model: Path) -> None:
    """As where a kernel counts what is only reserved (vm.overcommit_memory=2)."""
    full = (
        "from tidewright.engine import __main__; from tidewright.devices.cpu import memory\n"
        "make = memory.huge_empty\n"
        "memory.huge_empty = lambda size, reserves: make(1 << 60, reserves)\n"
        "__main__.main()"
    )
    with bridge("-c", full) as started:
        started.begin(config(model))
        assert hear_failed(started) == (
            "the engine can't start for lack of memory ([Errno 12] Cannot allocate memory): end what else takes it, "
            "or lower kv_cache_memory"
        )
        assert started.exit_code() == 1


def test_a_block_lost_from_the_books_ends_the_idle_engine(model: Path) -> None:
    """Of a kind that only the look at every block finds, which takes several calls."""
    broken = (
        "from tidewright.engine import __main__; from tidewright.kv_cache import idle_audit, prefix_cache\n"
        "idle_audit.BLOCKS, free = 3, prefix_cache.PrefixCache.free\n"
        "def lose(cache, *table): free(cache, *table); cache.pool._references[-1] = 1\n"
        "prefix_cache.PrefixCache.free = lose\n"
        "__main__.main()"
    )
    with bridge("-c", broken) as started:
        started.begin(config(model))
        hear_ready(started)
        assert len(tokens_of(started, [submit(1)])[1]) == 4
        assert "has 1 references and is in the free list" in hear_failed(started)
        assert started.exit_code() == 1


def test_the_grammar_of_a_refused_request_is_forgotten() -> None:
    """It was made before the scheduler was asked, which never tells of the request's end."""
    forgotten: list[int] = []
    put: list[SequenceOutput] = []
    refusal = SequenceOutput(7, [], "overloaded", message="too many requests")
    started = EngineProcess(SimpleNamespace())  # type: ignore[arg-type]
    guided = SimpleNamespace(forget=forgotten.extend)
    started._engine = SimpleNamespace(  # type: ignore[assignment]
        has_work=True, runner=SimpleNamespace(guided=guided), submit=lambda request: refusal
    )
    started._adapters = SimpleNamespace(take_ready=list)  # type: ignore[assignment]
    started._grammars = SimpleNamespace(take=lambda compiled: True)  # type: ignore[assignment]
    started._outbox = SimpleNamespace(put_outputs=put.extend)  # type: ignore[assignment]
    started._inbox.put(Compiled(Submit(7, [1], SamplingParams(guided_regex="a"))))
    assert started._take_messages()
    assert put == [refusal]
    assert forgotten == [7]


@pytest.mark.parametrize(("adapter", "regex"), [("a", None), ("", "a")])
def test_what_waits_for_an_adapter_or_a_grammar_counts_for_its_tenant_s_share_of_the_queue(
    adapter: str, regex: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it would leave no place for others, of all that the bridge lets in."""
    put: list[SequenceOutput] = []
    engine = Engine.__new__(Engine)
    engine.scheduler, _ = make(max_running=2, max_waiting=8)
    engine.runner = SimpleNamespace(guided=SimpleNamespace(forget=lambda _: None))  # type: ignore[assignment]
    monkeypatch.setattr(Engine, "has_work", True)
    monkeypatch.setattr(Engine, "submit", lambda *_: None)
    monkeypatch.setattr("tidewright.sampling.grammar_compiler.start_vital_thread", lambda *_: None)  # it takes for ever
    started = EngineProcess(SimpleNamespace())  # type: ignore[arg-type]
    started._engine, started._outbox = engine, SimpleNamespace(put_outputs=put.extend)  # type: ignore[assignment]
    host = SimpleNamespace(read_adapter=lambda *_: None, adapter_requests=lambda _: 0)
    started._adapters = Adapters(host, 1, 100)  # type: ignore[arg-type]
    started._adapters.load(LoadAdapter("a", "a"))
    started._grammars = GrammarCompiler(lambda *_: None, lambda _: None, lambda _: None)
    for number in range(10):
        sampling = SamplingParams(tenant="flood", guided_regex=regex)
        started._inbox.put(Submit(number, [1], sampling, adapter=adapter))
    started._inbox.put(Submit(10, [1], SamplingParams(tenant="quiet")))
    started._inbox.put(Submit(11, [1], SamplingParams(tenant="flood"), accepted_before=True))
    assert started._take_messages()
    assert [output.request_id for output in put] == [8, 9]  # it may have all of max_running, and 6 of 8
    assert "share of the queue" in put[0].message
