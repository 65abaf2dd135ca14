"""From a request's Authorization header to who calls."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from tidewright_gateway.auth.callers import ANONYMOUS, Caller, Role
from tidewright_gateway.auth.errors import MISSING, WRONG, unauthorized
from tidewright_gateway.auth.keyring import Keyring
from tidewright_gateway.auth.keys import KEY_PREFIX
from tidewright_gateway.auth.stores import open_store
from tidewright_gateway.config import GatewaySettings
from tidewright_gateway.openai.errors import ApiError

if TYPE_CHECKING:
    from tidewright_gateway.auth.tokens import TokenChecker

_LONGEST = 8192  # characters; nothing longer is a token


def credential_of(headers: Mapping[bytes, bytes]) -> str | None:
    """What a request gives for a key, as the Authorization header has it; None if it gives nothing.

    Clients of other APIs send theirs with x-api-key or api-key.
    """
    if given := headers.get(b"authorization"):
        return given.decode("latin-1")
    given = headers.get(b"x-api-key") or headers.get(b"api-key")
    return f"Bearer {given.decode('latin-1')}" if given else None


class Authenticator:
    def __init__(self, settings: GatewaySettings) -> None:
        """Reads keys and JWKS. AuthSetupError: they can't be read."""
        self._parts: list[Keyring | TokenChecker] = []
        if settings.keys:
            self._parts.append(Keyring(open_store(settings.keys), is_alone=not settings.jwt_jwks))
        if settings.jwt_jwks:
            from tidewright_gateway.auth.tokens import TokenChecker  # slow to import

            self._parts.append(
                TokenChecker(settings.jwt_jwks, settings.jwt_issuer, settings.jwt_audience, settings.jwt_role_claim)
            )

    async def start(self) -> None:
        """From now on keys that change are noticed."""
        for part in self._parts:
            part.start()

    async def stop(self) -> None:
        for part in self._parts:
            await part.stop()

    @property
    def asks_for_keys(self) -> bool:
        return bool(self._parts)

    @property
    def trouble(self) -> str:
        """Why keys that changed lately may not be seen; empty if they are."""
        return "; ".join(part.trouble for part in self._parts if part.trouble)

    @property
    def has_no_keys(self) -> bool:
        """The key store is empty, although somebody needs its keys."""
        return any(part.is_empty for part in self._parts if isinstance(part, Keyring))

    @property
    def next_expiry(self) -> float:
        """When the next of the API keys expires, in Unix time; 0 if none is to expire."""
        found = [part.next_expiry for part in self._parts if isinstance(part, Keyring)]
        return max(found, default=0.0)

    async def caller(self, authorization: str | None) -> Caller:
        """Who sent this header; ANONYMOUS, if neither keys nor JWTs are asked for.

        Raises:
            ApiError: 401, no key or one that is not good.
        """
        if not self._parts:
            return ANONYMOUS
        scheme, _, credential = (authorization or "").strip().partition(" ")
        credential = credential.strip()
        if scheme.lower() != "bearer" or not credential:
            raise unauthorized(MISSING)
        if len(credential) > _LONGEST or not credential.isascii():
            raise unauthorized(WRONG)
        return await self._parts[0 if credential.startswith(KEY_PREFIX) else -1].caller(credential)


def require_admin(caller: Caller) -> None:
    """Raises ApiError, 403: its role is another."""
    if caller.role is not Role.ADMIN:
        raise ApiError(403, "this requires a key with the role admin", code="admin_required")
