"""How an answer is written: comments during silence, and none for a client that takes nothing."""

from __future__ import annotations

import asyncio

from starlette.types import Message

from tidewright_gateway.openai.exchange import KEEP_ALIVE, _Writer


def test_one_comment_at_most_waits_for_a_client_that_takes_nothing() -> None:
    async def run() -> None:
        sent, takes = list[Message](), asyncio.Event()

        async def send(message: Message) -> None:
            sent.append(message)
            await takes.wait()

        writer = _Writer(send, 0.001)
        writer.keep_alive()
        while not sent:
            await asyncio.sleep(0.001)
        for _ in range(20):  # in each of which another one would be due
            await asyncio.sleep(0.002)
        assert [message["type"] for message in sent] == ["http.response.start"]
        takes.set()
        while len(sent) < 3:  # the first comment, and the next
            await asyncio.sleep(0.001)
        assert [message["body"] for message in sent[1:3]] == [KEEP_ALIVE] * 2
        writer.close()

    asyncio.run(run())
