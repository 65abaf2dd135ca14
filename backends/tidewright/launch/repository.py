"""What Triton's model repository says of a model that takes no requests: who unloaded it, or why it can't be loaded."""

from __future__ import annotations

import json

from tidewright.launch.control import CONNECT_TIMEOUT, TroubleError, post
from tidewright.launch.errors import LaunchError

INDEX = "/v2/repository/index"
_UNLOADED = "unloaded"  # Triton's reason
_FURTHER = "decoder_"  # as served_models.decoder_of, which costs an import of pydantic


def is_away(error: TroubleError) -> bool:
    """Triton knows no loaded model of that name."""
    return "unknown model" in str(error)


def why_away(index: bytes, url: str, model: str) -> str:
    """Of Triton's answer to INDEX; empty if it does not say. `url`: Triton's, for what to do."""
    try:
        entry = next(one for one in json.loads(index) if one.get("name") == model)
        state, reason = entry.get("state", ""), entry.get("reason", "")
    except (ValueError, TypeError, AttributeError, StopIteration):
        return ""
    name = model.partition("_")[2]  # of a model beside the first, which has more than one in Triton
    how = (
        f"tidewright model load {name} --url {url}" if name else f"curl -X POST {url}/v2/repository/models/{model}/load"
    )
    again = f"load it again with: {how}"
    if state == "UNLOADING":
        return f"{model} is being unloaded, by request"
    if state != "UNAVAILABLE":
        return ""
    if reason == _UNLOADED:
        return f"{model} was unloaded by request; {again}"
    return f"{model} could not be loaded: {reason}"


def is_unloaded(index: bytes, model: str) -> bool:
    """Of Triton's answer to INDEX: it is not there, and is neither coming nor going."""
    try:
        return all(one.get("state") == "UNAVAILABLE" for one in json.loads(index) if one.get("name") == model)
    except (ValueError, TypeError, AttributeError):
        return False


def is_loading(index: bytes) -> bool:
    """Of Triton's answer to INDEX: some model is being loaded."""
    try:
        return any(one.get("state") == "LOADING" for one in json.loads(index))
    except (ValueError, TypeError, AttributeError):
        return False


def further_decoders(url: str, timeout: float) -> list[str]:
    """Those of models beside the first that are loaded; none if Triton does not say. `timeout` is in seconds."""
    try:
        index = json.loads(post(url + INDEX, {}, timeout))
        return [one["name"] for one in index if one["name"].startswith(_FURTHER) and one.get("state") == "READY"]
    except (LaunchError, ValueError, TypeError, KeyError, AttributeError):
        return []


def explained(error: TroubleError, url: str, model: str) -> LaunchError:
    """The error, with what the repository says if it is that the model is away."""
    if is_away(error):
        try:
            if why := why_away(post(url + INDEX, {}, CONNECT_TIMEOUT), url, model):
                return TroubleError(why)
        except LaunchError:
            pass
    return error
