"""Guided output follows its grammar whatever the model says, and one request's trouble stays its own."""

from __future__ import annotations

import json
import random
import re
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from helpers.step_batches import sample
from helpers.watched_list import WatchedList
from tidewright.engine.plan import Draw, History
from tidewright.sampling.grammar import GrammarError, check_grammar
from tidewright.sampling.guided import GuidedDecoding
from tidewright.schema import MAX_GRAMMAR_LENGTH, SamplingParams

VOCAB = 49_280  # the tokenizer has 128 fewer
EOS = (0, 2)
PROMPT = (10, 11, 12)


@pytest.fixture(scope="module")
def tokenizer(model_dir: Path) -> Tokenizer:
    return Tokenizer.from_file(str(model_dir / "tokenizer.json"))


@pytest.fixture(scope="module")
def guided(model_dir: Path) -> GuidedDecoding:
    return GuidedDecoding(model_dir / "tokenizer.json", VOCAB, EOS)


def make_draw(params: SamplingParams, output: tuple[int, ...] = (), request_id: int = 1, **fields: Any) -> Draw:
    history = PROMPT + output
    return Draw(request_id, params, len(history), history=History(history, len(history), len(PROMPT)), **fields)


def allowed(guided: GuidedDecoding, *draws: Draw) -> list[list[int]]:
    masks, errors = guided.allowed(draws)
    assert errors == {}
    return [masks[row].nonzero()[0].tolist() for row in range(len(draws))]


def generate(guided: GuidedDecoding, params: SamplingParams, seed: int, limit: int = 300) -> tuple[int, ...]:
    """Output tokens of a model that says anything at all, up to EOS, which is left out."""
    generator = torch.Generator().manual_seed(seed)
    guided.forget([1])
    output: tuple[int, ...] = ()
    while len(output) < limit:
        # Every second row belongs to a request that is free.
        logits_BV = 2 * torch.randn(2, VOCAB, generator=generator)
        drawn, _ = sample(logits_BV, [make_draw(params, output), Draw(2, SamplingParams(seed=seed), 5)], guided)
        assert drawn.error == ""
        if drawn.token_id in EOS:
            return output
        output += (drawn.token_id,)
    raise AssertionError(f"no end after {limit} tokens")


Schema = dict[str, Any]
Check = Callable[[Any], bool]


def random_schema(rng: random.Random, depth: int = 2) -> tuple[Schema, Check]:
    """A schema whose documents are short, and its meaning in Python."""
    kind = rng.choice(["integer", "string", "enum", "boolean", "null"] + ["array", "object", "anyOf"] * (depth > 0))
    if kind == "integer":
        low = rng.randrange(-1000, 1000)
        high = low + rng.randrange(500)
        return {"type": kind, "minimum": low, "maximum": high}, lambda v: type(v) is int and low <= v <= high
    if kind == "string":
        length = rng.randrange(10)
        return {"type": kind, "maxLength": length}, lambda v: isinstance(v, str) and len(v) <= length
    if kind == "enum":
        values = ["".join(rng.choices(string.printable, k=6)) for _ in range(3)] + [17, None]
        return {kind: values}, lambda v: v in values
    if kind == "boolean":
        return {"type": kind}, lambda v: isinstance(v, bool)
    if kind == "null":
        return {"type": kind}, lambda v: v is None
    if kind == "array":
        items, holds = random_schema(rng, depth - 1)
        most = rng.randrange(4)
        schema = {"type": kind, "items": items, "maxItems": most}
        return schema, lambda v: isinstance(v, list) and len(v) <= most and all(map(holds, v))
    if kind == "anyOf":
        options = [random_schema(rng, depth - 1) for _ in range(2)]
        return {kind: [schema for schema, _ in options]}, lambda v: any(holds(v) for _, holds in options)
    fields = {f"field {i}": random_schema(rng, depth - 1) for i in range(rng.randrange(4))}
    required = [name for name in fields if rng.random() < 0.5]
    schema = {
        "type": kind,
        "properties": {name: field for name, (field, _) in fields.items()},
        "required": required,
        "additionalProperties": False,
    }
    return (
        schema,
        lambda v: (
            isinstance(v, dict)
            and set(required) <= v.keys() <= fields.keys()
            and all(fields[name][1](value) for name, value in v.items())
        ),
    )


@pytest.mark.parametrize("seed", range(25))
def test_json_parses_and_follows_its_schema(guided: GuidedDecoding, tokenizer: Tokenizer, seed: int) -> None:
    schema, holds = random_schema(random.Random(seed))
    params = SamplingParams(guided_json=schema if seed % 2 else json.dumps(schema), temperature=1.5, seed=seed)
    text = tokenizer.decode(generate(guided, params, seed), skip_special_tokens=False)
    assert holds(json.loads(text)), (schema, text)


@pytest.mark.parametrize(
    "pattern",
    [
        r"[a-z]{2,5}",
        r"(\d{3}-){2}\d{4}",
        r"(yes|no|maybe)( [A-Z]{1,3})?",
        r"#[0-9a-f]{6}",
        r"\w/\d\s\\/",
        "é|日本|😀!\n",
        "",
    ],
)
def test_a_regex_matches_the_whole_output(guided: GuidedDecoding, tokenizer: Tokenizer, pattern: str) -> None:
    for seed in range(3):
        text = tokenizer.decode(generate(guided, SamplingParams(guided_regex=pattern, seed=seed), seed))
        assert re.fullmatch(pattern, text)


def test_one_of_the_choices_comes_out(guided: GuidedDecoding, tokenizer: Tokenizer) -> None:
    choices = ['"quoted"', "back\\slash", "del\x7f", "new\nline", "nul\0", "😀", "yes", "yes, sir", "a | b", "/a+/"]
    for choice in choices:
        params = SamplingParams(guided_choice=[choice], seed=1)
        assert tokenizer.decode(generate(guided, params, 1)) == choice
    params = SamplingParams(guided_choice=choices, seed=1, temperature=2.0)
    assert {tokenizer.decode(generate(guided, params, seed)) for seed in range(12)} <= set(choices)


def test_a_grammar_may_be_recursive(guided: GuidedDecoding, tokenizer: Tokenizer) -> None:
    params = SamplingParams(guided_grammar='start: "(" start ")" | "[" start "]" | "x"', seed=1, temperature=2.0)
    for seed in range(5):
        text = tokenizer.decode(generate(guided, params, seed))
        while text != "x":
            assert text[0] + text[-1] in ("()", "[]")
            text = text[1:-1]


def test_every_eos_is_allowed_behind_a_complete_output_and_nothing_else(guided: GuidedDecoding) -> None:
    ids = tuple(tokenizer_ids(guided, "ab"))
    assert allowed(guided, make_draw(SamplingParams(guided_regex="ab"), ids, request_id=50)) == [list(EOS)]
    (open_end,) = allowed(guided, make_draw(SamplingParams(guided_regex="ab+"), ids, request_id=51))
    assert set(EOS) < set(open_end)


def tokenizer_ids(guided: GuidedDecoding, text: str) -> list[int]:
    return Tokenizer.from_file(str(guided._file)).encode(text).ids


def test_the_mask_depends_on_the_output_only(guided: GuidedDecoding, model_dir: Path) -> None:
    """After a preemption, a restart, wrong guesses, or another request with the same id."""
    number, word = SamplingParams(guided_regex="[0-9]{6}"), SamplingParams(guided_regex="(one|two) more")
    digits = tuple(tokenizer_ids(guided, "123456"))
    assert len(digits) == 6
    steps = [
        make_draw(number),
        make_draw(number, digits[:1]),
        make_draw(number, digits[:5]),  # several at once
        make_draw(number, digits[:2] + digits[4:5]),  # went back, and another way
        make_draw(number, digits[:3]),
        make_draw(number, digits),
        make_draw(number, digits[:5]),  # back over a complete output
        make_draw(word),
        make_draw(number, digits[:4]),
    ]
    for step in steps:
        fresh = GuidedDecoding(model_dir / "tokenizer.json", VOCAB, EOS)
        fresh._tokenizer = guided._tokenizer
        assert allowed(guided, step) == allowed(fresh, step)


def test_several_draws_of_a_request_in_one_step(guided: GuidedDecoding) -> None:
    """As speculative decoding asks for them: the guess that breaks the grammar can't be drawn, what follows is void."""
    params = SamplingParams(guided_regex="[0-9]{4}")
    one, two, wrong = (tokenizer_ids(guided, text)[0] for text in ("1", "2", "x"))
    draws = [make_draw(params, output, 60) for output in ((), (one,), (one, wrong), (one, wrong, two))]
    masks, errors = guided.allowed(draws)
    assert set(errors) == {2, 3}
    assert not masks[1][wrong]
    assert allowed(guided, make_draw(params, (one, two), 60)) == allowed(guided, make_draw(params, (one, two), 61))


def test_a_long_output_is_read_once(guided: GuidedDecoding) -> None:
    """Its list only grows; guesses are taken back."""
    params = SamplingParams(guided_regex="(12)*3?")
    one, two, three = (tokenizer_ids(guided, digit)[0] for digit in "123")
    tokens = WatchedList([*PROMPT, *[one, two] * 50])
    fresh = iter(range(600, 700))

    def check(*drafts: int) -> None:
        history = History(tokens, len(tokens), len(PROMPT), drafts)
        tokens.read = 0
        got = allowed(guided, Draw(599, params, 1, history=history))
        assert tokens.read <= (200 if len(tokens) == 103 else 2)
        whole = (*tokens[len(PROMPT) :], *drafts)
        assert got == allowed(guided, make_draw(params, whole, next(fresh)))

    check()
    tokens.append(one)
    check(two, three)
    check(two)
    tokens.append(two)
    check()
    tokens.append(one)
    check(two, one)
    tokens.append(two)
    check(three)
    check()
    guided.forget([599, *range(600, 700)])


def test_what_ended_is_forgotten(model_dir: Path, guided: GuidedDecoding) -> None:
    decoding = GuidedDecoding(model_dir / "tokenizer.json", VOCAB, EOS)
    decoding._tokenizer = guided._tokenizer
    allowed(decoding, *(make_draw(SamplingParams(guided_regex="a+"), request_id=i) for i in range(4)))
    decoding.forget([0, 2, 77])
    assert decoding._places.keys() == {1, 3}


def test_the_tokenizer_is_loaded_by_the_first_guided_request(tmp_path: Path) -> None:
    decoding = GuidedDecoding(tmp_path / "none.json", VOCAB, EOS)
    assert decoding.allowed([Draw(1, SamplingParams(), 3)]) == ({}, {})
    assert "tokenizer" in decoding.allowed([make_draw(SamplingParams(guided_regex="a"))])[1][0]


@pytest.mark.parametrize("eos_ids", [(2, 7), ()])
def test_trouble_ends_its_own_request_with_eos_and_a_reason(tmp_path: Path, eos_ids: tuple[int, ...]) -> None:
    broken = GuidedDecoding(tmp_path / "none.json", VOCAB, eos_ids)
    free = Draw(2, SamplingParams(seed=1), 5)
    logits_BV = torch.randn(2, VOCAB)
    (alone,) = sample(logits_BV[1:].clone(), [free])
    failed, other = sample(logits_BV, [make_draw(SamplingParams(guided_choice=["a"], seed=2)), free], broken)
    assert failed.error.startswith("guided output failed: the model's tokenizer can't be used")
    assert failed.token_id in (eos_ids or (0,))
    assert other == alone


@pytest.mark.parametrize("output", ["12x", "x"])
def test_an_output_that_left_its_grammar_ends(guided: GuidedDecoding, output: str) -> None:
    draws = [
        make_draw(SamplingParams(guided_regex="[0-9]+"), tuple(tokenizer_ids(guided, output)), 70),
        make_draw(SamplingParams(guided_regex="[0-9]+"), (), 71),
    ]
    _, errors = guided.allowed(draws)
    assert list(errors) == [0]
    assert f"left the grammar at its token number {len(output)}" in errors[0]


def test_a_grammar_that_outgrows_the_limits_ends(guided: GuidedDecoding, tokenizer: Tokenizer) -> None:
    params = SamplingParams(guided_regex="(x{1000}){1000}y")
    output: tuple[int, ...] = ()
    for _ in range(20):
        (drawn,) = sample(torch.zeros(1, VOCAB), [make_draw(params, output, 80)], guided)
        if drawn.error:
            break
        output += (drawn.token_id,)
    assert "too many" in drawn.error
    assert drawn.token_id in EOS
    assert set(tokenizer.decode(output, skip_special_tokens=False)) <= {"x"}


def test_a_grammar_without_any_text_ends_at_once(guided: GuidedDecoding) -> None:
    (drawn,) = sample(torch.zeros(1, VOCAB), [make_draw(SamplingParams(guided_grammar="start: start"), (), 85)], guided)
    assert drawn.error
    assert drawn.token_id in EOS


def test_a_ban_gives_way_where_the_grammar_leaves_nothing_else(guided: GuidedDecoding) -> None:
    params = SamplingParams(guided_choice=["yes", "no"], seed=1, temperature=0.0)
    yes, no = (tokenizer_ids(guided, text)[0] for text in ("yes", "no"))

    def drawn(output: tuple[int, ...], **fields: Any) -> int:
        return sample(torch.zeros(1, VOCAB), [make_draw(params, output, 90, **fields)], guided)[0].token_id

    assert drawn((yes,), banned_ids=EOS) in EOS
    prefixes = {token for token in allowed(guided, make_draw(params, (), 90))[0] if token != no}
    assert drawn((), bad_words_ids=tuple((token,) for token in prefixes)) == no
    assert drawn((), bad_words_ids=tuple((token,) for token in {*prefixes, no})) in {*prefixes, no}


def test_of_the_tokens_that_the_grammar_allows_only_the_allowed_ones_come(guided: GuidedDecoding) -> None:
    digits = [tokenizer_ids(guided, digit)[0] for digit in "37"]
    params = SamplingParams(guided_regex="[0-9]{3}", allowed_token_ids=[*digits, 500, 2], seed=1)
    (free,) = allowed(guided, make_draw(SamplingParams(guided_regex="[0-9]{3}"), (), 96))
    assert len(free) > 2
    output: tuple[int, ...] = ()
    while not output or output[-1] != 2:
        # The model would say anything else.
        logits_1V = torch.zeros(1, VOCAB)
        logits_1V[0, digits] = -50.0
        (drawn,) = sample(logits_1V, [make_draw(params, output, 97)], guided)
        assert drawn.error == ""
        output += (drawn.token_id,)
    assert len(output) == 4
    assert set(output[:3]) <= set(digits)


def test_a_grammar_that_needs_another_token_than_the_allowed_ones_ends_its_request_alone(
    guided: GuidedDecoding,
) -> None:
    params = SamplingParams(guided_choice=["yes", "no"], allowed_token_ids=[500, 2], seed=1)
    failed, other = sample(
        torch.zeros(2, VOCAB), [make_draw(params, (), 98), Draw(2, SamplingParams(seed=1), 5)], guided
    )
    assert failed.error == "guided output failed: none of allowed_token_ids can follow"
    assert other.error == ""


def test_logits_that_are_no_numbers_still_follow_the_grammar(guided: GuidedDecoding) -> None:
    for temperature in (0.0, 1.0):
        params = SamplingParams(guided_choice=["yes", "no"], seed=1, temperature=temperature)
        (options,) = allowed(guided, make_draw(params, (), 95))
        (drawn,) = sample(torch.full((1, VOCAB), torch.nan), [make_draw(params, (), 95)], guided)
        assert drawn.token_id in options


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"guided_json": "{"}, "guided_json: the schema is not JSON"),
        ({"guided_json": "[1]"}, "guided_json: the schema must be a JSON object"),
        ({"guided_json": {"type": "objectt"}}, "guided_json: Invalid type: objectt"),
        ({"guided_json": {"type": "integer", "minimum": 3, "maximum": 1}}, "guided_json: Unsatisfiable"),
        ({"guided_regex": "a("}, "guided_regex: .*unclosed group"),
        ({"guided_regex": "a)(b"}, "guided_regex: .*unopened group"),
        ({"guided_regex": "[^\\x00-\\U0010FFFF]"}, "guided_regex: no text can match it"),
        ({"guided_grammar": "start: start"}, "guided_grammar: no text can match it"),
        ({"guided_grammar": "start: word"}, 'guided_grammar: .*unknown name: "word"'),
        ({"guided_choice": []}, "guided_choice: the list is empty"),
        ({"guided_choice": ["a" * MAX_GRAMMAR_LENGTH]}, "guided_choice: .*more than the limit of 65536"),
        ({"guided_regex": "a" * (MAX_GRAMMAR_LENGTH + 1)}, "guided_regex: it has 65537 characters"),
        ({"guided_grammar": " " * (MAX_GRAMMAR_LENGTH + 1)}, "guided_grammar: it has 65537 characters"),
    ],
)
def test_a_grammar_that_can_not_work_is_found_before_it_starts(params: dict[str, Any], message: str) -> None:
    with pytest.raises(GrammarError, match=message):
        check_grammar(SamplingParams(**params))


def test_grammars_that_work_pass_the_check() -> None:
    for params in (
        {"guided_json": {"type": "object"}},
        {"guided_json": {}},
        {"guided_regex": ""},
        {"guided_choice": ["", "a"]},
        {"guided_grammar": "start: /[a-z]+/ start?"},
    ):
        check_grammar(SamplingParams(**params))
