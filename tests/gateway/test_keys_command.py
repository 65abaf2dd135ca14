"""`tidewright keys` from its output to the gateway, and what the gateway asks for before other machines may come in."""

from __future__ import annotations

import asyncio
import os
import ssl
import subprocess
import sys
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path

import httpx
import pytest
from click.testing import CliRunner, Result
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from pydantic import ValidationError

from tidewright.bench.machine import free_ports
from tidewright.launch.cli import main
from tidewright_gateway.auth import Authenticator
from tidewright_gateway.auth.callers import Caller, Limits, Role
from tidewright_gateway.auth.stores import open_store
from tidewright_gateway.config import GatewaySettings
from tidewright_gateway.openai.errors import ApiError


def run(*words: str, where: str) -> Result:
    return CliRunner().invoke(main, ["keys", *words, "--keys", where])


def ask(where: str, key: str) -> Caller:
    return asyncio.run(Authenticator(GatewaySettings(keys=where)).caller(f"Bearer {key}"))


def test_the_life_of_a_key(where: str) -> None:
    limits = ["--requests-per-second", "2.5", "--concurrent", "3", "--tokens-per-minute", "4"]
    words = [
        "--user-tokens-per-day",
        "5",
        "--role",
        "admin",
        "--priority",
        "-1",
        "--weight",
        "4",
        "--expires",
        "90d",
        "--note",
        "the [bold] team",
    ]
    made = run("create", "alice", *limits, *words, where=where)
    assert made.exit_code == 0
    first = made.stdout.rstrip("\n")
    assert first not in made.stderr
    expected = Caller("alice", Role.ADMIN, Limits(2.5, 3, 4), Limits(tokens_per_day=5), -1, 4)
    assert ask(where, first) == expected

    again = run("create", "alice", where=where)
    assert (again.exit_code, again.stdout) == (1, "")
    assert "there is a key alice already" in again.stderr

    second = run("rotate", "alice", where=where).stdout.rstrip("\n")
    assert ask(where, first) == ask(where, second) == expected
    listed = run("list", where=where).stdout
    for text in ("alice", "admin", "good", "new and old", "requests_per_second=2.5", "tokens_per_day=5", "[bold]"):
        assert text in listed
    assert "sha256" not in listed
    assert not any(key[-43:][:20] in listed for key in (first, second))

    assert run("revoke", "alice", "--old", where=where).exit_code == 0
    assert ask(where, second) == expected
    with pytest.raises(ApiError):
        ask(where, first)
    assert "has no old secret" in run("revoke", "alice", "--old", where=where).stderr

    third = run("rotate", "alice", "--now", where=where).stdout.rstrip("\n")
    assert ask(where, third) == expected
    with pytest.raises(ApiError):
        ask(where, second)

    assert run("revoke", "alice", where=where).exit_code == 0
    with pytest.raises(ApiError):
        ask(where, third)
    for words in (["revoke", "alice"], ["rotate", "alice"]):
        assert "there is no key alice" in run(*words, where=where).stderr


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("2999-01-31", datetime(2999, 1, 31, tzinfo=timezone.utc)),
        ("2999-01-31T12:00:00Z", datetime(2999, 1, 31, 12, tzinfo=timezone.utc)),
        ("2999-01-31T12:00:00+02:00", datetime(2999, 1, 31, 10, tzinfo=timezone.utc)),
    ],
)
def test_a_key_ends_when_it_was_said(tmp_path: Path, text: str, moment: datetime) -> None:
    where = str(tmp_path / "keys.yaml")
    assert run("create", "alice", "--expires", text, where=where).exit_code == 0
    entries, _ = open_store(where).read() or ({}, [])
    assert entries["alice"].expires == moment


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a b"], "can't be an id"),
        (["anonymous"], "the id anonymous is taken"),
        (["a", "--expires", "2020-01-01"], "is over already"),
        (["a", "--expires", "0d"], "is over already"),
        (["a", "--expires", "99999d", "--expires", "soon"], "is no time such as"),
        (["a", "--concurrent", "0"], "--concurrent"),
        (["a", "--user-requests-per-second", "-1"], "--user-requests-per-second"),
        (["a", "--role", "root"], "--role"),
    ],
)
def test_what_no_key_can_have_is_refused(tmp_path: Path, words: list[str], message: str) -> None:
    result = run("create", *words, where=str(tmp_path / "keys.yaml"))
    assert result.exit_code != 0
    assert message in result.stderr
    assert not list(tmp_path.iterdir())


def test_a_store_that_can_not_be_used_is_one_line(tmp_path: Path) -> None:
    for where in (str(tmp_path / "none" / "keys.yaml"), "redis://me:password@127.0.0.1:1/0", str(tmp_path)):
        result = run("create", "a", where=where)
        assert (result.exit_code, result.stdout) == (1, "")
        assert result.stderr.startswith("Error: ")
        assert result.stderr.count("\n") == 1
        assert "password" not in result.stderr


def test_every_command_explains_itself() -> None:
    assert "  keys " in CliRunner().invoke(main, ["--help"]).output
    for words in ([], ["create"], ["list"], ["rotate"], ["revoke"]):
        assert CliRunner().invoke(main, ["keys", *words, "--help"]).exit_code == 0


JWT = {"jwt_jwks": "https://id.example/jwks", "jwt_issuer": "https://id.example", "jwt_audience": "tidewright"}


def test_other_machines_come_in_only_with_a_key() -> None:
    for host in ("0.0.0.0", "::", "10.0.0.1", "gateway.example", ""):
        with pytest.raises(ValidationError, match=r"no keys are asked for; set keys \(`tidewright keys create`"):
            GatewaySettings(host=host)
        assert GatewaySettings(host=host, keys="keys.yaml").host == host
        assert GatewaySettings(host=host, **JWT).host == host
    for host in ("127.0.0.1", "127.0.0.2", "::1", "localhost"):
        assert GatewaySettings(host=host).host == host


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keys": "http://127.0.0.1/"}, "neither the path of a file nor redis://"),
        *(({name: value}, "go together: set all three or none") for name, value in JWT.items()),
        ({**JWT, "jwt_audience": ""}, "go together: set all three or none"),
        ({**JWT, "jwt_jwks": "http://id.example/jwks"}, "jwt_jwks must be https://"),
        ({**JWT, "jwt_jwks": "file:///etc/jwks"}, "jwt_jwks must be https://"),
        ({"tls_cert": "cert.pem"}, "set both or none"),
        ({"tls_key": "key.pem"}, "set both or none"),
        ({"tls_cert": "none.pem", "tls_key": "none.pem"}, "tls_cert: no such file: none.pem"),
        ({"tls_cert": __file__, "tls_key": __file__}, "are no certificate and its key in PEM"),
    ],
)
def test_options_that_can_not_be_right_are_refused(options: dict[str, str], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        GatewaySettings(**options)


def test_a_password_of_redis_is_not_shown() -> None:
    assert "password" not in repr(GatewaySettings(keys="redis://me:password@127.0.0.1/0"))


def write_certificate(folder: Path, passphrase: bytes = b"") -> tuple[str, str]:
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
    now = datetime.now(timezone.utc)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    protection = serialization.BestAvailableEncryption(passphrase) if passphrase else serialization.NoEncryption()
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, protection)
    (folder / "cert.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (folder / "key.pem").write_bytes(key.private_bytes(*form))
    return str(folder / "cert.pem"), str(folder / "key.pem")


def test_a_key_with_a_passphrase_is_refused(tmp_path: Path) -> None:
    cert, key = write_certificate(tmp_path, b"passphrase")
    with pytest.raises(ValidationError, match="without a passphrase"):
        GatewaySettings(tls_cert=cert, tls_key=key)


SERVE = """
from tidewright_gateway.http import serving
from tidewright_gateway.config import GatewaySettings

async def app(scope, receive, send):
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": scope["scheme"].encode()})

serving.make_app = lambda settings, **rest: app
serving.serve(GatewaySettings())
"""


def test_the_gateway_speaks_tls(tmp_path: Path) -> None:
    cert, key = write_certificate(tmp_path)
    (port,) = free_ports(1)
    options = {"TLS_CERT": cert, "TLS_KEY": key, "PORT": str(port)}
    environment = os.environ | {f"TIDEWRIGHT_GATEWAY_{name}": value for name, value in options.items()}
    process = subprocess.Popen([sys.executable, "-c", SERVE], env=environment)
    try:
        trusting = ssl.create_default_context(cafile=cert)
        deadline = time.monotonic() + 60
        with httpx.Client(verify=trusting, trust_env=False) as client:
            while True:
                try:
                    assert client.get(f"https://localhost:{port}/").text == "https"
                    break
                except httpx.ConnectError:
                    assert process.poll() is None
                    assert time.monotonic() < deadline
                    time.sleep(0.05)
            with pytest.raises(httpx.TransportError):
                client.get(f"http://127.0.0.1:{port}/")
    finally:
        process.terminate()
        process.wait(30)
