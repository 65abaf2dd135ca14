"""A smaller variant of a model answers by load, and says so: as scripted loads rise and fall, and at a real gateway."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from helpers.echo_replica import EchoReplica
from helpers.gateway import MODEL, RunningGateway
from helpers.scripted_replicas import samples
from tidewright.resilience.degradation import Load, Route
from tidewright_gateway.admission.smaller_variant import SmallerVariant, can_replace
from tidewright_gateway.config import GatewaySettings
from tidewright_gateway.context import RequestContext
from tidewright_gateway.metrics import Metrics
from tidewright_gateway.openai.protocol import CompletionRequest
from tidewright_gateway.replicas.replica_set import ReplicaLoad

NO_TRACE: Any = None
CALM = Load(kv_cache=0.0, queue=0.0, wait=0.0, breaker_open=False)
SETTINGS = GatewaySettings(
    degrade_queue_short=0.2,
    degrade_queue_fallback=0.6,
    degrade_kv_cache_short=0.8,
    degrade_kv_cache_fallback=1.0,
    degrade_release=0.5,
    degrade_dwell=10,
)


class Scripted:
    """A model whose load is set by hand."""

    def __init__(self, name: str) -> None:
        self.name, self.now = name, CALM
        self.replicas = ReplicaLoad(waiting=0.0, kv_usage=0.0, breakers_open=False, in_flight=0)
        self.ladder = SimpleNamespace(load=lambda now: self.now)
        self.failover = SimpleNamespace(trouble="", load=lambda: self.replicas)

    def queue(self, share: float) -> None:
        self.now = Load(kv_cache=0.0, queue=share, wait=0.0, breaker_open=False)

    def kv_cache(self, share: float, tokens: int) -> None:
        self.now = Load(kv_cache=share, queue=0.0, wait=0.0, breaker_open=False)
        self.replicas = replace(self.replicas, kv_tokens=tokens)


@pytest.fixture
def made() -> tuple[SmallerVariant, Any, Any, Metrics]:
    whole, smaller, metrics = Scripted("whole"), Scripted("whole-small"), Metrics()
    return SmallerVariant(SETTINGS, whole, smaller, metrics), whole, smaller, metrics  # type: ignore[arg-type]


def test_it_answers_from_halfway_on_until_both_are_calm(
    made: tuple[SmallerVariant, Any, Any, Metrics], caplog: pytest.LogCaptureFixture
) -> None:
    """Thresholds of 0.2 and 0.6 make 0.4, and calm is less than half of that."""
    variant, whole, smaller, metrics = made

    def answers(now: float) -> bool:
        variant.tick(now)
        is_on = variant.of(whole) is smaller
        assert samples(metrics)[("smaller_variant",)] == is_on
        return is_on

    with caplog.at_level(logging.INFO):
        whole.queue(0.39)
        assert not answers(0)
        whole.queue(0.4)
        assert answers(1)
        whole.queue(0.0)
        smaller.queue(0.3)  # what it took from the other
        assert answers(2)
        assert answers(100)
        smaller.queue(0.1)
        assert answers(101)
        assert answers(110.9)
        assert not answers(111.1)
    assert [record.getMessage() for record in caplog.records] == [
        "degradation: whole-small answers new requests for whole (queue)",
        "degradation: whole answers its requests itself again",
    ]


def test_only_for_its_own_model_and_only_if_it_can(made: tuple[SmallerVariant, Any, Any, Metrics]) -> None:
    variant, whole, smaller, _ = made
    whole.queue(1.0)
    variant.tick(0)
    assert variant.of(smaller) is None
    smaller.failover.trouble = "it is not loaded"
    assert variant.of(whole) is None
    smaller.failover.trouble = ""
    assert variant.of(whole) is smaller


def test_its_own_small_kv_cache_does_not_keep_it_on(made: tuple[SmallerVariant, Any, Any, Metrics]) -> None:
    """0.9 makes it answer, and calm is less than 0.45 of the model's own pool, which is four times the variant's."""
    variant, whole, smaller, _ = made
    smaller.kv_cache(0.95, 1000)
    whole.kv_cache(0.0, 4000)
    variant.tick(0)
    assert variant.of(whole) is None  # who asks for it by its name does not bring it more
    whole.kv_cache(0.9, 4000)
    smaller.kv_cache(0.0, 1000)
    variant.tick(1)
    whole.kv_cache(0.3, 4000)
    smaller.kv_cache(0.7, 1000)  # 0.175 of the model's
    for now in (2, 100):
        variant.tick(now)
        assert variant.of(whole) is smaller
    smaller.kv_cache(0.5, 1000)
    variant.tick(101)
    variant.tick(112)
    assert variant.of(whole) is None


def test_one_that_is_overloaded_or_fails_gets_nothing(made: tuple[SmallerVariant, Any, Any, Metrics]) -> None:
    variant, whole, smaller, _ = made
    whole.queue(0.5)
    smaller.queue(0.59)
    variant.tick(0)
    assert variant.of(whole) is smaller
    smaller.replicas = replace(smaller.replicas, breakers_open=True, refuses=True)
    assert variant.of(whole) is None
    smaller.replicas = replace(smaller.replicas, refuses=False)  # a probe may pass
    assert variant.of(whole) is smaller
    smaller.queue(0.6)
    variant.tick(1)
    assert variant.of(whole) is None
    smaller.queue(0.0)
    variant.tick(2)
    variant.tick(13)
    assert variant.of(whole) is smaller


@pytest.mark.parametrize(
    "more",
    [
        {"prompt": [1, 2]},
        {"prompt": [[1, 2]]},
        {"logit_bias": {"5": 1}},
        {"stop_token_ids": [5]},
        {"allowed_token_ids": [5]},
        {"return_token_ids": True},
    ],
)
def test_token_ids_are_of_the_model_s_own_tokenizer(more: dict[str, Any]) -> None:
    def able(fingerprint: str, **body: Any) -> bool:
        models: list[Any] = [Scripted("small"), Scripted("whole")]
        for model, own in zip(models, (fingerprint, "a"), strict=True):
            model.failover.max_model_len = 64
            model.prompts = SimpleNamespace(tokenizer=SimpleNamespace(fingerprint=own))
        return can_replace(*models, CompletionRequest(**{"model": MODEL, "prompt": "Hi", **body}), 100)

    assert (able("a", **more), able("b", **more), able("b")) == (True, False, True)


@pytest.mark.parametrize(
    ("served_by", "is_shortened", "told"),
    [
        ("fallback", True, "fallback"),
        ("smaller", True, "smaller-variant"),
        ("decoder", True, "short-answer"),
        ("decoder", False, None),
    ],
)
def test_only_an_answer_of_the_fallback_is_called_so(served_by: str, is_shortened: bool, told: str | None) -> None:
    context = RequestContext("id", NO_TRACE, route=Route.FALLBACK, is_shortened=is_shortened)
    context.is_smaller = served_by == "smaller"
    context.models = {served_by}
    assert context.headers.get("X-Degraded") == told


def test_it_must_be_one_of_the_models() -> None:
    with pytest.raises(ValueError, match="smaller_model is 'small', which is none of `models`"):
        GatewaySettings(smaller_model="small", models="other=x")  # type: ignore[arg-type]


@pytest.fixture
def gateway(model_dir: Path) -> Iterator[tuple[RunningGateway, EchoReplica]]:
    options: dict[str, Any] = {"models": f"small={model_dir}", "smaller_model": "small", "degrade_dwell": 0.1}
    with EchoReplica(limit=4) as echo, RunningGateway(model_dir, echo, **options) as running:
        echo.statuses = {"decoder_small": echo.status}
        yield running, echo


def test_the_answer_says_who_served_it(gateway: tuple[RunningGateway, EchoReplica]) -> None:
    running, echo = gateway
    body = {"prompt": "Hi", "model": MODEL, "temperature": 0}

    def wait_for(served_by: str, body: dict[str, Any] = body) -> Any:
        deadline = time.monotonic() + 60
        while (answer := running.post("/v1/completions", body)).json().get("served_by") != served_by:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        return answer

    assert "X-Degraded" not in wait_for("decoder").headers
    calm, echo.status = echo.status, msgspec.structs.replace(echo.status, waiting=0.9)
    answer = wait_for("smaller")
    assert (answer.headers["X-Served-By"], answer.headers["X-Degraded"]) == ("smaller", "smaller-variant")
    assert answer.json()["model"] == MODEL
    assert echo.asked[-1] == "decoder_small"
    stream = running.post("/v1/completions", {**body, "stream": True}).text.split("\n\n")
    told = [json.loads(event.removeprefix("data: ")) for event in stream if event and "[DONE]" not in event]
    assert {one["served_by"] for one in told} == {"smaller"}
    assert running.metric("smaller_variant") == 1
    # What only the model can do, it does.
    echo.statuses["decoder_small"] = msgspec.structs.replace(calm, max_model_len=64)
    wait_for("decoder", {**body, "prompt": "Hi " * 100})  # longer than the variant's context
    wait_for("decoder", {**body, "max_tokens": 100})
    wait_for("decoder", {**body, "max_tokens": 64})
    assert wait_for("smaller", {**body, "max_tokens": 32}).status_code == 200
    echo.statuses["decoder_small"] = calm
    # Asked for by its own name, it is no degradation.
    answer = running.post("/v1/completions", {**body, "model": "small"})
    assert (answer.json()["served_by"], "X-Degraded" in answer.headers) == ("decoder", False)
    echo.status = calm
    wait_for("decoder")
