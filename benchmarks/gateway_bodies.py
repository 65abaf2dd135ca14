"""How long a body that is hard to read stops the gateway's event loop, and how much memory it takes."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import psutil

from benchmarks.gateway_load import HttpClient, post
from benchmarks.gateway_parts import MODEL, PER_RESPONSE, Row, echoes, gateway, show

MIB = 2**20
BODY = 2 * MIB - 4096  # bytes; the longest that is taken by default
MOST_STALL, MOST_GROWTH = 50, 20  # ms, and times the body's size
PAUSE = 0.001  # seconds between two questions to the gateway


def _repeated(head: str, item: str, tail: str, last: str = "") -> bytes:
    return f"{head}{item * ((BODY - len(head) - len(tail) - len(last)) // len(item))}{last}{tail}".encode()


def _cases() -> dict[str, tuple[str, bytes]]:
    """Path and body."""
    completion, chat = (
        f'{{"model":"{MODEL}","max_tokens":8,"prompt":',
        f'{{"model":"{MODEL}","max_tokens":8,"messages":',
    )
    message = '{"role":"user","content":"a"},'
    messages = message * 8000
    return {
        "a million ints, the last a float": ("/v1/completions", _repeated(completion + "[", "1,", "]}", "1.5")),
        "195 KiB of ints, the last a float": ("/v1/completions", f"{completion}[{'1,' * 100_000}1.5]}}".encode()),
        "8191 ints": ("/v1/completions", f"{completion}[{'1,' * 8190}1]}}".encode()),
        "lists of ints": ("/v1/completions", _repeated(completion + "[", f"[{'1,' * 4000}1],", "]}", "[1]")),
        "empty lists": ("/v1/completions", _repeated(completion + "[", "[],", "]}", "[]")),
        "zeros for messages": ("/v1/chat/completions", _repeated(chat + "[", "0,", "]}", "0")),
        "8000 messages": ("/v1/chat/completions", f"{chat}[{messages[:-1]}]}}".encode()),
        "all messages that fit": ("/v1/chat/completions", _repeated(chat + "[", message, "]}", message[:-1])),
        "unknown fields": ("/v1/completions", _repeated('{"a":1,', '"b":1,', "}", '"c":1')),
        "2 MiB of text": ("/v1/completions", _repeated(completion + '"', "word ", '"}')),
        "100 KB of text": ("/v1/completions", f'{completion}"{"word " * 20_000}"}}'.encode()),
        "a deep schema": (
            "/v1/completions",
            f'{completion}"a","guided_json":{"[" * 40_000}{"]" * 40_000}}}'.encode(),
        ),
        "a wide schema": (
            "/v1/completions",
            json.dumps({"model": MODEL, "prompt": "a", "guided_json": {f"{n}": [] for n in range(40_000)}}).encode(),
        ),
        "detokenize": ("/detokenize", _repeated('{"tokens":[', "1,", "]}", "1.5")),
        "tokenize": ("/tokenize", _repeated('{"prompt":"', "xe ", '"}')),
    }


async def _longest_gap(client: HttpClient, done: asyncio.Event) -> float:
    """Seconds that an answer to a question took, at most, that costs nothing."""
    longest = 0.0
    while not done.is_set():
        began = time.perf_counter()
        await client.get("/health/live")
        longest = max(longest, time.perf_counter() - began)
        await asyncio.sleep(PAUSE)
    return longest


async def _peak(process: psutil.Process, done: asyncio.Event) -> int:
    before, most = process.memory_info().rss, 0
    while not done.is_set():
        most = max(most, process.memory_info().rss)
        await asyncio.sleep(PAUSE)
    return most - before


async def bodies() -> None:
    rows: list[Row] = []
    with echoes() as (echo,), gateway([echo.url]) as running:
        process = psutil.Process(running.pid)
        for name, (path, body) in _cases().items():
            asker, other, done = HttpClient(running.port), HttpClient(running.port), asyncio.Event()
            await other.get("/health/live")
            watch: list[asyncio.Task[Any]] = [
                asyncio.create_task(_longest_gap(other, done)),
                asyncio.create_task(_peak(process, done)),
            ]
            await asyncio.sleep(0.05)
            began = time.perf_counter()
            answer = await asker.send(post(body, path))
            seconds = time.perf_counter() - began
            done.set()
            gap, growth = await watch[0], await watch[1]
            times = growth / len(body)
            is_met = gap * 1000 <= MOST_STALL and (times <= MOST_GROWTH or growth < 8 * MIB)
            measured = f"{answer.status}: {seconds * 1000:.0f} ms, stall {gap * 1000:.0f} ms, {growth / MIB:+.1f} MiB"
            rows.append(
                Row(f"{name} ({len(body) / 1024:.0f} KiB)", measured, f"{MOST_STALL} ms, x{MOST_GROWTH}", is_met)
            )
            asker.close()
            other.close()
    show(f"bodies that are hard to read, answers of {PER_RESPONSE} tokens", rows)
