"""The served model as Anthropic's API lists it."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any


def model_info(name: str, max_model_len: int, created: int) -> dict[str, Any]:
    """`created`: in seconds since 1970."""
    return {
        "type": "model",
        "id": name,
        "display_name": name,
        "created_at": datetime.fromtimestamp(created, timezone.utc).isoformat().replace("+00:00", "Z"),
        "lifecycle": "active",
        "max_input_tokens": max_model_len,
        "max_tokens": max_model_len,
    }


def model_list(info: dict[str, Any]) -> dict[str, Any]:
    return {"data": [info], "has_more": False, "first_id": info["id"], "last_id": info["id"]}
