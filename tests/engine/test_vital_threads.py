"""A thread that fails ends its process, with the cause: an engine must not beat its heart and do nothing."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.engine_process import PATIENCE, bridge, config, hear_failed, hear_ready


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    import transformers

    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(1)
    small = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
    )
    transformers.LlamaForCausalLM(small).save_pretrained(folder)
    return folder


def test_an_engine_whose_intake_fails_says_so_and_ends(model: Path) -> None:
    with bridge() as started:
        started.begin(config(model))
        hear_ready(started)
        started.connection.send_bytes(b"\xc1 is no message")
        assert hear_failed(started).startswith("its intake thread failed (")
        assert started.exit_code() == 1


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE)


@pytest.mark.parametrize("tell", ["lambda cause: print(cause, flush=True)", "lambda cause: 1 / 0"])
def test_the_cause_is_told_and_the_process_ends(tell: str) -> None:
    done = run(
        "import time\n"
        "from tidewright.engine.vital_thread import start_vital_thread\n"
        f"start_vital_thread('intake', lambda: {{}}['x'], {tell})\n"
        f"time.sleep({PATIENCE})"
    )
    assert done.returncode == 1
    assert "KeyError: 'x'" in done.stderr
    if "print" in tell:
        assert done.stdout == "its intake thread failed (KeyError: 'x')\n"


def test_a_listener_that_does_not_listen_does_not_keep_it() -> None:
    done = run(
        "import time\n"
        "from tidewright.engine.vital_thread import start_vital_thread\n"
        f"start_vital_thread('intake', lambda: 1 / 0, lambda cause: time.sleep({PATIENCE}))\n"
        f"time.sleep({PATIENCE})"
    )
    assert done.returncode == -signal.SIGALRM


SENDER = """
from tidewright.engine.messages import EngineStats
from tidewright.engine.outbox import Outbox
outbox = Outbox(lambda message: {}['x'])
outbox.start(0.1, lambda: 0, tell)
outbox.put_heartbeat(EngineStats(0, 0, 0, 0, 0, 0, 0, 0))
"""
GRAMMARS = """
from tidewright.sampling.grammar_compiler import GrammarCompiler
from tidewright.engine.messages import Submit
from tidewright.schema import SamplingParams
compiler = GrammarCompiler(lambda request_id, params: None, lambda compiled: {}['x'], tell)
compiler.put(Submit(1, [1], SamplingParams(guided_regex='a')))
"""


@pytest.mark.parametrize(("thread", "code"), [("sender", SENDER), ("grammars", GRAMMARS)])
def test_a_failing_thread_of_the_engine_is_its_end_too(thread: str, code: str) -> None:
    done = run(f"import time\ntell = lambda cause: print(cause, flush=True)\n{code}\ntime.sleep({PATIENCE})")
    assert (done.returncode, done.stdout) == (1, f"its {thread} thread failed (KeyError: 'x')\n")


def test_a_process_ends_with_its_status_whatever_its_threads_do() -> None:
    """Python's own end aborts: the thread is in C++ code of torch."""
    code = (
        "import threading, torch\n"
        "from tidewright.parent_death import end_now\n"
        "def loop():\n"
        "    while True: torch.zeros(64, 64).view(-1).split(100)\n"
        "for _ in range(4): threading.Thread(target=loop, daemon=True).start()\n"
        "print('flushed')\n"
    )
    done = run(code + "end_now(7)")
    assert (done.returncode, done.stdout) == (7, "flushed\n")
