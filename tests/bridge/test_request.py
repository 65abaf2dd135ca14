"""What is refused before it queues, and how inputs become a request."""

from __future__ import annotations

import numpy as np
import pytest
from msgspec.structs import replace

from helpers.requests import ENGINE, tensors
from tidewright.bridge.request import GenerationRequest, parse_request
from tidewright.errors import InvalidRequestError
from tidewright.tokenization import Tokenizer

YES = 10407  # the token of "yes"


def parse(tokenizer: Tokenizer, parameters: str = "{}", **values: object) -> GenerationRequest:
    return parse_request(tensors(**values), parameters, tokenizer, ENGINE)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "either text_input or input_ids"),
        ({"text_input": "a", "input_ids": [1]}, "not both"),
        ({"text_input": ""}, "empty"),
        ({"input_ids": []}, "empty"),
        ({"text_input": b"a\xff"}, "text_input is not valid UTF-8"),
        ({"input_ids": [1, 49152]}, "from 0 to 49151"),
        ({"input_ids": [-1]}, "from 0 to 49151"),
        ({"input_ids": [1] * 256}, "at most 255"),
        ({"input_ids": [1] * 100, "sampling_parameters": {"max_tokens": 29}}, "KV cache holds 128"),
        ({"text_input": "a", "sampling_parameters": "{nope"}, "not JSON"),
        ({"text_input": "a", "sampling_parameters": b"\xff"}, "sampling_parameters is not valid UTF-8"),
        ({"text_input": "a", "sampling_parameters": "[1]"}, "must be a JSON object"),
        ({"text_input": "a", "sampling_parameters": {"temprature": 1}}, "unknown sampling parameter: temprature"),
        ({"text_input": "a", "sampling_parameters": {"temperature": -0.1}}, "temperature"),
        ({"text_input": "a", "sampling_parameters": {"temperature": "hot"}}, "temperature"),
        ({"text_input": "a", "sampling_parameters": {"temperature": "nan"}}, "temperature"),
        ({"text_input": "a", "sampling_parameters": {"temperature": "inf"}}, "temperature"),
        ({"text_input": "a", "sampling_parameters": {"top_p": 0}}, "top_p"),
        ({"text_input": "a", "sampling_parameters": {"top_p": 1.1}}, "top_p"),
        ({"text_input": "a", "sampling_parameters": {"top_p": "nan"}}, "top_p"),
        ({"text_input": "a", "sampling_parameters": {"top_k": -2}}, "top_k"),
        ({"text_input": "a", "sampling_parameters": {"max_tokens": 0}}, "max_tokens"),
        ({"text_input": "a", "sampling_parameters": {"max_tokens": 257}}, "context of 256"),
        ({"text_input": "a", "sampling_parameters": {"min_tokens": 17}}, "more than max_tokens"),
        ({"text_input": "a", "sampling_parameters": {"stop": [""]}}, "length >= 1 for `stop"),
        ({"text_input": "a", "sampling_parameters": {"stop": ["x"] * 17}}, "length <= 16 for `stop`"),
        ({"text_input": "a", "sampling_parameters": {"stop_token_ids": [49152]}}, "stop_token_ids"),
        ({"text_input": "a", "sampling_parameters": {"logprobs": 21}}, "logprobs"),
        ({"text_input": "a", "sampling_parameters": {"seed": -(2**63) - 1}}, "seed"),
        ({"text_input": "a", "sampling_parameters": {"prompt_logprobs": 21}}, "<= 20 for `prompt_logprobs`"),
        ({"text_input": "a", "sampling_parameters": {"prompt_logprobs": True}}, "prompt_logprobs"),
        ({"text_input": "a", "sampling_parameters": {"n": 17}}, "<= 16 for `n`"),
        ({"text_input": "a", "sampling_parameters": {"n": 0}}, "`n`"),
        ({"text_input": "a", "sampling_parameters": {"timeout": -1}}, "timeout"),
        ({"text_input": "a", "sampling_parameters": {"timeout": "inf"}}, "<= 1000000000.0 for `timeout`"),
        ({"text_input": "a", "sampling_parameters": {"timeout": "soon"}}, "timeout"),
        ({"text_input": "a", "sampling_parameters": {"priority": 1.5}}, "priority"),
        ({"text_input": "a", "sampling_parameters": {"cache_salt": "x" * 257}}, "length <= 256 for `cache_salt`"),
        ({"text_input": "a", "sampling_parameters": {"cache_salt": ""}}, "length >= 1 for `cache_salt`"),
        ({"text_input": "a", "sampling_parameters": {"tenant": "x" * 321}}, "length <= 320 for `tenant`"),
        ({"text_input": "a", "sampling_parameters": {"tenant_weight": 0}}, ">= 1 for `tenant_weight`"),
        ({"text_input": "a", "sampling_parameters": {"tenant_weight": 1001}}, "<= 1000 for `tenant_weight`"),
        ({"text_input": "a", "sampling_parameters": {"repetition_penalty": 0}}, "repetition_penalty"),
        ({"text_input": "a", "sampling_parameters": {"presence_penalty": 2.1}}, "presence_penalty"),
        ({"text_input": "a", "sampling_parameters": {"frequency_penalty": "nan"}}, "frequency_penalty"),
        ({"text_input": "a", "sampling_parameters": {"min_p": 1.5}}, "min_p"),
        ({"text_input": "a", "sampling_parameters": {"logit_bias": {"49152": 1}}}, "logit_bias: 49152 is outside"),
        (
            {"text_input": "a", "sampling_parameters": {"logit_bias": {"-1": 1}}},
            "the key '-1' is no token id",
        ),
        (
            {"text_input": "a", "sampling_parameters": {"logit_bias": {"yes": 1}}},
            "logit_bias: the key 'yes' is no token id",
        ),
        ({"text_input": "a", "sampling_parameters": {"logit_bias": {"5": 101}}}, "<= 100.0 for `logit_bias"),
        ({"text_input": "a", "sampling_parameters": {"logit_bias": {"5": "nan"}}}, "logit_bias"),
        (
            {"text_input": "a", "sampling_parameters": {"logit_bias": {str(i): 1 for i in range(301)}}},
            "length <= 300 for `logit_bias`",
        ),
        ({"text_input": "a", "sampling_parameters": {"bad_words": ["x"] * 65}}, "length <= 64 for `bad_words`"),
        ({"text_input": "a", "sampling_parameters": {"bad_words": ["x" * 65]}}, "length <= 64 for `bad_words"),
        ({"text_input": "a", "sampling_parameters": {"bad_words": [""]}}, "length >= 1 for `bad_words"),
        ({"text_input": "a", "sampling_parameters": {"bad_words": [" "]}}, "more than spaces"),
        ({"text_input": "a", "sampling_parameters": {"allowed_token_ids": []}}, "length >= 1 for `allowed_token_ids`"),
        (
            {"text_input": "a", "sampling_parameters": {"allowed_token_ids": [1, 49152]}},
            "allowed_token_ids: 49152 is outside the vocabulary of 49152",
        ),
        (
            {"text_input": "a", "sampling_parameters": {"allowed_token_ids": [5], "guided_regex": "a"}},
            r"allowed_token_ids with guided_regex: .* EOS; add an id of it \(0, 2\)",
        ),
        (
            {
                "text_input": "a",
                "sampling_parameters": {"allowed_token_ids": [2, 5, 0], "min_tokens": 1, "stop_token_ids": [5]},
            },
            "min_tokens with allowed_token_ids that all end the output",
        ),
        (
            {
                "text_input": "a",
                "sampling_parameters": {
                    "allowed_token_ids": [5],
                    "ignore_eos": True,
                    "min_tokens": 1,
                    "stop_token_ids": [5],
                },
            },
            "min_tokens with allowed_token_ids that all end the output",
        ),
        (
            {"input_ids": [1], "sampling_parameters": {"allowed_token_ids": [YES], "bad_words": ["yes"]}},
            "all of allowed_token_ids are bad_words",
        ),
        ({"text_input": "a", "sampling_parameters": {"guided_choice": []}}, "guided_choice: the list is empty"),
        ({"text_input": "a", "sampling_parameters": {"guided_regex": "a("}}, "guided_regex: .*unclosed group"),
        ({"text_input": "a", "sampling_parameters": {"guided_grammar": "x"}}, "guided_grammar: "),
        ({"text_input": "a", "sampling_parameters": {"guided_json": {"type": "x"}}}, "guided_json: Invalid type: x"),
        ({"text_input": "a", "sampling_parameters": {"guided_json": "{"}}, "guided_json: the schema is not JSON"),
        (
            {"text_input": "a", "sampling_parameters": {"guided_json": {}, "guided_regex": "a"}},
            "guided_json and guided_regex given",
        ),
        (
            {"text_input": "a", "sampling_parameters": {"guided_regex": "a", "ignore_eos": True}},
            "ignore_eos with guided_regex",
        ),
        (
            {"text_input": "a", "sampling_parameters": {"guided_choice": ["a"], "min_tokens": 1}},
            "min_tokens with guided_choice",
        ),
        ({"text_input": "a", "stream": True, "exclude_input_in_output": False}, "not possible when streaming"),
        (
            {"text_input": "a", "resume_ids": [1], "sampling_parameters": {"n": 2}},
            "resume_ids are of one output, but n is 2",
        ),
        ({"text_input": "a", "resume_ids": [1, 49152]}, "resume_ids: each must be from 0 to 49151, got 1 to 49152"),
        ({"text_input": "a", "resume_ids": [-1]}, "resume_ids: each must be from 0 to 49151"),
        (
            {"text_input": "a", "resume_ids": [1, 2, 3], "sampling_parameters": {"max_tokens": 3}},
            "3 resume_ids and max_tokens, which counts them, is 3",
        ),
        (
            {"input_ids": [1] * 200, "resume_ids": [1] * 56, "sampling_parameters": {"max_tokens": 57}},
            "256 tokens; .* at most 255",
        ),
    ],
)
def test_bad_input_is_refused_with_its_name(tokenizer: Tokenizer, values: dict, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        parse(tokenizer, **values)


@pytest.mark.parametrize(
    "sampling",
    [
        {"allowed_token_ids": [0, 2], "min_tokens": 1, "ignore_eos": True},
        {"allowed_token_ids": [0, 2, 5], "min_tokens": 1},
        {"allowed_token_ids": [2]},
        {"allowed_token_ids": [5, 2], "guided_regex": "a"},
        {"allowed_token_ids": [YES, 5], "bad_words": ["yes"]},
    ],
)
def test_allowed_ids_of_which_one_can_come_are_taken(tokenizer: Tokenizer, sampling: dict) -> None:
    made = parse(tokenizer, text_input="a", sampling_parameters=sampling)
    assert made.sampling.allowed_token_ids == sampling["allowed_token_ids"]


def test_tokens_to_resume_behind_come_with_the_request(tokenizer: Tokenizer) -> None:
    options = {"max_tokens": 4, "min_tokens": 4, "seed": 9, "stop": "x", "prompt_logprobs": 0, "logprobs": 1}
    for shape in ([3], [1, 3]):
        ids = {"resume_ids": np.array([5, 6, 7], dtype=np.int32).reshape(shape)}
        made = parse_request(tensors(text_input="a", sampling_parameters=options) | ids, "", tokenizer, ENGINE)
        assert made.resume_ids == [5, 6, 7]
        expected = parse(tokenizer, text_input="a", sampling_parameters={**options, "prompt_logprobs": None}).sampling
        assert made.sampling == expected
    longest = parse(tokenizer, input_ids=[1] * 10, resume_ids=[1] * 3, sampling_parameters={"max_tokens": 118})
    assert longest.sampling.max_tokens == 118  # what is resumed is part of it, and of the 128 tokens of the KV cache
    assert parse(tokenizer, text_input="a", resume_ids=[]).resume_ids == []
    assert parse(tokenizer, text_input="a").resume_ids == []


def test_the_prompt_is_not_put_before_what_comes_behind_other_text(tokenizer: Tokenizer) -> None:
    assert parse(tokenizer, text_input="Hello", resume_ids=[5], exclude_input_in_output=False).echo == ""
    assert parse(tokenizer, input_ids=[1, 2], resume_ids=[5]).echo == ""


@pytest.mark.parametrize(
    ("resumed", "asked", "got"),
    [
        (0, {"max_tokens": 16, "min_tokens": 2}, (16, 2)),
        (0, {"max_tokens": 21, "min_tokens": 2}, (20, 2)),
        (0, {"max_tokens": 100, "min_tokens": 100}, (20, 20)),
        (0, {"max_tokens": 1000}, (20, 0)),  # beyond the context even
        (5, {"max_tokens": 21, "min_tokens": 21}, (21, 21)),
        (5, {"max_tokens": 26, "min_tokens": 26}, (25, 25)),  # 20 new ones
        (240, {"max_tokens": 1000, "min_tokens": 300}, (256, 256)),  # all that the context leaves room for
    ],
)
def test_a_limit_of_the_engine_counts_new_tokens(
    tokenizer: Tokenizer, resumed: int, asked: dict[str, int], got: tuple[int, int]
) -> None:
    limited = replace(ENGINE, max_output_tokens=20, num_blocks=32)
    inputs = tensors(text_input="a", resume_ids=[1] * resumed, sampling_parameters=asked)
    sampling = parse_request(inputs, "", tokenizer, limited).sampling
    assert (sampling.max_tokens, sampling.min_tokens) == got


def test_a_limit_of_the_engine_makes_a_request_fit_its_cache(tokenizer: Tokenizer) -> None:
    inputs = tensors(input_ids=[1] * 100, sampling_parameters={"max_tokens": 200})
    for limit, fits in ((0, False), (29, False), (28, True)):
        engine = replace(ENGINE, max_output_tokens=limit)
        if fits:
            assert parse_request(inputs, "", tokenizer, engine).sampling.max_tokens == limit
        else:
            with pytest.raises(InvalidRequestError, match="KV cache holds 128"):
                parse_request(inputs, "", tokenizer, engine)


EMBED_ENGINE = replace(ENGINE, embedding_size=576)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"text_input": "a"}, "runs with --task embed and generates no text; send embed = true"),
        ({"text_input": "a", "embed": False}, "runs with --task embed and generates no text"),
        ({"embed": True}, "either text_input or input_ids"),
        ({"text_input": "", "embed": True}, "empty"),
        ({"input_ids": [1] * 257, "embed": True}, "more than the model's context of 256"),
        ({"input_ids": [49152], "embed": True}, "from 0 to 49151"),
        ({"text_input": "a", "embed": True, "stream": True}, "^stream: an embedding has no generated text"),
        ({"text_input": "a", "embed": True, "resume_ids": [1]}, "^resume_ids: an embedding"),
        (
            {"text_input": "a", "embed": True, "sampling_parameters": {"max_tokens": 5, "n": 2}},
            "^max_tokens, n: an embedding has no generated text; beside its prompt it takes priority, timeout",
        ),
    ],
)
def test_what_an_embed_server_refuses(tokenizer: Tokenizer, values: dict, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        parse_request(tensors(**values), "", tokenizer, replace(EMBED_ENGINE, num_blocks=1000))


def test_a_server_that_generates_refuses_embeddings(tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidRequestError, match="embeddings need one that runs with --task embed"):
        parse(tokenizer, text_input="a", embed=True)


def test_an_embedding_request_may_fill_the_context(tokenizer: Tokenizer) -> None:
    options = {"priority": 3, "timeout": 2, "cache_salt": "tenant", "max_tokens": 16, "tenant": "t", "tenant_weight": 2}
    engine = replace(EMBED_ENGINE, max_model_len=10)  # less than the default of max_tokens
    inputs = tensors(input_ids=[1] * 10, embed=True, sampling_parameters=options)
    request = parse_request(inputs, "", tokenizer, engine)
    assert (request.prompt_token_ids, request.echo) == ([1] * 10, "")
    assert (request.sampling.priority, request.sampling.timeout, request.sampling.cache_salt) == (3, 2.0, "tenant")
    assert parse_request(tensors(text_input="Hello", embed=True), "", tokenizer, engine).prompt_token_ids


def test_two_prompts_in_one_tensor_are_refused(tokenizer: Tokenizer) -> None:
    two = {"text_input": np.array([b"a", b"b"], dtype=np.object_)}
    with pytest.raises(InvalidRequestError, match="exactly one element"):
        parse_request(two, "", tokenizer, ENGINE)


def test_numbers_may_be_strings_as_clients_of_the_vllm_backend_send_them(tokenizer: Tokenizer) -> None:
    options = {"temperature": "0.5", "top_p": "0.9", "max_tokens": "7", "ignore_eos": "true"}
    sampling = parse(tokenizer, text_input="a", sampling_parameters=options).sampling
    assert (sampling.temperature, sampling.top_p, sampling.max_tokens, sampling.ignore_eos) == (0.5, 0.9, 7, True)


def test_the_tensor_wins_over_request_parameters_as_in_the_vllm_backend(tokenizer: Tokenizer) -> None:
    options = {"top_k": 5}
    sampling = parse(
        tokenizer, '{"max_tokens": 3, "nonsense": 1}', text_input="a", sampling_parameters=options
    ).sampling
    assert (sampling.max_tokens, sampling.top_k) == (16, 5)
    assert parse(tokenizer, '{"max_tokens": 3}', text_input="a").sampling.max_tokens == 3


def test_the_prompt_is_echoed_as_the_vllm_backend_does(tokenizer: Tokenizer) -> None:
    assert parse(tokenizer, text_input="Hello").echo == "Hello"
    assert parse(tokenizer, text_input="Hello", stream=True).echo == ""
    assert parse(tokenizer, text_input="Hello", exclude_input_in_output=True).echo == ""
    ids = tokenizer.encode("Hello <|im_end|>")
    assert parse(tokenizer, input_ids=ids).echo == "Hello <|im_end|>"


def test_each_unseeded_request_gets_a_seed_of_its_own(tokenizer: Tokenizer) -> None:
    seeds = {parse(tokenizer, text_input="a").sampling.seed for _ in range(5)}
    assert len(seeds) == 5
    assert None not in seeds
    assert parse(tokenizer, text_input="a", sampling_parameters={"seed": 9}).sampling.seed == 9


def test_logprobs_need_the_parameter_but_their_sum_does_not(tokenizer: Tokenizer) -> None:
    assert parse(tokenizer, text_input="a").sampling.logprobs is None
    without = parse(tokenizer, text_input="a", return_logprobs=True)
    assert (without.sampling.logprobs, without.returns.null_logprobs) == (None, True)
    total = parse(tokenizer, text_input="a", return_logprobs=True, return_cumulative_logprob=True)
    assert (total.sampling.logprobs, total.returns.null_logprobs) == (0, True)
    options = {"logprobs": 3}
    both = parse(tokenizer, text_input="a", return_logprobs=True, sampling_parameters=options)
    assert (both.sampling.logprobs, both.returns.null_logprobs) == (3, False)


def test_every_sampling_parameter_arrives(tokenizer: Tokenizer) -> None:
    options = {
        "logit_bias": {"5": 1.0, "7": "-2"},
        "repetition_penalty": 1.1,
        "min_p": 0.1,
        "guided_json": {"type": "object"},
        "n": 16,
        "timeout": "2.5",
        "priority": -3,
        "cache_salt": "tenant",
        "prompt_logprobs": 0,
    }
    sampling = parse(tokenizer, text_input="a", sampling_parameters=options).sampling
    assert sampling.logit_bias == {5: 1.0, 7: -2.0}
    assert (sampling.guided_json, sampling.n, sampling.timeout) == ('{"type": "object"}', 16, 2.5)
    assert (sampling.priority, sampling.cache_salt, sampling.prompt_logprobs) == (-3, "tenant", 0)


def test_bad_words_become_tokens_as_they_stand_alone_and_after_a_space(tokenizer: Tokenizer) -> None:
    def ids(*words: str) -> list[list[int]]:
        return parse(tokenizer, text_input="a", sampling_parameters={"bad_words": list(words)}).bad_words_ids

    def encode(text: str) -> list[int]:
        return tokenizer.backend.encode(text, add_special_tokens=False).ids

    assert ids() == []
    assert ids("cat", "  New York", "cat") == [encode(t) for t in ("cat", " cat", "New York", " New York")]
    assert len(encode(" New York")) > 1


def test_an_adapter_is_named_in_the_tensor_or_beside_it(tokenizer: Tokenizer) -> None:
    """Beside the tensor, other parameters count for nothing; but the base model must not answer for an adapter."""
    tensor, beside = {"lora_name": "sql"}, '{"lora_name": "sql", "max_tokens": 99}'
    assert parse(tokenizer, text_input="a").adapter == ""
    assert parse(tokenizer, beside, text_input="a").adapter == "sql"
    assert parse(tokenizer, text_input="a", sampling_parameters=tensor).adapter == "sql"
    both = parse(tokenizer, beside, text_input="a", sampling_parameters={"max_tokens": 5})
    assert (both.adapter, both.sampling.max_tokens) == ("sql", 5)
    with pytest.raises(InvalidRequestError, match="lora_name"):
        parse(tokenizer, '{"lora_name": "a b"}', text_input="a", sampling_parameters={})
