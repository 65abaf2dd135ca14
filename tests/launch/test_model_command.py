"""`tidewright model` at one Triton, which is scripted: what is told to it, in which order, and what of errors."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from click.testing import CliRunner

from helpers.scripted_triton import ScriptedTriton, scripted_triton
from tidewright.launch.cli import main


def index(**states: str) -> tuple[int, bytes]:
    return 200, json.dumps([{"name": name, "version": "1", "state": state} for name, state in states.items()]).encode()


@pytest.fixture
def triton() -> Iterator[ScriptedTriton]:
    with scripted_triton() as made:
        made.broken["index"] = index(decoder="READY", decoder_small="UNAVAILABLE", tokenizer="READY", failsafe="READY")
        yield made


def run(triton: ScriptedTriton, *words: str) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["model", *words, "--url", triton.http_url])
    return result.exit_code, result.output


def changes(triton: ScriptedTriton) -> list[str]:
    return [question for question in triton.asked if "load" in question]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("load", "small"), ["load tokenizer_small", "load decoder_small", "load generate_small"]),
        (("unload", "small"), ["unload generate_small", "unload decoder_small", "unload tokenizer_small"]),
        (("load", "decoder"), ["load decoder"]),
        (("unload", "decoder"), ["unload decoder"]),
    ],
)
def test_a_model_s_chain_is_changed_from_what_needs_least(
    triton: ScriptedTriton, words: tuple[str, str], expected: list[str]
) -> None:
    assert run(triton, *words) == (0, f"{words[0].capitalize()}ed {words[1]}.\n")
    assert changes(triton) == expected


def test_a_model_that_ends_its_last_requests_is_waited_for(triton: ScriptedTriton) -> None:
    states, answer = iter(["READY", "UNLOADING", "UNLOADING", "UNAVAILABLE"]), triton.answer

    def ending(path: str, body: dict) -> object:
        return index(decoder_small=next(states)) if path.endswith("index") else answer(path, body)

    triton.answer = ending  # type: ignore[method-assign, assignment]
    assert run(triton, "unload", "small")[0] == 0
    assert next(states, "") == ""


def test_errors_are_told(triton: ScriptedTriton) -> None:
    code, text = run(triton, "load", "large")
    assert (code, "has no model 'large'; it was started with: decoder, small" in text) == (1, True)
    assert changes(triton) == []
    triton.broken["load decoder_small"] = 400, b'{"error": "no memory"}'
    code, text = run(triton, "load", "small")
    assert (code, "decoder_small could not be loaded: no memory; see the server's log" in text) == (1, True)
    triton.broken["index"] = 200, b"nonsense"
    code, text = run(triton, "list")
    assert (code, "did not answer as Triton does" in text) == (1, True)


def test_the_list_says_how_each_is(triton: ScriptedTriton) -> None:
    triton.broken["index"] = index(
        decoder="READY", decoder_a="READY", decoder_b="", decoder_c="LOADING", tokenizer="READY"
    )
    triton.broken["health decoder_a"] = 400, b'{"error": "the engine is starting"}'
    assert run(triton, "list") == (
        0,
        "decoder  loaded\na        the engine is starting\nb        not loaded\nc        loading\n",
    )


AWAY = 400, b'{"error": "Request for unknown model: \'decoder\' is not found"}'


def test_a_server_is_well_as_long_as_one_model_is(triton: ScriptedTriton) -> None:
    """Health, liveness and drain ask the first; where it is not loaded, the others."""

    def asked(*words: str) -> tuple[int, str]:
        result = CliRunner().invoke(main, [*words, "--url", triton.http_url])
        return result.exit_code, result.output

    states = {"decoder": "UNAVAILABLE", "decoder_small": "READY", "decoder_away": "UNAVAILABLE"}
    triton.broken |= {f"{word} decoder": AWAY for word in ("health", "status", "drain")} | {"index": index(**states)}
    code, text = asked("health")
    assert (code, text.splitlines()[0]) == (0, "healthy")
    assert "the first model takes no requests: decoder could not be loaded" in text
    assert asked("health", "--live") == (0, "alive\n")
    assert asked("drain", "--no-wait") == (0, "Draining.\n")
    assert triton.count("drain decoder_small") == 1
    triton.broken["health decoder_small"] = 400, b'{"error": "the engine is starting"}'
    assert asked("health")[0] == 1
    triton.broken["index"] = index(decoder="UNAVAILABLE")
    for words in (("health",), ("health", "--live"), ("drain", "--no-wait")):
        assert asked(*words)[0] == 1
