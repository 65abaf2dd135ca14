"""Through the real server: guided output, bias, bad words, prefix cache and tenants, and their refusals."""

from __future__ import annotations

import json
import re
import time

import pytest

from helpers.triton import Generation, RunningServer

MODELS = ("decoder", "failsafe", "generate", "generate_direct")
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


def ask(server: RunningServer, prompt: str, **sampling: object) -> Generation:
    return server.generate(
        text_input=prompt,
        exclude_input_in_output=True,
        return_finish_reason=True,
        sampling_parameters={"max_tokens": 24, "temperature": 0, **sampling},
    )


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_guided_json_follows_its_schema(bf16_server: RunningServer, temperature: float) -> None:
    with bf16_server.stream() as stream:
        for seed in range(6):
            options = {"guided_json": SCHEMA, "max_tokens": 120, "temperature": temperature, "seed": seed}
            stream.send(
                str(seed),
                text_input="A person as JSON:",
                stream=True,
                return_finish_reason=True,
                sampling_parameters=options,
            )
        stream.send("free", text_input="A person as JSON:", stream=True, sampling_parameters={"max_tokens": 20})
        generations = stream.finish()
    assert len(generations["free"].token_ids) > 0
    for seed in range(6):
        assert generations[str(seed)].outputs["finish_reason"][0] == b"stop"
        person = json.loads(generations[str(seed)].text)
        assert set(person) == {"name", "age", "tags"}
        assert isinstance(person["name"], str)
        assert 0 <= person["age"] <= 150
        assert set(person["tags"]) <= {"a", "b"}


def test_guided_regex_choice_and_grammar(bf16_server: RunningServer) -> None:
    got = ask(bf16_server, "A date:", guided_regex=r"\d{4}-\d{2}-\d{2}", temperature=1.0, seed=3)
    assert re.fullmatch(r"\d{4}-\d{2}-\d{2}", got.text)
    choices = ["definitely", "no way"]
    assert ask(bf16_server, "Is water wet?", guided_choice=choices).text in choices
    got = ask(bf16_server, "Sum:", guided_grammar='start: NUMBER ("+" NUMBER)+\nNUMBER: /[0-9]{1,3}/', max_tokens=60)
    assert re.fullmatch(r"\d{1,3}(\+\d{1,3})+", got.text) or got.outputs["finish_reason"][0] == b"length"


def test_a_bias_decides_and_a_bad_word_never_comes(bf16_server: RunningServer) -> None:
    free = ask(bf16_server, "The sea is", ignore_eos=True)
    assert ask(bf16_server, "The sea is", logit_bias={"500": 100}, max_tokens=3).token_ids == [500] * 3
    word = free.text.split()[2].strip(".,")
    without = ask(bf16_server, "The sea is", bad_words=[word], ignore_eos=True)
    assert word not in without.text.split()
    assert without.token_ids != free.token_ids
    penalised = ask(bf16_server, "a a a a a a a a a", repetition_penalty=5.0, ignore_eos=True, max_tokens=12)
    assert len(set(penalised.token_ids)) == 12


def test_only_allowed_tokens_come(bf16_server: RunningServer) -> None:
    digits, eos = list(range(32, 42)), 2
    options = {"temperature": 2.0, "seed": 3, "allowed_token_ids": digits, "max_tokens": 12}
    for model in MODELS:
        got = bf16_server.generate(model, text_input="Pi is 3.14", stream=True, sampling_parameters=options)
        assert len(got.token_ids) == 12
        assert re.fullmatch("[0-9]{12}", got.text)
    resumed = bf16_server.generate(text_input="Pi is 3.14", resume_ids=got.token_ids[:5], sampling_parameters=options)
    assert set(resumed.token_ids) <= set(digits)
    assert len(resumed.token_ids) == 7
    number = ask(bf16_server, "Pi is 3.14", guided_regex="[0-9 ]{4}", allowed_token_ids=[*digits, eos])
    assert re.fullmatch("[0-9]{4}", number.text)
    failed = ask(bf16_server, "Is water wet?", guided_choice=["yes"], allowed_token_ids=[*digits, eos])
    assert "none of allowed_token_ids can follow [invalid]" in str(failed.error)


def test_a_prefix_is_computed_once_for_one_tenant_and_again_for_another(bf16_server: RunningServer) -> None:
    prompt = f"{time.time_ns()} is a number that no test has asked about, and so its cache is empty. " * 4

    told: list[list[int]] = []

    def cached(salt: str | None) -> tuple[float, list[int]]:
        before = bf16_server.metric("prefix_cache_hits_total")
        options = {"cache_salt": salt} if salt else {}
        sampling = {"max_tokens": 4, "temperature": 0, "ignore_eos": True, **options}
        with bf16_server.stream() as stream:
            inputs = {"text_input": prompt, "stream": True, "sampling_parameters": sampling}
            stream.send("1", MODELS[len(told) % len(MODELS)], return_num_cached_tokens=True, **inputs)
            got = stream.finish()["1"]
        assert ["num_cached_tokens" in response for response in got.responses] == [
            number == 0 for number in range(len(got.responses))
        ]
        told.append(got.outputs["num_cached_tokens"].tolist())
        bf16_server.wait_idle()
        hits = bf16_server.metric("prefix_cache_hits_total") - before
        assert told[-1] == [hits]
        return hits, got.token_ids

    first, again, other, other_again = cached("a"), cached("a"), cached("b"), cached("b")
    assert first[0] == other[0] == 0
    assert again[0] == other_again[0] >= 64
    assert again[1] == other_again[1]
    assert cached(None)[0] == 0
    two = bf16_server.generate(text_input=prompt, return_num_cached_tokens=True, sampling_parameters={"n": 2})
    assert two.outputs["num_cached_tokens"].tolist() == told[1]
    resumed = bf16_server.generate(text_input=prompt, return_num_cached_tokens=True, resume_ids=[5, 6])
    assert "num_cached_tokens" not in resumed.outputs
    assert "num_cached_tokens" not in ask(bf16_server, prompt).outputs


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ({"guided_json": {"type": "nonsense"}}, "guided_json"),
        ({"guided_regex": "("}, "guided_regex"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_"),
        ({"guided_choice": []}, "guided_choice"),
        ({"n": 1000}, "<= 16 for `n`"),
        ({"logit_bias": {"49152": 1}}, "49152 is outside the vocabulary of 49152"),
        ({"logit_bias": {"word": 1}}, "is no token id"),
        ({"bad_words": [""]}, "bad_words"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"allowed_token_ids": [49152]}, "49152 is outside the vocabulary of 49152"),
        ({"allowed_token_ids": [2], "min_tokens": 2}, "min_tokens with allowed_token_ids"),
        ({"allowed_token_ids": [500], "guided_regex": "a"}, "add an id of it"),
        ({"timeout": -1}, "timeout"),
        ({"min_p": 1.5}, "min_p"),
    ],
)
def test_what_can_not_be_is_refused_by_name(
    bf16_server: RunningServer, sampling: dict[str, object], message: str
) -> None:
    got = ask(bf16_server, "Hello", **sampling)
    assert message in str(got.error)
    assert got.ended == 1
    assert ask(bf16_server, "Hello", max_tokens=2, ignore_eos=True).token_ids  # others go on
