"""One real Triton with a fallback behind the gateway: its decoder hangs or dies in the middle of streams."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers import upstream
from helpers.gateway import MODEL, RunningGateway
from helpers.processes import child, stub_of
from helpers.triton import RunningServer

LENGTH = 400  # tokens; far more than are there when the decoder goes


@pytest.fixture(scope="module")
def server(model_dir: Path, float32_fallback: Path) -> Iterator[RunningServer]:
    with RunningServer(model_dir, dtype="float32", fallback=str(float32_fallback)) as running:
        yield running


def struck_stream(gateway: RunningGateway, server: RunningServer, how: str) -> list[dict]:
    """The chunks of a stream whose decoder is lost after the tenth."""
    body = {"model": MODEL, "prompt": "Once upon a time", "max_tokens": LENGTH, "temperature": 0, "stream": True}
    chunks = []
    engine = child(stub_of(server, "decoder").pid, "tidewright.engine")
    with gateway.http.stream("POST", "/v1/completions", json={**body, "ignore_eos": True}) as answer:
        for line in answer.iter_lines():
            if not line.startswith("data: {"):
                continue
            chunks.append(json.loads(line[6:]))
            if len(chunks) == 10:
                if how == "stub":
                    stub_of(server, "decoder").kill()
                else:
                    engine.suspend()
    if how == "stop":
        engine.resume()
    return chunks


@pytest.mark.parametrize("how", ["stop", "stub"])
def test_a_stream_that_has_begun_goes_on_with_the_fallback(model_dir: Path, server: RunningServer, how: str) -> None:
    def goes_on() -> None:
        options = {"fallback": True, "stall_timeout": 2, "patience": 0.5}
        with RunningGateway(model_dir, server, **options) as gateway:
            chunks = struck_stream(gateway, server, how)
        assert "error" not in chunks[-1], chunks[-1]
        assert [chunks[0]["served_by"], chunks[-1]["served_by"]] == ["decoder", "fallback"]
        assert chunks[-1]["choices"][0]["finish_reason"] == "length"
        first = [chunk["served_by"] for chunk in chunks].index("fallback")
        assert first >= 10
        text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
        assert len(text) > len("".join(chunk["choices"][0]["text"] for chunk in chunks[:first]))

    if not server.is_well():
        server.triton.start_again()
    # A stub that is killed with streams can take tritonserver along.
    upstream.unless_aborted(server, goes_on)
