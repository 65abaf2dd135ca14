"""Leaving a stream ends it in the server too: python examples/cancel.py"""

from tidewright_client import Client

with Client(model="smollm2-135m") as client:
    messages = [{"role": "user", "content": "Count to a thousand."}]
    # The end of the `with` closes the connection: the server stops within two steps.
    with client.stream_chat(messages, max_tokens=1000, timeout=60) as stream:
        for _ in stream:
            if len(stream.answer().text) > 20:
                break
    print(stream.answer().text, "...")
