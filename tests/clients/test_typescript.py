"""TypeScript clients that public generators make of the gateway's OpenAPI document, against the real server."""

from __future__ import annotations

import re

import pytest

from helpers.gateway import RunningGateway
from helpers.keyed_gateway import Keyed
from helpers.typescript import SCRIPTS, GeneratedClients

CHECKS = {
    "with_generated": ("chat", "stream", "errors", "models", "messages", "responses"),
    "with_openapi_fetch": ("openapi_fetch",),
}


@pytest.fixture(scope="session")
def clients(gateway: RunningGateway, tmp_path_factory: pytest.TempPathFactory) -> GeneratedClients:
    return GeneratedClients(gateway.http.get("/openapi.json").json(), tmp_path_factory.mktemp("typescript"))


@pytest.mark.timeout(600)  # the first test makes the environment
@pytest.mark.parametrize(("script", "check"), [(script, check) for script, them in CHECKS.items() for check in them])
def test_a_generated_client_works(clients: GeneratedClients, gateway: RunningGateway, script: str, check: str) -> None:
    clients.check(script, check, TIDEWRIGHT_URL=gateway.url)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("check", ["chat", "stream"])
def test_a_generated_client_sends_its_key(clients: GeneratedClients, keyed: Keyed, check: str) -> None:
    clients.check("with_generated", check, TIDEWRIGHT_URL=keyed.gateway.url, TIDEWRIGHT_KEY=keyed.key)
    with pytest.raises(pytest.fail.Exception, match=r"expired|401"):
        clients.check("with_generated", check, TIDEWRIGHT_URL=keyed.gateway.url, TIDEWRIGHT_KEY=keyed.expired)


def test_every_check_of_a_script_is_listed() -> None:
    found = {path.stem: re.findall(r"^async function (\w+)\(", path.read_text(), re.MULTILINE) for path in SCRIPTS}
    assert {script: sorted(checks) for script, checks in found.items()} == {
        script: sorted(checks) for script, checks in CHECKS.items()
    }
