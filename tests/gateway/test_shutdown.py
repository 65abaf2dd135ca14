"""What still runs when the gateway's time is over ends with the reason, at every door."""

from __future__ import annotations

import json
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from helpers.echo_replica import EchoReplica
from helpers.gateway import MODEL, RunningGateway
from helpers.websocket import StreamClient
from tidewright.config import Settings
from tidewright.launch import gateway_process
from tidewright.launch.gateway_process import GatewayProcess

LONG = {"model": MODEL, "prompt": "Once", "max_tokens": 8000, "stream": True}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stream_that_is_cut_ends_with_the_reason(
    model_dir: Path, number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    with EchoReplica() as replica, RunningGateway(model_dir, replica, shutdown_grace=0.5) as gateway:
        replica.pause = 0.05
        with (
            httpx.stream("POST", f"{gateway.url}/v1/completions", json=LONG, timeout=60, trust_env=False) as answer,
            StreamClient(gateway.url) as client,
        ):
            client.start("a", **{name: LONG[name] for name in ("model", "prompt", "max_tokens")})
            client.tokens(1)
            lines = answer.iter_lines()
            while not next(lines).startswith("data: "):
                pass
            gateway.process.send_signal(number)
            *_, last = (line for line in lines if line.startswith("data: "))
            _, (done,) = client.rest()
        told = json.loads(last[6:])["error"]
        assert (told["code"], done["error"]["code"]) == ("going_away",) * 2
        assert "shutdown_grace" in told["message"]
        assert gateway.process.wait(30) in (0, -number)
        assert replica.wait_running(0, 30)
    said = "".join(capfd.readouterr())
    assert "Traceback" not in said
    assert "timeout graceful shutdown exceeded" not in said


def test_an_answer_that_is_not_done_is_a_503(model_dir: Path) -> None:
    with EchoReplica() as replica, RunningGateway(model_dir, replica, shutdown_grace=0.5) as gateway:
        replica.go_on.clear()
        with httpx.Client(base_url=gateway.url, timeout=60, trust_env=False) as http:
            request = http.build_request("POST", "/v1/completions", json={**LONG, "stream": False})
            with ThreadPoolExecutor(1) as pool:
                answer = pool.submit(http.send, request)
                assert replica.wait_running(1, 30)
                gateway.process.terminate()
                got = answer.result()
        replica.go_on.set()
    assert (got.status_code, got.json()["error"]["code"], got.headers["Retry-After"]) == (503, "going_away", "1")


def test_the_gateway_of_serve_outlasts_the_server(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the engine's reason comes when the connection is gone; and `serve` waits for its gateway's."""
    given: dict[str, str] = {}
    monkeypatch.setattr(gateway_process, "check_port", lambda *_: None)
    monkeypatch.setattr(GatewayProcess, "_launch", lambda self, command, environment: given.update(environment))
    GatewayProcess(Settings(shutdown_grace=7), model_dir).start()
    grace = float(given["TIDEWRIGHT_GATEWAY_SHUTDOWN_GRACE"])
    assert 7 < grace < 7 + gateway_process.STOP_TIMEOUT
