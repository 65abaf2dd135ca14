"""Reads what Anthropic's Messages API writes: server-sent events, and the Message that they build."""

from __future__ import annotations

import json
from typing import Any

Events = list[tuple[str, dict[str, Any]]]


def events_of(stream: str) -> Events:
    """Name and data of each event; comments are dropped."""
    found = []
    for block in stream.split("\n\n"):
        lines = [line for line in block.split("\n") if line and not line.startswith(":")]
        if lines:
            name, data = lines
            assert name.startswith("event: ")
            assert data.startswith("data: ")
            found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


def reduced(events: Events) -> dict[str, Any]:
    """The Message that a client builds of the events; asserts their documented order."""
    (first, start), *blocks, (delta, ending), (last, _) = events
    assert (first, delta, last) == ("message_start", "message_delta", "message_stop")
    message = start["message"]
    assert message["content"] == []
    texts: list[str] = []
    is_open = False
    for name, data in blocks:
        assert data["type"] == name
        assert data["index"] == len(message["content"]) - (name != "content_block_start")
        assert is_open == (name != "content_block_start")
        if name == "content_block_start":
            message["content"].append(data["content_block"])
            texts.append("")
            is_open = True
        elif name == "content_block_delta":
            kind, text = data["delta"].values()
            block = message["content"][-1]["type"]
            assert (block, kind) in (
                ("text", "text_delta"),
                ("thinking", "thinking_delta"),
                ("tool_use", "input_json_delta"),
            )
            assert text
            texts[-1] += text
        else:
            assert name == "content_block_stop"
            is_open = False
    assert not is_open
    for block, text in zip(message["content"], texts, strict=True):
        if block["type"] == "tool_use":
            block["input"] = json.loads(text or "{}")
        else:
            block[block["type"]] += text
    return {**message, **ending["delta"], "usage": ending["usage"]}


def without_ids(message: dict[str, Any]) -> dict[str, Any]:
    """Ids are new in each answer."""
    content = [{name: value for name, value in block.items() if name != "id"} for block in message["content"]]
    return {**{name: value for name, value in message.items() if name != "id"}, "content": content}
