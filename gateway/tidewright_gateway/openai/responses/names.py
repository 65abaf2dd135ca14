"""Errors about a chat request, said of the Responses request that it was made of."""

from __future__ import annotations

import re

from tidewright_gateway.openai.errors import ApiError

_NAMES = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
}


def as_sent(error: ApiError) -> ApiError:
    """The same error, with the names of fields as the caller has sent them."""
    for name, own in _NAMES.items():
        if "_" in name:  # else it may be a word
            error.args = (re.sub(rf"\b{name}\b", own, str(error)),)
    param = error.param or ""
    theirs = _NAMES.get(param) or re.sub(r"^(tools\.\d+)\.function\b", r"\1", param)
    if theirs != param:
        error.param = theirs
        error.args = (re.sub(rf"\b{re.escape(param)}\b", theirs, str(error)),)
    return error
