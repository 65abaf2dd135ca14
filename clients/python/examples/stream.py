"""An answer as it is generated, with asyncio: python examples/stream.py"""

import asyncio

from tidewright_client import AsyncClient, Text


async def main() -> None:
    messages = [{"role": "user", "content": "Name three fruits."}]
    async with AsyncClient(model="smollm2-135m") as client:
        async with client.stream_chat(messages, max_tokens=32) as stream:
            async for event in stream:
                if isinstance(event, Text):
                    print(event.text, end="", flush=True)
        print("\n", stream.answer().usage)


asyncio.run(main())
