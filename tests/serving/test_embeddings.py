"""OpenAI's client through a real gateway and a real Triton with --task embed, held against transformers in float32."""

from __future__ import annotations

import base64
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest

from helpers.both_clients import Clients
from helpers.gateway import MODEL, RunningGateway
from helpers.oracle import PROMPTS, Oracle
from helpers.processes import Serve
from helpers.triton import RunningServer
from tidewright_client.errors import InvalidRequest

# Short ones, and one longer than a step.
TEXTS = [PROMPTS[name] for name in ("english", "chinese", "emoji", "one token", "code", "special tokens", "long")]


@pytest.fixture(scope="module")
def embedder(model_dir: Path) -> Iterator[RunningServer]:
    options = {"task": "embed", "pooling": "mean", "dtype": "float32", "max_batched_tokens": 256, "max_model_len": 3000}
    with RunningServer(model_dir, **options) as running:
        yield running


@pytest.fixture(scope="module")
def gateway(model_dir: Path, embedder: RunningServer) -> Iterator[RunningGateway]:
    with RunningGateway(model_dir, embedder) as running:
        yield running


@pytest.fixture(scope="module")
def wanted(oracle: Oracle) -> list[np.ndarray]:
    import torch

    vectors = []
    for text in TEXTS:
        with torch.inference_mode():
            states_TE = oracle._model.model(torch.tensor([oracle.ids(text)])).last_hidden_state[0]
        vector_E = states_TE.mean(dim=0)
        vectors.append((vector_E / vector_E.norm()).numpy())
    return vectors


def test_openai_s_client_gets_the_vectors_of_transformers(
    gateway: RunningGateway, embedder: RunningServer, oracle: Oracle, wanted: list[np.ndarray]
) -> None:
    assert len(oracle.ids(TEXTS[-1])) > 4 * 256
    for encoding, texts in (("float", TEXTS), ("base64", TEXTS[:-1]), (openai.NOT_GIVEN, TEXTS[:-1])):
        answer = gateway.openai.embeddings.create(model=MODEL, input=texts, encoding_format=encoding)
        assert [entry.index for entry in answer.data] == list(range(len(texts)))
        assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(len(oracle.ids(text)) for text in texts)
        for entry, vector in zip(answer.data, wanted[: len(texts)], strict=True):
            got = entry.embedding
            if isinstance(got, str):  # the client leaves as it is what it was told to ask for
                got = np.frombuffer(base64.b64decode(got), "<f4")
            np.testing.assert_allclose(got, vector, atol=1e-5)
    (short,) = gateway.openai.embeddings.create(model=MODEL, input=oracle.ids(TEXTS[0]), dimensions=64).data
    cut = wanted[0][:64]
    np.testing.assert_allclose(short.embedding, cut / np.linalg.norm(cut), atol=1e-5)
    embedder.wait_idle()


def test_the_clients_of_triton_get_them_without_a_gateway(
    embedder: RunningServer, oracle: Oracle, wanted: list[np.ndarray]
) -> None:
    for kind in ("sync", "async"):
        made = Clients(kind)
        with made(embedder.grpc_url) as client:
            for text, vector in list(zip(TEXTS, wanted, strict=True))[:4]:
                for given in ({"prompt": text}, {"input_ids": oracle.ids(text)}):
                    got = client.embed(**given)
                    np.testing.assert_allclose(got.vector, vector, atol=1e-5)
                    assert got.num_prompt_tokens == len(oracle.ids(text))
            assert client.status().embedding_size == len(wanted[0])
            with pytest.raises(InvalidRequest, match=r"ask embed\(\) of this server"):
                client.generate(TEXTS[0], model="decoder")
            with pytest.raises(InvalidRequest, match="give one of"):
                client.embed()
        made.stop()


def test_many_clients_at_once_get_their_own(
    gateway: RunningGateway, embedder: RunningServer, wanted: list[np.ndarray]
) -> None:
    order = [number % 4 for number in range(32)]

    def ask(number: int) -> list[float]:
        return gateway.openai.embeddings.create(model=MODEL, input=TEXTS[number]).data[0].embedding

    with ThreadPoolExecutor(8) as pool:
        for number, got in zip(order, pool.map(ask, order), strict=True):
            np.testing.assert_allclose(got, wanted[number], atol=1e-5)
    embedder.wait_idle()
    finished = embedder.metrics()
    assert finished["requests_finished_total", "stop"] >= 32
    assert finished["requests_finished_total", "engine_failed"] == 0


def test_scores_are_the_cosines(gateway: RunningGateway, wanted: list[np.ndarray]) -> None:
    answer = gateway.post("/v1/score", {"text_1": TEXTS[0], "text_2": TEXTS[:3]}).json()
    assert [entry["score"] for entry in answer["data"]] == pytest.approx(
        [float(wanted[0] @ vector) for vector in wanted[:3]], abs=1e-5
    )


def test_triton_gives_them_itself_and_refuses_what_has_another_task(
    embedder: RunningServer, server: RunningServer, oracle: Oracle, wanted: list[np.ndarray]
) -> None:
    ids = oracle.ids(TEXTS[0])
    for prompt in ({"text_input": TEXTS[0]}, {"input_ids": ids}):
        got = embedder.generate(**prompt, embed=True, return_num_input_tokens=True, return_finish_reason=True)
        assert (got.ended, got.error) == (1, None)
        np.testing.assert_allclose(got.outputs["embedding"], wanted[0], atol=1e-5)
        assert got.outputs["num_input_tokens"].tolist() == [len(ids)]
        assert got.outputs["finish_reason"].tolist() == [b"stop"]
    for model in ("decoder", "generate", "generate_direct", "failsafe"):
        refused = embedder.generate(model, text_input="a")
        assert "send embed = true" in str(refused.error)
        assert "[invalid]" in str(refused.error)
    refused = server.generate(text_input="a", embed=True)
    assert "this server generates text" in str(refused.error)
    assert "[invalid]" in str(refused.error)


def test_a_timeout_ends_a_request_with_that_reason(embedder: RunningServer) -> None:
    got = embedder.generate(input_ids=[5] * 2900, embed=True, sampling_parameters={"timeout": 0.05})
    assert "[timeout]" in str(got.error)
    embedder.wait_idle()


def test_serve_says_how_to_ask_and_its_gateway_knows_the_task(serve: type[Serve]) -> None:
    served = serve("--task", "embed", "--max-model-len", "256", "--threads", "1")
    served.wait_ready()
    assert "/v1/embeddings" in served.log
    assert "chat" not in served.log
    url = f"http://127.0.0.1:{served.gateway}/v1/embeddings"
    answer = httpx.post(url, json={"model": MODEL, "input": "Hello"}, timeout=60, trust_env=False)
    (entry,) = answer.json()["data"]
    assert np.linalg.norm(entry["embedding"]) == pytest.approx(1, abs=1e-3)
    served.process.send_signal(signal.SIGINT)
    assert served.wait(30) == 0
    served.assert_nothing_left()
