"""What can go wrong, and what to do: python examples/errors_and_retries.py"""

from tidewright_client import Client, NotFound, RateLimited, TidewrightError, TimedOut, Unavailable

# Overload and broken connections are retried while nothing of the answer has come.
with Client(max_retries=4, timeout=60) as client:
    messages = [{"role": "user", "content": "Name three fruits."}]
    try:
        print(client.chat(messages, model="gpt-9", max_tokens=32).text)
    except NotFound as error:
        print("no such model:", error, error.code, client.models())
    except RateLimited as error:
        print("ask again in", error.retry_after, "seconds")
    except (TimedOut, Unavailable):
        print("busy: ask again later")
    except TidewrightError as error:
        raise SystemExit(error.message) from None  # it says what to change
