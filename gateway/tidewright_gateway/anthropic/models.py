"""The served models as Anthropic's API lists them."""

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


def model_list(infos: list[dict[str, Any]], limit: int, after_id: str | None, before_id: str | None) -> dict[str, Any]:
    """A page: at most `limit`, behind the model `after_id`, or ahead of `before_id`. Of an unknown one, none."""
    ids = [info["id"] for info in infos]
    if after_id is not None:
        infos = infos[ids.index(after_id) + 1 :] if after_id in ids else []
    if before_id is not None:
        infos = [info for info in infos if before_id in ids and ids.index(info["id"]) < ids.index(before_id)]
    has_more = len(infos) > limit
    infos = infos[-limit:] if before_id is not None else infos[:limit]
    first, last = (infos[0]["id"], infos[-1]["id"]) if infos else (None, None)
    return {"data": infos, "has_more": has_more, "first_id": first, "last_id": last}
