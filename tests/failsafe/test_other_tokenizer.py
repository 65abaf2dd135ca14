"""A fallback with other token ids: whole answers from text, and nothing of an answer that another model began."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from rich.console import Console

from helpers.checkpoints import save
from helpers.exports import save_tokenizer
from helpers.families import FAMILIES
from helpers.two_models import HANG, STUB_DIED, Caller, Last, World, world
from tidewright.cache import MANIFEST
from tidewright.config import Settings
from tidewright.failsafe.translator import Translator, translator
from tidewright.launch.export import export
from tidewright.resilience.errors import ModelError
from tidewright.resilience.outcome import Outcome
from tidewright.schema import SamplingParams

BROKEN = "it broke [engine_failed]"


def submit(it: World, fits: bool = True, **sampling: Any) -> Caller:
    caller = Caller(it.models)
    caller.fits_fallback, caller.continues = fits, False
    return it.submit_for(caller, **sampling)


def test_it_gives_whole_answers() -> None:
    with world() as it:
        it.models.scripts["decoder"] = [[BROKEN]]
        assert submit(it).end()
        assert [(call.model, call.order.resume_ids) for call in it.models.calls] == [("decoder", []), ("fallback", [])]


def test_it_does_not_go_on_with_an_answer() -> None:
    with world() as it:
        it.models.scripts["decoder"] = [[[1, 2], BROKEN]]
        caller = submit(it)
        assert caller.end() is None
        assert (caller.token_ids, caller.reason) == ([1, 2], "engine_failed")
        assert not it.models.of("fallback")


def test_the_decoder_may_go_on_with_its_own() -> None:
    with world() as it:
        it.models.scripts["decoder"] = [[[1, 2], STUB_DIED], [Last([3])]]
        caller = submit(it)
        assert caller.end()
        assert caller.token_ids == [1, 2, 3]
        assert [call.order.resume_ids for call in it.models.calls] == [[], [1, 2]]


def test_the_decoder_does_not_go_on_with_what_it_began() -> None:
    with world() as it:
        it.models.scripts = {"decoder": [[BROKEN], [Last([7])]], "fallback": [[[4], STUB_DIED]]}
        caller = submit(it)
        assert caller.end() is None
        assert (caller.token_ids, caller.reason) == ([4], "engine_failed")
        assert len(it.models.of("decoder")) == 1


def test_the_decoder_is_asked_again_where_it_said_nothing() -> None:
    with world() as it:
        it.models.scripts = {"decoder": [[BROKEN], [Last([7])]], "fallback": [[STUB_DIED]]}
        caller = submit(it)
        assert caller.end()
        assert caller.token_ids == [7]


@pytest.mark.parametrize("settings", [{}, {"breaker_consecutive_failures": 1, "breaker_cool_down": 30}])
def test_what_it_cannot_be_asked_is_not_asked(settings: dict[str, Any]) -> None:
    with world(**settings) as it:
        it.models.scripts["decoder"] = [[BROKEN]]
        for _ in range(2):
            caller = submit(it, fits=False)
            assert caller.end() is None
            assert caller.reason == "engine_failed"
        assert not it.models.of("fallback")


def test_nobody_who_has_tokens_is_taken_from_a_decoder_that_is_only_slow() -> None:
    with world(failsafe_stall_timeout=5) as it:
        it.models.scripts["decoder"] = [[[1], HANG]]
        whole, begun = submit(it, fits=False), submit(it)
        begun.has(1)
        whole.has(1)
        it.passes(100)
        it.look()
        assert not it.models.of("fallback")
        it.models.release()
        it.failsafe.cancel("client")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A prepared model, an export of it, and one of a model with other token ids."""
    made = []
    for shift in (0, 1):
        folder = tmp_path_factory.mktemp("model")
        save(folder, FAMILIES["llama, tied"])
        save_tokenizer(folder, shift)
        (folder / MANIFEST).write_text("{}")
        config = {"chat_template": "{{ messages[0].content }}!"}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        export(folder, folder / "onnx", ("float32",), Console(quiet=True))
        made.append(folder)
    return made[0], made[0] / "onnx", made[1] / "onnx"


def test_only_other_token_ids_are_translated(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    model, same, other = folders
    assert translator(Settings(model=str(model))) is None
    assert translator(Settings(model=str(model), fallback=str(same))) is None
    assert translator(Settings(model=str(model), fallback=str(tmp_path))) is None  # `fallback` refuses to load
    assert translator(Settings(model=str(model), fallback=str(other))) is not None


def text(value: str) -> np.ndarray:
    return np.array([value.encode()], dtype=np.object_)


IDS = np.array([1, 2, 3], dtype=np.int32)
CHAT = text('[{"role": "user", "content": "ab"}]')


def test_the_fallback_gets_text_or_chat_in_its_own_ids(folders: tuple[Path, Path, Path]) -> None:
    made = Translator(folders[2])
    assert made.prompt({"input_ids": IDS, "text_input": text("ab")}) == {"text_input": text("ab")}
    ids = made.prompt({"input_ids": IDS, "messages": CHAT})["input_ids"]
    vocabulary = json.loads((folders[2] / "tokenizer.json").read_text())["model"]["vocab"]
    assert (ids.tolist(), ids.dtype) == ([vocabulary[letter] for letter in "ab!"], np.int32)


def test_messages_without_a_template_are_refused(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    shutil.copy(folders[2] / "tokenizer.json", tmp_path)
    with pytest.raises(ModelError, match="no chat template") as caught:
        Translator(tmp_path).prompt({"messages": CHAT})
    assert caught.value.outcome is Outcome.INVALID


@pytest.mark.parametrize(
    ("prompt", "sampling", "can"),
    [
        ({"input_ids": IDS}, {}, False),
        ({"input_ids": IDS, "text_input": text("a")}, {}, True),
        ({"text_input": text("a")}, {"stop": ["b"], "bad_words": ["c"], "guided_regex": "d"}, True),
        ({"input_ids": IDS, "messages": CHAT}, {}, True),
        ({"text_input": text("a")}, {"logit_bias": {"5": 1}}, False),
        ({"text_input": text("a")}, {"stop_token_ids": [5]}, False),
        ({"text_input": text("a")}, {"allowed_token_ids": [5]}, False),
    ],
)
def test_it_can_be_asked_what_has_no_token_ids(
    folders: tuple[Path, Path, Path], prompt: dict[str, np.ndarray], sampling: dict[str, Any], can: bool
) -> None:
    params = msgspec.convert(sampling, SamplingParams, strict=False)
    assert Translator(folders[2]).can(prompt, params) == can
