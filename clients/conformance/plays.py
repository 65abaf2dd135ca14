"""What the scripted gateway writes for an exchange of a vector, as steps: bytes, or an object that says what to do."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

Step = bytes | dict[str, Any]
FLOOD_EVENT = 1000  # characters of text in an event of a flood
REASONS = {200: "OK", 302: "Found", 307: "Temporary Redirect"}


def head_of(exchange: dict[str, Any], elsewhere: str, length: int | None) -> bytes:
    """The head of the answer; a body without a length is chunked."""
    status = exchange.get("status", 200)
    plain = {"Content-Type": "application/json" if length is not None else "text/event-stream"}
    plain |= {"X-Request-Id": "scripted-1"}
    plain |= {"Transfer-Encoding": "chunked"} if length is None else {"Content-Length": str(length)}
    headers = plain | {
        name: value.replace("{elsewhere}", elsewhere) for name, value in exchange.get("headers", {}).items()
    }
    lines = [
        f"HTTP/1.1 {status} {REASONS.get(status, 'Scripted')}",
        *(f"{name}: {value}" for name, value in headers.items()),
    ]
    return "\r\n".join([*lines, "", ""]).encode()


def body_of(exchange: dict[str, Any], api: str) -> bytes | None:
    """The body of an answer that is no stream; None if it is one."""
    if "error" in exchange:
        return json.dumps(error(exchange["error"], exchange.get("status", 200))).encode()
    if "answer" in exchange:
        return json.dumps(answer(exchange["answer"], api)).encode()
    if "json" in exchange:
        return json.dumps(exchange["json"]).encode()
    return exchange["text"].encode() if "text" in exchange else None


def steps_of(exchange: dict[str, Any], api: str) -> Iterator[Step]:
    """Of a stream."""
    for item in exchange.get("events", []):
        yield event(item, api)
    for step in exchange.get("raw", []):
        yield from _steps(step, api)


def _steps(step: Any, api: str) -> Iterator[Step]:
    if isinstance(step, str):
        yield step.encode()
    elif "hex" in step:
        yield bytes.fromhex(step["hex"])
    elif "event" in step:
        yield event(step["event"], api)
    elif "flood" in step:
        for _ in range(step["flood"] // FLOOD_EVENT):
            yield event({"text": "x" * FLOOD_EVENT}, api)
    elif "times" in step:
        for _ in range(step["times"]):
            for one in step["steps"]:
                yield from _steps(one, api)
    else:
        yield step


def error(told: dict[str, Any], status: int) -> dict[str, Any]:
    kind = "rate_limit_error" if status == 429 else "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": "scripted", "type": kind, "param": None, "code": "scripted"} | told}


def usage(told: list[int]) -> dict[str, int]:
    return {"prompt_tokens": told[0], "completion_tokens": told[1], "total_tokens": sum(told)}


def answer(told: dict[str, Any], api: str) -> dict[str, Any]:
    text = "x" * told["big"] if "big" in told else told.get("text", "")
    choice: dict[str, Any] = {"index": 0, "finish_reason": told.get("finish", "stop")}
    choice |= {"ended_by": told["ended_by"]} if "ended_by" in told else {}
    if api == "chat":
        calls = {"tool_calls": told["tool_calls"]} if "tool_calls" in told else {}
        choice["message"] = {"role": "assistant", "content": text} | calls
    else:
        choice["text"] = text
    kind = "chat.completion" if api == "chat" else "text_completion"
    made = {"id": "scripted-1", "object": kind, "created": 1, "model": "scripted", "served_by": "decoder"}
    return made | {"choices": [choice], "usage": usage(told.get("usage", [3, 2]))}


def event(told: dict[str, Any], api: str) -> bytes:
    return f"data: {data(told, api)}\n\n".encode()


def data(told: dict[str, Any], api: str) -> str:
    if "data" in told:
        return told["data"] if isinstance(told["data"], str) else json.dumps(told["data"])
    if "error" in told:
        return json.dumps(error(told["error"], told["error"].get("status", 500)))
    kind = "chat.completion.chunk" if api == "chat" else "text_completion"
    made = {"id": "scripted-1", "object": kind, "created": 1, "model": "scripted"}
    if "usage" in told:
        return json.dumps(made | {"choices": [], "usage": usage(told["usage"]), "served_by": "decoder"})
    choice: dict[str, Any] = {"index": 0, "finish_reason": told.get("finish")}
    choice |= {"ended_by": told["ended_by"]} if "ended_by" in told else {}
    if api == "complete":
        choice["text"] = told.get("text", "")
    else:
        text = {"content": told["text"]} if "text" in told else {}
        choice["delta"] = text | ({"tool_calls": [told["tool"]]} if "tool" in told else {})
    return json.dumps(made | {"choices": [choice]})
