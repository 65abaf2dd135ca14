"""What a real gateway and a real Triton with its fallback expose is what the catalogue says, no more and no less."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from helpers.gateway import RunningGateway
from helpers.triton import RunningServer
from tidewright.cache import EMBEDDED_MODEL, fallback_path
from tidewright_gateway.metrics.catalogue import CATALOGUE

GATEWAYS = ("tidewright_gateway_", "process_")
SUFFIXES = ("_bucket", "_sum", "_count", "_total")
# Triton's python backend has only counters for what are histograms here.
OF_TRITONS_COUNTERS = ("suffix", '"le" label')


@pytest.fixture(scope="module")
def server(model_dir: Path) -> Iterator[RunningServer]:
    with RunningServer(model_dir, fallback=str(fallback_path(EMBEDDED_MODEL))) as running:
        yield running


@pytest.fixture(scope="module")
def gateway(model_dir: Path, server: RunningServer) -> Iterator[RunningGateway]:
    with RunningGateway(model_dir, server) as running:
        list(running.openai.completions.create(model="smollm2-135m", prompt="One", max_tokens=4, stream=True))
        running.post("/v1/completions", {"prompt": "One", "max_tokens": -7})
        yield running


def scrape_of_triton(server: RunningServer) -> str:
    return httpx.get(f"http://127.0.0.1:{server.settings.metrics_port}/metrics", trust_env=False).text


def families(text: str) -> dict[str, set[str]]:
    """Labels that were seen by the family's name as the catalogue has it."""
    known = {prefix + spec.name for prefix, specs in CATALOGUE.items() for spec in specs}
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            name = sample.name.removesuffix("_total") if sample.name not in known else sample.name
            while name not in known and name.endswith(SUFFIXES):
                name = name.rpartition("_")[0]
            found.setdefault(name, set()).update(set(sample.labels) - {"le"})
    return found


def documented(*prefixes: str) -> dict[str, set[str]]:
    return {
        prefix + spec.name: {label.name for label in spec.labels} for prefix in prefixes for spec in CATALOGUE[prefix]
    }


def promtool(text: str) -> list[str]:
    done = subprocess.run(["promtool", "check", "metrics"], input=text, text=True, capture_output=True, timeout=60)
    return (done.stdout + done.stderr).splitlines()


def test_the_gateway_exposes_its_catalogue(gateway: RunningGateway) -> None:
    found, expected = families(gateway.http.get("/metrics").text), documented(*GATEWAYS)
    assert found.keys() <= expected.keys()
    rare = expected.keys() - found.keys()  # series with open labels, which nothing has made yet
    assert rare <= {
        "tidewright_gateway_adapter_requests_total",
        "tidewright_gateway_key_refusals_total",
        "tidewright_gateway_generation_probes_total",
    }
    assert found == {name: expected[name] for name in found}


def test_triton_exposes_its_catalogue(server: RunningServer, gateway: RunningGateway) -> None:
    found = families(scrape_of_triton(server))
    expected = documented(*(prefix for prefix in CATALOGUE if prefix not in GATEWAYS))
    assert found == expected


def test_promtool_finds_no_fault_in_the_gateways_metrics(gateway: RunningGateway) -> None:
    assert promtool(gateway.http.get("/metrics").text) == []


def test_promtool_finds_only_tritons_faults_in_the_engines_metrics(
    server: RunningServer, gateway: RunningGateway
) -> None:
    ours = [line for line in promtool(scrape_of_triton(server)) if not line.startswith("nv_")]
    others = [line for line in ours if not line.endswith(OF_TRITONS_COUNTERS)]
    assert not others
    histograms = {spec.name for specs in CATALOGUE.values() for spec in specs if spec.kind == "histogram"}
    assert all(any(name in line for name in histograms) for line in ours), ours


def test_what_was_asked_is_counted(gateway: RunningGateway) -> None:
    assert gateway.metric("request_outcomes_total", outcome="ok") >= 1
    assert gateway.metric("request_outcomes_total", outcome="client_error") == 1
    assert gateway.metric("key_requests_total", key_id="anonymous") >= 2
    assert gateway.metric("time_per_output_token_seconds_count") == 1
    assert gateway.metric("queue_wait_seconds_count", **{"class": "normal"}) >= 1
    assert gateway.metric("replicas_usable") == 1
    assert gateway.metric("breaker_state", state="closed") == 1
    assert gateway.metric("streams_open") == 0
    assert gateway.metric("connections_open") >= 1
    assert gateway.metric("queue_places") > 1
