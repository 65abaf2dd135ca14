"""Clients of the Service tidewright-gateway that stream all the time, and what each of their streams was like."""

from __future__ import annotations

import asyncio
import json
import random
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import httpcore
import httpx

from deployment.kubelet.cluster import Cluster

PORT = 8080
PROMPTS = (
    "The sea is", "A good bread needs", "Once upon a time", "The capital of France",
    "My favourite animal is", "Rain in May", "To build a boat", "The oldest tree",
    "Music makes", "At the end of the day", "A letter to my friend", "Winter in the north",
    "The first computer", "How to cook rice", "Two plus two", "The moon and the stars",
)  # fmt: skip


@dataclass
class Stream:
    """One answer: what came of it, and when (seconds since it was asked for)."""

    prompt: str
    text: str = ""
    error: str = ""
    finish: str = ""
    times: list[float] = field(default_factory=list)
    began_at: float = 0.0
    """On the monotonic clock."""
    closes: bool = False
    """Its gateway said that this connection ends with it."""

    @property
    def longest_gap(self) -> float:
        return max((after - before for before, after in zip(self.times, self.times[1:], strict=False)), default=0.0)


class Load:
    """As many clients as there are prompts, each with one connection, which it keeps as long as its gateway does.

    A new connection goes to any gateway that is ready at that moment, as through a Service's address; an open one stays
    where it is. Nothing is retried: each failure is seen. `pause`: seconds of each client between two streams, on
    average.
    """

    def __init__(
        self, cluster: Cluster, key: str, prompts: Iterable[str] = PROMPTS, max_tokens: int = 48, pause: float = 0.0
    ) -> None:
        self._cluster, self._prompts, self._max_tokens, self._pause = cluster, list(prompts), max_tokens, pause
        self._headers = {"Authorization": f"Bearer {key}", "Cache-Control": "no-store"}
        self.done: list[Stream] = []
        self._begun: dict[str, Stream] = {}
        self._over = False
        self._rounds: int | None = None
        self._thread = threading.Thread(target=self._run, name="load", daemon=True)

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Ends when the streams that run have ended."""
        self._over = True
        self._thread.join()

    def once(self) -> list[Stream]:
        """A stream of each prompt, at once; returns when all have ended."""
        self._rounds = 1
        with self:
            self._thread.join()
        return self.done

    @property
    def running(self) -> int:
        """How many streams are between their first token and their last."""
        return sum(bool(stream.times) and not stream.finish for stream in list(self._begun.values()))

    @property
    def failed(self) -> list[Stream]:
        return [stream for stream in list(self.done) if stream.error]

    def _run(self) -> None:
        with self._cluster.network.node.inside():
            asyncio.run(self._run_all())

    async def _run_all(self) -> None:
        await asyncio.gather(*map(self._client, self._prompts))

    async def _client(self, prompt: str) -> None:
        transport = httpx.AsyncHTTPTransport()
        transport._pool = httpcore.AsyncConnectionPool(network_backend=_Balanced(self._endpoint), max_connections=1)
        async with httpx.AsyncClient(transport=transport, base_url="http://tidewright-gateway", timeout=120) as client:
            rounds = 0
            while not self._over and rounds != self._rounds:
                rounds += 1
                stream = self._begun[prompt] = Stream(prompt, began_at=time.monotonic())
                try:
                    await self._generate(client, stream)
                except (httpx.HTTPError, OSError, ValueError) as error:
                    stream.error = f"{type(error).__name__}: {error}"
                self.done.append(stream)
                pause = random.uniform(0, 2 * self._pause)  # so that they do not go in step
                await asyncio.sleep(max(pause, 0.2 if stream.error else 0.0))

    async def _generate(self, client: httpx.AsyncClient, stream: Stream) -> None:
        body: dict[str, Any] = {"model": "smollm2-135m", "prompt": stream.prompt, "max_tokens": self._max_tokens}
        body |= {"stream": True, "temperature": 0, "ignore_eos": True}
        async with client.stream("POST", "/v1/completions", json=body, headers=self._headers) as answer:
            stream.closes = answer.headers.get("connection", "").lower() == "close"
            if answer.status_code != 200:
                stream.error = f"{answer.status_code}: {(await answer.aread()).decode()}"
                return
            is_done = False
            async for line in answer.aiter_lines():
                if not line.startswith("data: "):
                    continue
                if line == "data: [DONE]":
                    is_done = True
                    continue
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    stream.error = json.dumps(event["error"])
                for choice in event.get("choices", ()):
                    stream.times.append(time.monotonic() - stream.began_at)
                    stream.text += choice["text"]
                    stream.finish = choice["finish_reason"] or stream.finish
            if not is_done and not stream.error:
                stream.error = "the stream ended without [DONE]"

    def _endpoint(self) -> str:
        found = self._cluster.endpoints("tidewright-gateway")
        if not found:
            raise httpcore.ConnectError("no gateway is ready")
        return random.choice(found)


class _Balanced(httpcore.AsyncNetworkBackend):
    """Connects to what `choose` says, whatever the name."""

    def __init__(self, choose: Callable[[], str]) -> None:
        self._choose, self._backend = choose, httpcore.AnyIOBackend()

    async def connect_tcp(self, host: str, port: int, *args: Any, **options: Any) -> httpcore.AsyncNetworkStream:
        return await self._backend.connect_tcp(self._choose(), PORT, *args, **options)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
