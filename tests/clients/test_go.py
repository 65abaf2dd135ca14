"""The Go client: its own tests, with the scripted gateway and with a real one."""

from __future__ import annotations

from helpers.golang import run_go, run_go_tests
from helpers.keyed_gateway import Keyed


def test_it_is_formatted_and_vetted() -> None:
    assert run_go("gofmt", "-l", ".") == ""
    run_go("go", "vet", "-race", "./...")  # with -race, what it compiles is of use to the tests


def test_its_own_tests_pass() -> None:
    run_go_tests("./...")


def test_the_vectors_of_a_real_gateway_pass(keyed: Keyed) -> None:
    said = run_go_tests(
        "-run=TestConformanceWithGateway", "-v", ".", TIDEWRIGHT_URL=keyed.url, TIDEWRIGHT_KEY=keyed.key
    )
    assert "--- PASS: TestConformanceWithGateway/gateway_chat" in said
