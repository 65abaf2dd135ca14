"""Two generations over one WebSocket, which goes on by itself when it breaks: python examples/session.py"""

from tidewright_client import Client, Text

with Client(model="smollm2-135m") as client, client.session() as session:
    fruits = session.stream_chat([{"role": "user", "content": "Name three fruits."}], max_tokens=32)
    story = session.stream_complete("Once upon a time", max_tokens=64, credits=16)
    for event in story:
        if isinstance(event, Text):
            print(event.text, end="", flush=True)
        if len(story.answer().text) > 60:
            story.cancel()
    print()
    list(fruits)  # it ran meanwhile
    print(fruits.answer().text)
