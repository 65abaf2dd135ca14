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


def model_list(infos: list[dict[str, Any]]) -> dict[str, Any]:
    first, last = (infos[0]["id"], infos[-1]["id"]) if infos else (None, None)
    return {"data": infos, "has_more": False, "first_id": first, "last_id": last}
