"""model.py where the real Triton can't show it: an answer that ends while the canceller asks. Triton crashes then."""

from __future__ import annotations

import importlib
import sys
import threading
import types
from typing import Any

import pytest

from tidewright.bridge.request import GenerationRequest, OutputOptions
from tidewright.bridge.response import Delta, Response
from tidewright.engine.messages import TokenLogprob
from tidewright.errors import CancelledError
from tidewright.schema import SamplingParams


class FakeSender:
    """Like Triton's: a question after the end, or one that the end overtakes, is fatal."""

    def __init__(self) -> None:
        self.ended = False
        self.asking = threading.Event()
        self.may_answer = threading.Event()
        self.may_answer.set()
        self.crashed = False

    def send(self, response: object, flags: int = 0) -> None:
        self.ended = self.ended or bool(flags)

    def is_cancelled(self) -> bool:
        self.crashed |= self.ended
        self.asking.set()
        self.may_answer.wait(5)
        self.crashed |= self.ended
        return False


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Any:
    fake = types.ModuleType("triton_python_backend_utils")
    fake.TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1  # type: ignore[attr-defined]
    for name in ("Tensor", "InferenceResponse"):
        setattr(fake, name, lambda *args, **kwargs: None)
    error = types.SimpleNamespace
    fake.TritonError = type("TritonError", (error,), {"__init__": lambda self, *a: None, "CANCELLED": 1})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", fake)
    monkeypatch.delitem(sys.modules, "tidewright.model", raising=False)
    return importlib.import_module("tidewright.model")


@pytest.mark.parametrize("end", ["send", "fail"])
def test_triton_is_never_asked_about_a_request_that_has_ended(model: Any, end: str) -> None:
    sender = FakeSender()
    request = GenerationRequest([1], "", True, SamplingParams(), OutputOptions())
    responder = model._TritonResponder(sender, request, None)

    def finish() -> None:
        if end == "send":
            responder.send(Response([Delta(text="x", finish_reason="stop")]), final=True)
        else:
            responder.fail(CancelledError("gone"))

    sender.may_answer.clear()
    asking = threading.Thread(target=responder.is_cancelled)
    asking.start()
    assert sender.asking.wait(5)
    ending = threading.Thread(target=finish)
    ending.start()
    ending.join(0.1)
    sender.may_answer.set()
    asking.join()
    ending.join()
    assert sender.ended
    assert responder.is_cancelled() is False
    assert not sender.crashed


def test_an_end_that_hangs_keeps_nobody_who_asks(model: Any) -> None:
    """Triton may never take it, and one thread asks for all requests."""

    class Hanging(FakeSender):
        sending, taken = threading.Event(), threading.Event()

        def send(self, response: object, flags: int = 0) -> None:
            self.sending.set()
            self.taken.wait(5)
            super().send(response, flags)

    sender = Hanging()
    request = GenerationRequest([1], "", True, SamplingParams(), OutputOptions())
    responder = model._TritonResponder(sender, request, None)
    ending = threading.Thread(target=responder.fail, args=(CancelledError("gone"),))
    ending.start()
    assert sender.sending.wait(5)
    asking = threading.Thread(target=responder.is_cancelled)
    asking.start()
    asking.join(4)
    assert not asking.is_alive()
    assert ending.is_alive()
    sender.taken.set()
    ending.join()


def test_at_an_exact_tie_the_chosen_token_has_rank_1(model: Any) -> None:
    class Tokenizer:
        def token_text(self, token_id: int) -> str:
            return str(token_id)

    entries = [TokenLogprob(7, -1.0, 1), TokenLogprob(5, -1.0, 1), TokenLogprob(7, -1.0, 2)]
    named = model._named(entries, Tokenizer())
    assert {name: entry["rank"] for name, entry in named.items()} == {"7": 1, "5": 1}
