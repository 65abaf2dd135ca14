"""What is wrong with keys: of a request, or of the configuration."""

from __future__ import annotations

from tidewright_gateway.openai.errors import ApiError

MISSING = "missing API key; send the header Authorization: Bearer <key> or x-api-key: <key>"
WRONG = "invalid API key or token"


class AuthSetupError(Exception):
    """Keys can't be read or written; the message says where, and holds nothing secret."""


def unauthorized(message: str) -> ApiError:
    return ApiError(401, message, code="invalid_api_key")
