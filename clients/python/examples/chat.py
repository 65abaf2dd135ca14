"""A whole answer: python examples/chat.py"""

from tidewright_client import Client

with Client() as client:  # TIDEWRIGHT_URL and TIDEWRIGHT_KEY
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Name three fruits."}]
    answer = client.chat(messages, model="smollm2-135m", max_tokens=32)
    print(answer.text)
    if answer.usage:  # a gateway always tells it
        print(answer.finish_reason, answer.usage.total_tokens, "tokens")
