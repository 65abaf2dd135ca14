"""address.py: what is HOST:PORT and http://HOST:PORT; each option with an address says what is wrong with one."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from tidewright.address import check_url, host_and_port, without_user
from tidewright.config import Settings
from tidewright_gateway.config import GatewaySettings

PORTS = ("0", "65536", "99999", "100000", "-1", "+1", "1_0", "٣", "x", "")
HIGHEST, PORT = 65535, "1 to 65535"
JWT = {"jwt_issuer": "https://a", "jwt_audience": "b"}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a:1", ("a", 1)),
        ("10.0.0.1:65535", ("10.0.0.1", HIGHEST)),
        ("[::1]:8001", ("::1", 8001)),
        ("a:0080", ("a", 80)),
    ],
)
def test_host_and_port(text: str, found: tuple[str, int]) -> None:
    assert host_and_port(text) == found


@pytest.mark.parametrize(
    "text", ["", "a", ":1", "::1:1", "[::1]", "[]:1", "a b:1", "http://a:1", "a:1/x", *(f"a:{port}" for port in PORTS)]
)
def test_what_is_no_host_and_port(text: str) -> None:
    with pytest.raises(ValueError, match="is not HOST:PORT"):
        host_and_port(text)


@pytest.mark.parametrize("text", ["http://a", "https://a:65535/x", "http://[::1]:1", "http://me:pass:word@a:1/?q=a:b"])
def test_urls(text: str) -> None:
    assert check_url(text, "http", "https").hostname in ("a", "::1")


@pytest.mark.parametrize(
    "text", ["", "a:1", "ftp://a", "http://", "http://:1", "http://[", "http://[::1", "http://a b"]
)
def test_what_is_no_url(text: str) -> None:
    with pytest.raises(ValueError, match=r"it names no host|it must begin with|in brackets"):
        check_url(text, "http", "https")


@pytest.mark.parametrize("port", PORTS)
@pytest.mark.parametrize("host", ["a", "[::1]", "me:secret@a"])
def test_ports_of_urls(host: str, port: str) -> None:
    with pytest.raises(ValueError, match=PORT) as refused:
        check_url(f"http://{host}:{port}/path", "http")
    assert "secret" not in str(refused.value)


def test_passwords_are_not_shown() -> None:
    assert without_user("http://me:se:cret@a:1/x@y") == "http://a:1/x@y"
    assert without_user("a:1") == "a:1"


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        (GatewaySettings, {"replicas": "a:99999"}),
        (GatewaySettings, {"replicas": "dns:a:99999"}),
        (GatewaySettings, {"port": "99999"}),
        (GatewaySettings, {"keys": "redis://:secret@a:99999/0"}),
        (GatewaySettings, {"limits_store": "redis://:secret@a:99999/0"}),
        (GatewaySettings, {"response_store": "rediss://:secret@a:99999/0"}),
        (GatewaySettings, {**JWT, "jwt_jwks": "https://a:99999/jwks"}),
        (GatewaySettings, {"otlp_endpoint": "http://a:99999"}),
        (Settings, {"otlp_endpoint": "http://a:99999/v1/traces"}),
        (Settings, {"rendezvous": "a:99999", "nodes": 2, "tensor_parallel_size": 2}),
        (Settings, {"http_port": 99999}),
        (Settings, {"gateway_port": 99999}),
    ],
)
def test_no_option_takes_a_port_that_there_is_not(settings: Any, options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as refused:
        settings(**options)
    (told,) = refused.value.errors()
    assert "65535" in told["msg"]
    assert "secret" not in told["msg"]
    assert any(name in f"{told['loc']} {told['msg']}" for name in options)


@pytest.mark.parametrize("path", ["file:///x", "file:/x"])
def test_spans_may_go_to_a_file(path: str) -> None:
    assert Settings(otlp_endpoint=path).otlp_endpoint == path


@pytest.mark.parametrize("path", ["file://host/x", "file:x", "file:///", "file:"])
def test_what_is_no_path(path: str) -> None:
    with pytest.raises(ValidationError, match="otlp_endpoint must be"):
        Settings(otlp_endpoint=path)
