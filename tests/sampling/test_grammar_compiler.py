"""Grammars are made beside the engine's loop, and a request enters it only with its grammar ready."""

from __future__ import annotations

import queue
import threading
from pathlib import Path

import pytest
import torch

from helpers.step_batches import sample
from tidewright.engine.messages import SequenceOutput, Submit
from tidewright.engine.plan import Draw
from tidewright.sampling.grammar_compiler import Compiled, GrammarCompiler
from tidewright.sampling.guided import GuidedDecoding
from tidewright.schema import SamplingParams

PATIENCE = 20.0  # seconds


class World:
    def __init__(self) -> None:
        self.go_on = threading.Semaphore(0)
        self.begun = threading.Semaphore(0)
        self.made: list[int] = []
        self.done: queue.SimpleQueue[Compiled] = queue.SimpleQueue()
        self.compiler = GrammarCompiler(self._make, self.done.put, pytest.fail)

    def _make(self, request_id: int, params: SamplingParams) -> None:
        self.begun.release()
        assert self.go_on.acquire(timeout=PATIENCE)
        if params.guided_regex == "broken":
            raise RuntimeError("it broke")
        self.made.append(request_id)

    def put(self, request_id: int, regex: str = "a", tenant: str = "") -> None:
        self.compiler.put(Submit(request_id, [1], SamplingParams(guided_regex=regex, tenant=tenant)))

    def next(self) -> Compiled:
        return self.done.get(timeout=PATIENCE)


def test_they_come_back_in_order_and_a_broken_one_stops_nobody() -> None:
    it = World()
    it.put(1)
    it.put(2, "broken")
    it.put(3)
    for _ in range(3):
        it.go_on.release()
    done = [it.next() for _ in range(3)]
    assert [compiled.request.request_id for compiled in done] == [1, 2, 3]
    assert [compiled.refusal for compiled in done] == [
        None,
        SequenceOutput(2, [], "invalid", message="guided output failed: it broke"),
        None,
    ]
    assert all(it.compiler.take(compiled) for compiled in done)


def test_one_that_is_dropped_is_neither_made_nor_taken() -> None:
    it = World()
    it.put(1)
    assert it.begun.acquire(timeout=PATIENCE)
    it.put(2)
    it.compiler.drop(1)
    it.compiler.drop(2)
    it.compiler.drop(3)
    it.go_on.release()
    assert not any(it.compiler.take(it.next()) for _ in range(2))
    assert it.made == [1]


def test_one_tenants_many_do_not_keep_anothers_waiting() -> None:
    it = World()
    for request_id in range(1, 5):
        it.put(request_id, tenant="flood")
    assert it.begun.acquire(timeout=PATIENCE)
    it.put(9, tenant="quiet")
    for _ in range(5):
        it.go_on.release()
    assert [it.next().request.request_id for _ in range(5)] == [1, 9, 2, 3, 4]


@pytest.fixture(scope="module")
def guided(model_dir: Path) -> GuidedDecoding:
    return GuidedDecoding(model_dir / "tokenizer.json", 49152, (2,))


def test_a_grammar_made_in_another_thread_masks_as_its_own(guided: GuidedDecoding) -> None:
    params = SamplingParams(guided_choice=["yes", "no"], seed=1)
    thread = threading.Thread(target=guided.prepare, args=(1, params))
    thread.start()
    thread.join()
    prepared = guided._places[1]
    logits_BV = torch.zeros(2, 49152)
    first, second = sample(logits_BV, [Draw(1, params, 1), Draw(2, params, 1)], guided)
    assert guided._places[1] is prepared
    assert (first.token_id, first.error) == (second.token_id, "")
