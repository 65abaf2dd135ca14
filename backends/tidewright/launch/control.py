"""Asks a running server about itself: the decoders' `control` input, and whether its stubs live. HTTP only."""

from __future__ import annotations

from typing import Any

import httpx

from tidewright.launch.errors import LaunchError
from tidewright.schema import ControlWord


class UnreachableError(LaunchError):
    """Nobody listens there, or the connection broke."""


class NoAnswerError(LaunchError):
    """The connection stands, but nothing came in time."""


class DeadStubError(LaunchError):
    """The Python process of a model is gone. Triton does not start another."""


class TroubleError(LaunchError):
    """The server answered, and the answer is no."""


def control(url: str, word: ControlWord, timeout: float, model: str = "decoder") -> None:
    """Returns if the answer is yes; raises one of the errors above. `timeout` is in seconds."""
    post(f"{url}/v2/models/{model}/generate", {"control": word}, timeout)


def probe_tokenizer(url: str, timeout: float) -> None:
    """Raises as `control`."""
    inputs = [{"name": "text_input", "shape": [1, 1], "datatype": "BYTES", "data": ["a"]}]
    post(f"{url}/v2/models/tokenizer/infer", {"inputs": inputs}, timeout)


def post(url: str, body: dict[str, Any], timeout: float) -> None:
    try:
        # The connection must not stay: Triton waits for idle ones when it ends.
        headers = {"Connection": "close"}
        response = httpx.post(url, json=body, timeout=timeout, headers=headers, trust_env=False)
    except httpx.ReadTimeout:
        raise NoAnswerError(f"{url} did not answer within {timeout:g} s") from None
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise UnreachableError(f"can't reach {url}: {error}") from None
    if response.status_code == 200:
        return
    try:
        message = str(response.json()["error"])
    except (ValueError, KeyError, TypeError):
        message = f"{url} answered with status {response.status_code}; is it a Tidewright server?"
    raise DeadStubError(message) if "Stub process" in message else TroubleError(message)
