"""Is the target what the test is meant for? Asked once, before the load: one line instead of thousands of errors."""

from __future__ import annotations

import contextlib
import ssl
from typing import Any
from urllib.parse import urlsplit

import httpx
import msgspec

from loadtests.options import Options

PATIENCE = 10.0  # seconds
MAX_SHOWN = 120


class TargetError(Exception):
    """The target can't be tested; the message says what to change."""


def check(options: Options) -> Options:
    """The options, with the model's name filled in.

    Raises:
        TargetError: a protocol's endpoint does not answer as it should, a key is refused, the model is not served.
    """
    if options.protocols.keys() & {"http", "websocket"}:
        options = _check_gateway(options)
    if "websocket" in options.protocols:
        _check_websocket(options)
    if "grpc" in options.protocols:
        _check_triton(options)
    return options


def _check_gateway(options: Options) -> Options:
    parts = urlsplit(options.url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise TargetError(f"--url must be like http://127.0.0.1:8080, not {options.url!r}")
    served: list[str] = []
    for number, key in enumerate(options.keys, 1):
        answer = _ask(options.url, key)
        which = f"key {number} of {len(options.keys)}" if len(options.keys) > 1 else "the key"
        if answer.status_code in (401, 403):
            raise TargetError(
                f"{options.url} refuses {which if key else 'requests without a key'}: give --key or --keys-file"
            )
        with contextlib.suppress(ValueError, KeyError, TypeError):
            served = [str(model["id"]) for model in answer.json()["data"]]
        if answer.status_code != 200 or not served:
            raise TargetError(
                f"{options.url} is no OpenAI-compatible API: GET /v1/models gave status {answer.status_code} "
                f"and {answer.text[:MAX_SHOWN]!r}. Is it the gateway's port?"
            )
    model = options.model or served[0]
    if model not in served:
        raise TargetError(f"{options.url} does not serve {model!r}; it serves {', '.join(served[:10])}")
    return msgspec.structs.replace(options, model=model)


def _ask(url: str, key: str) -> httpx.Response:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        return httpx.get(f"{url.rstrip('/')}/v1/models", headers=headers, timeout=PATIENCE, trust_env=False)
    except (httpx.InvalidURL, UnicodeError) as error:
        raise TargetError(f"--url {url!r} is no URL: {error}") from None
    except httpx.ConnectError as error:
        cause: BaseException | None = error
        while cause and not isinstance(cause, ssl.SSLError):
            cause = cause.__cause__ or cause.__context__
        if cause or "SSL" in str(error):
            raise TargetError(
                f"{url}: TLS failed ({error}). Is it https, and is its certificate trusted here?"
            ) from None
        raise TargetError(f"nothing answers at {url} ({error}). Is the server up, are host and port right?") from None
    except httpx.TimeoutException:
        raise TargetError(f"{url} did not answer GET /v1/models within {PATIENCE:g} s") from None
    except httpx.TransportError as error:
        raise TargetError(f"{url} does not speak HTTP ({error}). Is it the gateway's port?") from None


def _check_websocket(options: Options) -> None:
    from websockets.exceptions import WebSocketException
    from websockets.sync.client import connect

    url = "ws" + options.url.removeprefix("http").rstrip("/") + "/v1/stream"
    opening: dict[str, Any] = {"type": "open"}
    if options.keys[0]:
        opening["token"] = options.keys[0]
    try:
        with connect(url, open_timeout=PATIENCE, proxy=None) as stream:
            stream.send(msgspec.json.encode(opening).decode())
            message = msgspec.json.decode(stream.recv(timeout=PATIENCE))
    except (WebSocketException, OSError, TimeoutError, msgspec.DecodeError) as error:
        raise TargetError(f"{url} takes no WebSocket of the gateway's: {error}") from None
    if message.get("type") != "opened":
        raise TargetError(f"{url} refused the connection: {message.get('message', message)}")


def _check_triton(options: Options) -> None:
    import grpc
    from tritonclient.grpc import service_pb2, service_pb2_grpc

    if not options.grpc:
        raise TargetError("the protocol grpc needs --grpc HOST:PORT, of Triton")
    with grpc.insecure_channel(options.grpc) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        question = service_pb2.ModelReadyRequest(name=options.triton_model)
        try:
            is_ready = stub.ModelReady(question, timeout=PATIENCE).ready
        except grpc.RpcError as error:
            raise TargetError(
                f"no Triton answers gRPC at {options.grpc}: {error.code().name}, {(error.details() or '')[:MAX_SHOWN]}"
            ) from None
    if not is_ready:
        raise TargetError(f"the Triton at {options.grpc} has no model {options.triton_model!r} that is ready")
