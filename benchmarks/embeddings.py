"""Texts embedded a second: engine alone, through Triton and gateway, transformers. `python -m benchmarks.embeddings`.

All take turns on the same texts, of random lengths up to twice `--tokens`, in the same dtype and with as many threads.
transformers gets them in batches, sorted by length so that little is padded: its best case, for the whole list must be
known before. Through the gateway OpenAI's client sends them in lists of `--list`, `--clients` at a time. Medians with
lowest and highest.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import numpy.typing as npt
import openai
import torch

from tidewright.bench.machine import free_ports
from tidewright.cache import EMBEDDED_MODEL
from tidewright.config import Settings
from tidewright.engine.engine import Engine
from tidewright.engine.messages import EngineConfig, Submit
from tidewright.launch.gateway_process import GatewayProcess
from tidewright.launch.prepare import prepare
from tidewright.launch.server import TritonServer
from tidewright.schema import SamplingParams

Texts = list[list[int]]
Vectors = npt.NDArray[np.float32]


def by_engine(config: EngineConfig) -> Callable[[Texts], Vectors]:
    engine = Engine(config)

    def embed(texts: Texts) -> Vectors:
        for number, ids in enumerate(texts):
            engine.submit(Submit(number, ids, SamplingParams(seed=0)))
        found: dict[int, bytes] = {}
        while engine.has_work:
            found.update((output.request_id, output.embedding or b"") for output in engine.step())
        return np.stack([np.frombuffer(found[number], "<f4") for number in range(len(texts))])

    return embed


def by_transformers(folder: Path, pooling: str, dtype: torch.dtype, batch: int) -> Callable[[Texts], Vectors]:
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder, dtype=dtype).eval()

    def embed(texts: Texts) -> Vectors:
        order = sorted(range(len(texts)), key=lambda number: len(texts[number]))
        found: dict[int, npt.NDArray[np.float32]] = {}
        for first in range(0, len(texts), batch):
            chosen = order[first : first + batch]
            lengths_B = torch.tensor([len(texts[number]) for number in chosen])
            ids_BT = torch.zeros(len(chosen), int(lengths_B.max()), dtype=torch.int64)
            for row, number in enumerate(chosen):
                ids_BT[row, : lengths_B[row]] = torch.tensor(texts[number])
            mask_BT = torch.arange(ids_BT.shape[1]) < lengths_B[:, None]
            with torch.inference_mode():
                states_BTE = model(ids_BT, attention_mask=mask_BT.long(), use_cache=False).last_hidden_state.float()
            if pooling == "mean":
                vectors_BE = (states_BTE * mask_BT[:, :, None]).sum(1) / lengths_B[:, None]
            else:
                vectors_BE = states_BTE[torch.arange(len(chosen)), lengths_B - 1]
            vectors_BE = torch.nn.functional.normalize(vectors_BE, dim=-1)
            found.update(zip(chosen, vectors_BE.numpy(), strict=True))
        return np.stack([found[number] for number in range(len(texts))])

    return embed


def by_gateway(url: str, model: str, size: int, clients: int) -> Callable[[Texts], Vectors]:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", http_client=httpx.Client(trust_env=False, timeout=600))

    def embed(texts: Texts) -> Vectors:
        def ask(first: int) -> list[list[float]]:
            answer = client.embeddings.create(model=model, input=texts[first : first + size])
            return [entry.embedding for entry in answer.data]

        with ThreadPoolExecutor(clients) as pool:
            lists = pool.map(ask, range(0, len(texts), size))
            return np.array([vector for found in lists for vector in found], dtype=np.float32)

    return embed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=64, help="of a text, on average")
    parser.add_argument("--list", type=int, default=64, help="texts of one HTTP request")
    parser.add_argument("--clients", type=int, default=2)
    parser.add_argument("--batch", type=int, default=32, help="of transformers")
    parser.add_argument("--pooling", choices=("last", "mean"), default="last")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--model", default=EMBEDDED_MODEL)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    folder = prepare(options.model)
    ports = dict(zip(("http_port", "grpc_port", "metrics_port", "gateway_port"), free_ports(4), strict=True))
    settings = Settings(
        **ports,
        model=options.model,
        task="embed",
        pooling=options.pooling,
        dtype=options.dtype,
        threads=options.threads,
        shutdown_grace=0,
    )
    rng = random.Random(0)
    rates: dict[str, list[float]] = {}
    with contextlib.ExitStack() as stack:
        server, gateway = TritonServer(settings, folder), GatewayProcess(settings, folder)
        stack.callback(server.stop)
        stack.callback(gateway.stop)
        server.start()
        server.wait_ready()
        gateway.start()
        gateway.wait_ready()
        ways = {
            "transformers": by_transformers(folder, options.pooling, getattr(torch, options.dtype), options.batch),
            "engine": by_engine(settings.engine_config(folder)),
            "gateway": by_gateway(gateway.url, gateway.model_name, options.list, options.clients),
        }
        for repetition in range(options.repetitions + 1):
            lengths = [rng.randint(1, 2 * options.tokens - 1) for _ in range(options.texts)]
            texts = [rng.choices(range(100, 9000), k=length) for length in lengths]  # in no cache
            vectors = {}
            for name, embed in ways.items():
                began = time.monotonic()
                vectors[name] = embed(texts)
                if repetition:  # the first one warms up
                    rates.setdefault(name, []).append(len(texts) / (time.monotonic() - began))
    print(f"{options.texts} texts of {options.tokens} tokens on average, {options.pooling}, {options.dtype}")
    print("                texts/s (lowest-highest)   tokens/s   least cosine with transformers")
    for name, found in rates.items():
        rate = statistics.median(found)
        spread = f"{rate:8.1f} ({min(found):.1f}-{max(found):.1f})"
        cosine = (vectors[name] * vectors["transformers"]).sum(axis=1).min()
        print(f"{name:14}  {spread:>24}   {rate * options.tokens:8.0f}   {cosine:.6f}")


if __name__ == "__main__":
    main()
