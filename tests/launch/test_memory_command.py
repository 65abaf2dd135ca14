"""`tidewright memory` at a scripted Triton: what it waits for and says. A real one is in serving/test_memory.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import msgspec
import pytest
from click.testing import CliRunner

from helpers.scripted_triton import ScriptedTriton, scripted_triton
from tidewright.launch.cli import main
from tidewright.memory.account import MemoryAccount

MIB = 2**20
ACCOUNT = MemoryAccount(
    *(100 * MIB, 30 * MIB, 20 * MIB, 15 * MIB),
    kv_free=20 * MIB,
    block=MIB,
    kv_least=5 * MIB,
    kv_most=50 * MIB,
    kv_target=20 * MIB,
)


@pytest.fixture
def triton() -> Iterator[ScriptedTriton]:
    with scripted_triton() as made:
        says(made, ACCOUNT)
        yield made


def says(triton: ScriptedTriton, account: MemoryAccount) -> None:
    told = msgspec.json.encode(msgspec.structs.asdict(account)).decode()
    triton.broken["memory decoder"] = 200, msgspec.json.encode({"text_output": told})


def resizes(triton: ScriptedTriton, to: Callable[[int], MemoryAccount]) -> None:
    answer = triton.answer

    def resized(path: str, body: dict) -> object:
        word = body.get("control", "")
        if not word.startswith("resize:"):
            return answer(path, body)
        says(triton, to(int(word.removeprefix("resize:"))))
        return 200, b'{"text_output": "ok"}'

    triton.answer = resized  # type: ignore[method-assign]


def run(triton: ScriptedTriton, *words: str) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["memory", *words, "--url", triton.http_url])
    return result.exit_code, result.output


def test_the_cache_gets_what_adapters_leave_of_a_budget(triton: ScriptedTriton) -> None:
    """They keep what they have: the cache gets that when they leave."""
    resizes(triton, lambda size: msgspec.structs.replace(ACCOUNT, kv_target=size, kv_free=min(size, 35 * MIB)))
    code, report = run(triton, "--kv", "100%", "--timeout", "1")
    assert code == 0, report
    assert "  KV cache, wanted        50.0 MiB  adapters have the rest" in report
    assert "  KV cache                35.0 MiB" in report
    code, report = run(triton, "--kv", "30MiB", "--timeout", "1")
    assert code == 0, report
    assert "wanted" not in report


def test_without_the_memory_it_gives_up_and_says_so(triton: ScriptedTriton) -> None:
    resizes(triton, lambda size: msgspec.structs.replace(ACCOUNT, kv_target=size))
    code, report = run(triton, "--kv", "30MiB", "--timeout", "0.3")
    assert (code, "the KV cache has 20.0 MiB after 0.3 s, not 30.0 MiB: there may be no memory" in report) == (1, True)
    assert "as soon as there is memory" in run(triton)[1]
    code, report = run(triton, "--kv", "60MiB")
    assert (code, "the KV cache can have 5.0 MiB to 50.0 MiB, not 60.0 MiB" in report) == (1, True)


def test_a_model_is_called_as_by_the_other_commands_and_as_in_the_metrics(triton: ScriptedTriton) -> None:
    triton.broken["memory decoder_q"] = triton.broken["memory decoder"]
    for name in ("q", "decoder_q", "decoder"):
        code, report = run(triton, "--model", name)
        assert code == 0, report
    assert [one for one in triton.asked if "memory" in one] == [*["memory decoder_q"] * 2, "memory decoder"]
    unknown = b'{"error": "Request for unknown model: \'decoder_tokenizer\' is not found"}'
    triton.broken |= {
        "memory decoder_tokenizer": (400, unknown),
        "index": (200, b'[{"name": "tokenizer"}, {"name": "decoder"}, {"name": "decoder_q"}]'),
    }
    code, report = run(triton, "--model", "tokenizer")
    assert (code, "has no model 'tokenizer'; it was started with: decoder, q" in report) == (1, True)


def test_a_gateway_is_named_as_one(triton: ScriptedTriton) -> None:
    triton.broken["ready"] = 200, b'{"status": "ready"}'
    code, report = run(triton)
    assert (code, "is a gateway; memory is of one server: give its HTTP port (Triton's, 8000)" in report) == (1, True)


def test_a_port_of_metrics_is_named_as_one(triton: ScriptedTriton) -> None:
    triton.broken["memory decoder"] = 405, b'{"error": "Method Not Allowed"}'
    code, report = run(triton)
    assert (code, "takes no commands: perhaps it is a port of metrics; give Triton's HTTP port" in report) == (1, True)
