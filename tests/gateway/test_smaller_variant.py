"""A smaller variant of a model answers by load, and says so: as scripted loads rise and fall, and at a real gateway."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from helpers.echo_replica import EchoReplica
from helpers.gateway import MODEL, RunningGateway
from helpers.scripted_replicas import samples
from tidewright.resilience.degradation import Load
from tidewright_gateway.admission.smaller_variant import SmallerVariant
from tidewright_gateway.config import GatewaySettings
from tidewright_gateway.metrics import Metrics

CALM = Load(kv_cache=0.0, queue=0.0, wait=0.0, breaker_open=False)
SETTINGS = GatewaySettings(degrade_queue_short=0.2, degrade_queue_fallback=0.6, degrade_release=0.5, degrade_dwell=10)


class Scripted:
    """A model whose load is set by hand."""

    def __init__(self, name: str) -> None:
        self.name, self.now = name, CALM
        self.ladder, self.failover = SimpleNamespace(load=lambda now: self.now), SimpleNamespace(trouble="")

    def queue(self, share: float) -> None:
        self.now = Load(kv_cache=0.0, queue=share, wait=0.0, breaker_open=False)


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

    def wait_for(served_by: str) -> Any:
        deadline = time.monotonic() + 60
        while (answer := running.post("/v1/completions", body)).json()["served_by"] != served_by:
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
    # Asked for by its own name, it is no degradation.
    answer = running.post("/v1/completions", {**body, "model": "small"})
    assert (answer.json()["served_by"], "X-Degraded" in answer.headers) == ("decoder", False)
    echo.status = calm
    wait_for("decoder")
