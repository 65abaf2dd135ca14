"""JWTs of an OpenID provider as bearer tokens: signed by one of its keys, for this gateway, and not expired."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import jwt
import msgspec
from cachetools import LRUCache

from tidewright_gateway.auth.callers import Caller, Role
from tidewright_gateway.auth.errors import WRONG, AuthSetupError, unauthorized
from tidewright_gateway.trouble import KEYS, Trouble

log = logging.getLogger(__name__)

# Only what a key of this type signs: a token that names another algorithm than its key's is forged. No HMAC, whose
# secret would be the public key.
_ALGORITHMS = {
    "RSA": ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512"),
    "EC": ("ES256", "ES384", "ES512"),
    "OKP": ("EdDSA",),
}
_FETCH_TIMEOUT = 5.0  # seconds
_REFRESH_INTERVAL = 300.0  # seconds; a key that the provider withdraws is good for no longer
UNKNOWN_INTERVAL = 10.0  # seconds between fetches that unknown keys cause: anyone can name one
LEEWAY = 60.0  # seconds that clocks may differ, of exp, nbf and iat
MOST_KNOWN = 10_000  # tokens that are remembered
_LONGEST_SUBJECT = 255  # characters, as OpenID Connect has it


class _Key(msgspec.Struct, frozen=True):
    public: Any
    algorithms: tuple[str, ...]


_Keys = Mapping[str | None, _Key]


class TokenChecker:
    def __init__(self, jwks: str, issuer: str, audience: str, role_claim: str) -> None:
        """Fetches the keys. AuthSetupError: that fails."""
        self._jwks, self._issuer, self._audience, self._role_claim = jwks, issuer, audience, role_claim
        self._keys = _fetch(jwks)
        self._fetched_at = time.monotonic()
        self._trouble = Trouble(log, "JWT keys are loaded again", "keeping the previously loaded JWT keys: ", KEYS)
        # Tokens that were verified, by their hash, and until when they are valid.
        self._known: LRUCache[bytes, tuple[Caller, float]] = LRUCache(MOST_KNOWN)
        self._fetching: asyncio.Task[None] | None = None
        self._refreshing: asyncio.Task[None] | None = None

    @property
    def trouble(self) -> str:
        """Why the keys in force may not be the provider's any more; empty if they are."""
        return self._trouble.text

    def start(self) -> None:
        self._refreshing = asyncio.create_task(self._refresh_regularly())

    async def stop(self) -> None:
        tasks = [task for task in (self._refreshing, self._fetching) if task]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def caller(self, token: str) -> Caller:
        """Raises ApiError, 401: the token is forged, expired or meant for others."""
        digest = hashlib.blake2b(token.encode(), digest_size=32).digest()
        caller, good_until = self._known.get(digest, (None, 0.0))
        if caller and time.time() < good_until:
            return caller
        try:
            kid = jwt.get_unverified_header(token).get("kid")
            key = self._key(kid)
            if key is None:
                await self._refresh_for_unknown()
                key = self._key(kid)
            if key is None:
                raise unauthorized(WRONG)
            claims = jwt.decode(
                token,
                key.public,
                algorithms=list(key.algorithms),
                issuer=self._issuer,
                audience=self._audience,
                leeway=LEEWAY,
                options={"require": ["exp", "iss", "aud", "sub"]},
            )
            good_until = int(claims["exp"]) + LEEWAY
        except jwt.ExpiredSignatureError:
            raise unauthorized("this token has expired") from None
        except jwt.ImmatureSignatureError:
            raise unauthorized(
                "this token is not valid yet; do the clocks of its issuer and this server agree?"
            ) from None
        except (jwt.InvalidAudienceError, jwt.InvalidIssuerError):
            raise unauthorized("this token has the wrong issuer or audience") from None
        except jwt.MissingRequiredClaimError as error:
            raise unauthorized(f"this token has no {error.claim}; it needs exp, iss, aud and sub") from None
        except jwt.PyJWTError:
            raise unauthorized(WRONG) from None
        except (ValueError, TypeError, OverflowError):  # of numbers in which PyJWT does not expect them
            raise unauthorized(WRONG) from None
        subject = claims["sub"]
        if not 0 < len(subject) <= _LONGEST_SUBJECT:
            raise unauthorized(f"this token's sub must have 1 to {_LONGEST_SUBJECT} characters")
        caller = Caller(f"jwt:{subject}", self._role(claims))
        self._known[digest] = caller, good_until
        return caller

    def _role(self, claims: Mapping[str, Any]) -> Role:
        """Roles of other systems are not ours: what doesn't say admin may use, and no more."""
        value = claims.get(self._role_claim)
        roles = value if isinstance(value, list) else [value]
        return Role.ADMIN if Role.ADMIN.value in roles else Role.USE

    def _key(self, kid: str | None) -> _Key | None:
        if kid is None and len(self._keys) == 1:
            return next(iter(self._keys.values()))
        return self._keys.get(kid)

    async def _refresh_for_unknown(self) -> None:
        if self._fetching is None:
            if time.monotonic() < self._fetched_at + UNKNOWN_INTERVAL:
                return
            self._fetching = asyncio.create_task(self._refresh())
        await asyncio.shield(self._fetching)  # others may wait for it as well

    async def _refresh_regularly(self) -> None:
        while True:
            await asyncio.sleep(_REFRESH_INTERVAL)
            await self._refresh()

    async def _refresh(self) -> None:
        try:
            keys = await asyncio.to_thread(_fetch, self._jwks)
            if self._keys != keys:
                self._keys = keys
                self._known.clear()  # a key may have been withdrawn
            self._trouble.note("")
        except Exception as error:  # whatever it is, a key that is withdrawn later must be seen
            known = isinstance(error, AuthSetupError)
            self._trouble.note(str(error) if known else f"jwt_jwks {self._jwks}: {error!r}")
        finally:
            self._fetched_at, self._fetching = time.monotonic(), None


def _fetch(jwks: str) -> _Keys:
    try:
        if "://" in jwks:
            content = httpx.get(jwks, timeout=_FETCH_TIMEOUT).raise_for_status().content
        else:
            content = Path(jwks).read_bytes()
        found = msgspec.json.decode(content, type=dict[str, Any])["keys"]
        keys = {data.get("kid"): key for data in found if (key := _usable(data))}
    except (OSError, httpx.HTTPError, httpx.InvalidURL) as error:
        raise AuthSetupError(f"jwt_jwks {jwks}: {error}") from None
    except (msgspec.MsgspecError, UnicodeDecodeError, LookupError, TypeError, AttributeError, RecursionError):
        raise AuthSetupError(f'jwt_jwks {jwks}: not a JWKS, which looks like {{"keys": [...]}}') from None
    if not keys:
        raise AuthSetupError(f"jwt_jwks {jwks}: has no RSA, EC or Ed25519 key for signatures")
    return keys


def _usable(data: Mapping[str, Any]) -> _Key | None:
    algorithms = _ALGORITHMS.get(str(data.get("kty")), ())
    if named := data.get("alg"):
        algorithms = tuple(name for name in algorithms if name == named)
    if not algorithms or data.get("use", "sig") != "sig" or not isinstance(data.get("kid"), str | None):
        return None
    try:
        return _Key(jwt.PyJWK(dict(data), algorithms[0]).key, algorithms)
    except jwt.PyJWTError:  # a kind of key that is not known here; the provider's others may be
        return None
