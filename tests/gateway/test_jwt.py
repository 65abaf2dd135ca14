"""JWTs with real keys, and keys that a real HTTP server publishes: only good ones come in."""

from __future__ import annotations

import asyncio
import base64
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from tidewright_gateway.auth import Authenticator, AuthSetupError, tokens
from tidewright_gateway.auth.callers import Caller, Role
from tidewright_gateway.auth.keys import KeyEntry, make_key
from tidewright_gateway.auth.stores import FileStore
from tidewright_gateway.config import GatewaySettings
from tidewright_gateway.openai.errors import ApiError

ISSUER, AUDIENCE = "https://id.example", "tidewright"
RSA, OTHER_RSA = (rsa.generate_private_key(65537, 2048) for _ in range(2))
EC, ED = ec.generate_private_key(ec.SECP256R1()), ed25519.Ed25519PrivateKey.generate()

DAY = 86400  # seconds


def jwk(key: Any, algorithm: str, **values: str) -> dict[str, Any]:
    to_jwk = jwt.get_algorithm_by_name(algorithm).to_jwk  # type: ignore[attr-defined]
    return {**to_jwk(key.public_key(), as_dict=True), **values}


PUBLISHED = [
    jwk(RSA, "RS256", kid="rsa", use="sig"),
    jwk(EC, "ES256", kid="ec", alg="ES256"),
    jwk(ED, "EdDSA", kid="ed"),
    jwk(OTHER_RSA, "RS256", kid="for encryption", use="enc"),
    {"kty": "oct", "kid": "secret", "k": base64.urlsafe_b64encode(b"x" * 32).decode()},
    {"kty": "RSA", "kid": "broken", "n": "!", "e": "AQAB"},
    {**jwk(EC, "ES256"), "kid": ["no", "text"]},
    {"kty": ["RSA"], "kid": "kty is no text"},
]


def claims(**values: Any) -> dict[str, Any]:
    """None takes one away."""
    made = {"iss": ISSUER, "aud": AUDIENCE, "sub": "alice", "exp": time.time() + 2 * DAY, **values}
    return {name: value for name, value in made.items() if value is not None}


def token(key: Any = RSA, algorithm: str = "RS256", kid: Any = "rsa", **values: Any) -> str:
    return jwt.encode(claims(**values), key, algorithm, headers={"kid": kid} if kid else None)


def raw_token(header: str, body: str, signature: bytes = b"x") -> str:
    parts = (header.encode(), body.encode(), signature)
    return ".".join(base64.urlsafe_b64encode(part).decode().rstrip("=") for part in parts)


class Provider:
    """Publishes `keys` over HTTP."""

    def __init__(self) -> None:
        self.keys, self.fetches, self.is_well = [*PUBLISHED], 0, True
        self.may_answer = threading.Event()
        self.may_answer.set()
        provider = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                provider.fetches += 1
                provider.may_answer.wait(30)
                self.send_response(200 if provider.is_well else 500)
                self.end_headers()
                self.wfile.write(json.dumps({"keys": provider.keys}).encode())

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/jwks"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()


@pytest.fixture
def provider() -> Iterator[Provider]:
    provider = Provider()
    yield provider
    provider.may_answer.set()
    provider.server.shutdown()
    provider.server.server_close()


@pytest.fixture(scope="module")
def authenticator(tmp_path_factory: pytest.TempPathFactory) -> Authenticator:
    path = tmp_path_factory.mktemp("jwks") / "jwks.json"
    path.write_text(json.dumps({"keys": PUBLISHED}))
    return make(str(path))


def make(jwks: str, **options: str) -> Authenticator:
    return Authenticator(GatewaySettings(jwt_jwks=jwks, jwt_issuer=ISSUER, jwt_audience=AUDIENCE, **options))


async def ask(authenticator: Authenticator, text: str) -> Caller:
    return await authenticator.caller(f"Bearer {text}")


@pytest.mark.parametrize(
    ("key", "algorithm", "kid"),
    [(RSA, "RS256", "rsa"), (RSA, "PS512", "rsa"), (EC, "ES256", "ec"), (ED, "EdDSA", "ed")],
)
def test_good_tokens_come_in(authenticator: Authenticator, key: Any, algorithm: str, kid: str) -> None:
    text = token(key, algorithm, kid, aud=["others", AUDIENCE])
    assert asyncio.run(ask(authenticator, text)) == Caller("jwt:alice", Role.USE)


@pytest.mark.parametrize(
    ("value", "role"),
    [("admin", Role.ADMIN), (["x", "admin"], Role.ADMIN), ("use", Role.USE), ("root", Role.USE), ({}, Role.USE)],
)
def test_a_claim_names_the_role(authenticator: Authenticator, value: Any, role: Role) -> None:
    assert asyncio.run(ask(authenticator, token(tidewright_role=value))).role is role
    assert asyncio.run(ask(authenticator, token(role=value))).role is Role.USE  # the claim of some other system


def test_when_it_expires_may_be_text(authenticator: Authenticator) -> None:
    given = token(exp=str(int(time.time() + DAY)))
    for _ in range(2):  # also when it is known already
        assert asyncio.run(ask(authenticator, given)).key_id == "jwt:alice"


PEM = RSA.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
HMAC = jwt.get_algorithm_by_name("HS256")
SIGNED = ".".join(raw_token('{"alg":"HS256","kid":"rsa"}', json.dumps(claims())).split(".")[:2])
WRONG = {
    "another key": token(OTHER_RSA),
    "a key for encryption": token(OTHER_RSA, kid="for encryption"),
    "a secret that is published": token(b"x" * 32, "HS256", "secret"),
    "the public key as a secret": f"{SIGNED}."
    + base64.urlsafe_b64encode(HMAC.sign(SIGNED.encode(), PEM)).decode().rstrip("="),  # type: ignore[attr-defined]
    "alg none": jwt.encode(claims(), None, "none", headers={"kid": "rsa"}),
    "alg None": raw_token('{"alg":"None","kid":"rsa"}', json.dumps(claims()), b""),
    "an algorithm of another kind of key": token(EC, "ES256", "rsa"),
    "not the algorithm that the key is for": token(ED, "EdDSA", "ec"),
    "expired": token(exp=time.time() - 120),
    "not yet": token(nbf=time.time() + DAY),  # a run of all tests may take long, and these are made first of all
    "from the future": token(iat=time.time() + DAY),
    "endless": token(exp=float("inf")),
    "no exp": token(exp=None),
    "no sub": token(sub=None),
    "empty sub": token(sub=""),
    "long sub": token(sub="x" * 256),
    "no aud": token(aud=None),
    "wrong aud": token(aud="others"),
    "wrong iss": token(iss="https://evil.example"),
    "unknown kid": token(kid="x"),
    "no kid": token(kid=None),
    "kid is no text": raw_token('{"alg":"RS256","kid":["rsa"]}', json.dumps(claims())),
    "changed": ".".join([token().split(".")[0], raw_token("", json.dumps(claims(sub="b"))).split(".")[1], "eA"]),
    "nested": raw_token("[" * 3000, "{}"),
    "nested inside": raw_token('{"alg":"RS256","kid":' + "[" * 3000, "{}"),
    "not signed": token().rpartition(".")[0] + ".",
    "two parts": "a.b",
    "an API key": make_key("alice")[0],
}


@pytest.mark.parametrize("kind", WRONG)
def test_bad_tokens_are_a_401(authenticator: Authenticator, kind: str) -> None:
    with pytest.raises(ApiError) as refused:
        asyncio.run(ask(authenticator, WRONG[kind]))
    assert (refused.value.status, refused.value.code) == (401, "invalid_api_key")
    early = "not valid yet; do the clocks of its issuer and this server agree?"
    expected = {
        "not yet": early,
        "from the future": early,
        "expired": "expired",
        "no exp": "no exp",
        "wrong aud": "audience",
        "wrong iss": "issuer",
    }
    assert expected.get(kind, "") in str(refused.value)


@pytest.mark.parametrize(("claim", "shift"), [("nbf", 30), ("iat", 30), ("exp", -30)])
def test_clocks_may_differ_by_half_a_minute(authenticator: Authenticator, claim: str, shift: float) -> None:
    """The issuer's is ahead of ours, or behind it."""
    given = token(**{claim: time.time() + shift})
    for _ in range(2):  # also when it is known already
        assert asyncio.run(ask(authenticator, given)).key_id == "jwt:alice"


@settings(max_examples=50, deadline=None)
@given(text=st.text() | st.lists(st.binary(max_size=30), min_size=3, max_size=3))
def test_any_other_text_is_a_401(authenticator: Authenticator, text: Any) -> None:
    if isinstance(text, list):
        text = ".".join(base64.urlsafe_b64encode(part).decode() for part in text)
    with pytest.raises(ApiError) as refused:
        asyncio.run(authenticator.caller(text if text.startswith("Bearer") else f"Bearer {text}"))
    assert refused.value.status == 401


def test_keys_and_tokens_go_together(tmp_path: Path) -> None:
    key, text = make_key("bob")
    FileStore(tmp_path / "keys.yaml").change("bob", lambda _: KeyEntry("bob", (text,)))
    (tmp_path / "jwks.json").write_text(json.dumps({"keys": PUBLISHED}))

    async def main() -> None:
        both = make(str(tmp_path / "jwks.json"), keys=str(tmp_path / "keys.yaml"), jwt_role_claim="groups")
        await both.start()
        assert (await ask(both, key)).key_id == "bob"
        assert await ask(both, token(groups=["admin"])) == Caller("jwt:alice", Role.ADMIN)
        await both.stop()

    asyncio.run(main())


def test_a_new_key_is_fetched_when_it_is_used_and_not_too_often(
    provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tokens.UNKNOWN_INTERVAL >= 10

    async def main() -> None:
        authenticator = make(provider.url)
        assert provider.fetches == 1
        provider.keys = [jwk(OTHER_RSA, "RS256", kid="new")]
        text = token(OTHER_RSA, kid="new")
        with pytest.raises(ApiError):  # it was fetched a moment ago
            await ask(authenticator, text)
        assert provider.fetches == 1
        monkeypatch.setattr(tokens, "UNKNOWN_INTERVAL", 0)
        callers = await asyncio.gather(*(ask(authenticator, text) for _ in range(10)))
        assert {caller.key_id for caller in callers} == {"jwt:alice"}
        assert provider.fetches == 2
        assert (await ask(authenticator, token(OTHER_RSA, kid=None))).key_id == "jwt:alice"  # there is but one
        with pytest.raises(ApiError):
            await ask(authenticator, token())  # its key was withdrawn
        await authenticator.stop()

    asyncio.run(main())


def test_withdrawn_keys_end_without_a_request_that_asks(
    provider: Provider, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tokens, "_REFRESH_INTERVAL", 0.05)
    fetch, faults = tokens._fetch, iter([RuntimeError("a fault of ours")])

    def fail_first(jwks: str) -> Any:
        for fault in faults:
            raise fault
        return fetch(jwks)

    async def main() -> None:
        authenticator = make(provider.url)
        monkeypatch.setattr(tokens, "_fetch", fail_first)
        await authenticator.start()
        provider.keys = PUBLISHED[1:]
        for _ in range(3000):
            try:
                await ask(authenticator, token())
            except ApiError:
                break
            await asyncio.sleep(0.01)
        else:
            raise AssertionError("it is taken still")
        await authenticator.stop()

    asyncio.run(main())
    assert "a fault of ours" in caplog.text


def test_a_provider_that_fails_or_hangs_later_changes_nothing(
    provider: Provider, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        authenticator = make(provider.url)
        monkeypatch.setattr(tokens, "UNKNOWN_INTERVAL", 0)
        provider.is_well = False
        with pytest.raises(ApiError):
            await ask(authenticator, token(kid="x"))
        assert "keeping the previously loaded" in caplog.text
        provider.may_answer.clear()
        hanging = asyncio.ensure_future(ask(authenticator, token(kid="x")))
        await asyncio.sleep(0.05)
        assert (await ask(authenticator, token())).key_id == "jwt:alice"
        assert not hanging.done()
        provider.may_answer.set()
        with pytest.raises(ApiError):
            await hanging
        provider.may_answer.clear()
        monkeypatch.setattr(tokens, "_FETCH_TIMEOUT", 0.1)
        with pytest.raises(ApiError):
            await ask(authenticator, token(kid="x"))
        assert "timed out" in caplog.text
        await authenticator.stop()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("nonsense", "not a JWKS"),
        ("[]", "not a JWKS"),
        ("{}", "not a JWKS"),
        ('{"keys": 1}', "not a JWKS"),
        ('{"keys": [1]}', "not a JWKS"),
        ('{"keys": []}', "has no RSA, EC or Ed25519 key"),
        (json.dumps({"keys": PUBLISHED[3:]}), "has no RSA, EC or Ed25519 key"),
    ],
)
def test_a_broken_jwks_is_refused_at_start(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "jwks.json"
    path.write_text(content)
    with pytest.raises(AuthSetupError, match=f"jwt_jwks {path}: {message}"):
        make(str(path))


def test_a_jwks_that_is_not_there_is_refused_at_start(tmp_path: Path) -> None:
    for jwks in (str(tmp_path / "none.json"), "http://127.0.0.1:1/jwks"):
        with pytest.raises(AuthSetupError, match=f"jwt_jwks {jwks}: "):
            make(jwks)
    with pytest.raises(ValidationError, match=r"jwt_jwks must be .*: its port must be a number from 1 to 65535"):
        make("http://127.0.0.1:x/jwks")
