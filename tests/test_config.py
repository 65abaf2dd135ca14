"""Settings: where values come from, what wins, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from tidewright.config import Settings, options_in_order
from tidewright.kv_cache.budget import parse_memory
from tidewright.resilience.config import ResilienceSettings
from tidewright_gateway.config import GatewaySettings


def test_flags_win_over_the_environment_and_that_over_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "serving.yaml"
    file.write_text("http_port: 9001\ngrpc_port: 9002\nmetrics_port: 9003\n")
    monkeypatch.setenv("TIDEWRIGHT_CONFIG", str(file))
    monkeypatch.setenv("TIDEWRIGHT_GRPC_PORT", "9102")
    monkeypatch.setenv("TIDEWRIGHT_METRICS_PORT", "9103")
    settings = Settings(metrics_port=9203)
    assert (settings.http_port, settings.grpc_port, settings.metrics_port) == (9001, 9102, 9203)


def test_an_unknown_key_in_the_file_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "serving.yaml"
    file.write_text("http_prot: 9001\n")
    monkeypatch.setenv("TIDEWRIGHT_CONFIG", str(file))
    with pytest.raises(ValidationError, match="http_prot"):
        Settings()


def test_a_missing_file_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIDEWRIGHT_CONFIG", "/nowhere/serving.yaml")
    with pytest.raises(FileNotFoundError, match=r"/nowhere/serving\.yaml"):
        Settings()


def test_the_stubs_read_the_same_settings_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(dtype="float32", max_waiting=7, heartbeat_timeout=12.5, kv_cache_memory="10%")
    for name, value in settings.as_environment().items():
        monkeypatch.setenv(name, value)
    assert Settings() == settings


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"http_port": 8001}, "must differ"),
        ({"http_port": 0}, "http_port"),
        ({"device": "tpu"}, "device"),
        ({"kv_cache_memory": "lots"}, "not an amount of memory"),
        ({"kv_cache_memory": "120%"}, "not an amount of memory"),
        ({"heartbeat_interval": 5, "heartbeat_timeout": 6}, "at least twice"),
        ({"tensor_parallel_size": 0}, "tensor_parallel_size"),
        ({"tensor_parallel_size": 3, "nodes": 2, "rendezvous": "h:1"}, "3, which 2 nodes can't share equally"),
        ({"tensor_parallel_size": 2, "nodes": 2}, "nodes > 1 and rendezvous go together"),
        ({"tensor_parallel_size": 2, "rendezvous": "h:1"}, "nodes > 1 and rendezvous go together"),
        *(
            ({"tensor_parallel_size": 2, "nodes": 2, "rendezvous": text}, "must be HOST:PORT")
            for text in ("somewhere", ":1", "h:", "h:0", "h:65536", "h:²", "h i:1", "::1:5", "a..b:1", "0.0.0.0:9")
        ),
    ],
)
def test_bad_values_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Settings(**options)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("1GiB", 2**30), ("512 MiB", 2**29), ("1.5GB", 1_500_000_000), ("100", 100), ("25%", 250), ("100%", 1000)],
)
def test_parse_memory(text: str, expected: int) -> None:
    assert parse_memory(text, free=1000) == expected


def test_the_engine_gets_what_the_settings_say(tmp_path: Path) -> None:
    config = Settings(device="cpu", kv_cache_memory="10%", max_running=3).engine_config(tmp_path)
    assert (config.model_dir, config.device, config.kv_cache_memory) == (str(tmp_path), "cpu", "10%")
    assert config.max_running == 3


@pytest.mark.parametrize(("settings", "page"), [(Settings, "configuration.md"), (GatewaySettings, "serving.md")])
def test_every_option_is_documented_as_it_is(settings: type[ResilienceSettings], page: str) -> None:
    table = (Path(__file__).parent.parent / "docs" / page).read_text()
    rows = [line for line in table.splitlines() if line.startswith("| `")]
    options = options_in_order(settings)
    if settings is GatewaySettings:  # those of the resilience library stand in configuration.md
        options = [option for option in options if option[0] not in ResilienceSettings.model_fields]
    assert rows == [f"| `{name}` | `{field.default}` | {field.description} |" for name, field in options]
