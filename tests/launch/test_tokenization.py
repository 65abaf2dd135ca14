"""Token ids and chat prompts, held against transformers on the same prepared folder."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tidewright.launch.model_sources import download_embedded
from tidewright.tokenization import InvalidPromptError, Tokenizer

PROMPTS = [
    "Hello, world!",
    "The quick brown fox doesn't jump; it's we'll they'd I'M.",
    "1234",
    "3.14159 and 2,718,281",
    "In 1999 we had 42 cats, 007 agents and 10^100 atoms",
    "def f(x):\n    return x ** 2  # square\n",
    'for (int i = 0; i < 10; ++i) { printf("%d\\n", i); }',
    "SELECT * FROM t WHERE a >= 10 AND b != 'x';",
    "你好，世界。今天是2024年。",
    "こんにちは、元気ですか？",
    "안녕하세요 세계",
    "👩‍👩‍👧‍👦 family, 🏳️‍🌈 flag, 👍🏽 thumb",
    "مرحبا بالعالم ١٢٣",
    "שלום עולם",
    "नमस्ते दुनिया १२३",
    "   ",
    "\n\n\t\t \n",
    " leading and trailing ",
    "tabs\tand\r\nwindows lines\r\n",
    "a  b   c    d",
    "<|im_start|>user\nHi<|im_end|>",
    "text <|endoftext|> with<|im_end|>specials<file_sep>",
    "<|im_start|",
    "naïve café e\u0301 \ufb01",
    "Ünïcödé ½ ² Ⅷ ①",
    "https://example.org/a?b=c&d=%20#e",
    "$\\int_0^1 x^2 dx = \\frac{1}{3}$",
    "ZWSP\u200bNBSP\u00a0BOM\ufeffend",
    "a",
    "Antidisestablishmentarianism" * 20,
    "Once upon a time there were 3 bears. " * 300,
]

CHATS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 12 * 34?"}],
    [
        {"role": "user", "content": "Hallo 👋\n"},
        {"role": "assistant", "content": "  Guten Tag  "},
        {"role": "user", "content": "<b>&'\"</b>"},
    ],
    [{"role": "tool", "content": ""}],
]


@pytest.fixture(scope="module")
def reference(model_dir: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(model_dir)


@pytest.mark.parametrize("text", PROMPTS, ids=range(len(PROMPTS)))
def test_ids_and_text_are_those_of_transformers(
    tokenizer: Tokenizer, reference: PreTrainedTokenizerFast, text: str
) -> None:
    token_ids = tokenizer.encode(text)
    assert token_ids == reference(text)["input_ids"]
    for skip in (False, True):
        assert tokenizer.decode(token_ids, skip) == reference.decode(token_ids, skip_special_tokens=skip)


@pytest.mark.heavy
def test_vocabulary_is_that_of_transformers_conversion_with_digits_split(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """transformers drops the pre-tokenizer of SmolLM's GGUF file: its conversion is right once it is put back."""
    from tokenizers import pre_tokenizers

    gguf = download_embedded(tmp_path)
    converted = AutoTokenizer.from_pretrained(tmp_path, gguf_file=gguf.name).backend_tokenizer
    converted.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    for text in PROMPTS:
        assert tokenizer.encode(text) == converted.encode(text, add_special_tokens=False).ids


def test_digits_are_split_one_by_one(tokenizer: Tokenizer) -> None:
    assert [tokenizer.decode([i]) for i in tokenizer.encode("12  34")] == ["1", "2", "  ", "3", "4"]


@pytest.mark.parametrize("messages", CHATS, ids=range(len(CHATS)))
def test_chat_prompts_are_those_of_transformers(
    tokenizer: Tokenizer, reference: PreTrainedTokenizerFast, messages: list[dict[str, str]]
) -> None:
    expected = reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert tokenizer.apply_chat_template(messages) == expected
    ids = reference.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert tokenizer.encode_chat(json.dumps(messages)) == ids


TEMPLATES = [
    "{{ bos_token }}|{{ eos_token }}|{{ cls_token }}|{{ unk_token }}|{{ messages | tojson }}",
    "{{ messages | tojson(indent=2, sort_keys=True) }}{{ messages[0] | tojson(separators=(',', ':')) }}",
    "{% for m in messages %}\n  {% if loop.index > 1 %}{% break %}{% endif %}\n{{ m.content }}\n{% endfor %}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "{% generation %}{{ messages[0].content }}{% endgeneration %}{% if add_generation_prompt %}!{% endif %}",
    "{{ strftime_now('%Y') }}{{ tools is defined and tools }}",
]


@pytest.mark.parametrize("template", TEMPLATES, ids=range(len(TEMPLATES)))
def test_templates_have_what_transformers_gives_them(
    tmp_path: Path, model_dir: Path, reference: PreTrainedTokenizerFast, template: str
) -> None:
    tokenizer = with_template(tmp_path, model_dir, template)
    for messages in CHATS:
        assert tokenizer.apply_chat_template(messages) == reference.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=True
        )


def with_template(folder: Path, model_dir: Path, template: str | None) -> Tokenizer:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(model_dir / name, folder / name)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer(folder)


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ("not json", "not JSON"),
        ('[{"role": "user"', "not JSON"),
        ("[]", "empty"),
        ('{"role": "user", "content": "Hi"}', r"array"),
        ('[{"role": "user"}]', "content"),
        ('[{"role": 1, "content": "Hi"}]', r"\$\[0\].role|role"),
        ('[{"role": "user", "content": null}]', "content"),
    ],
)
def test_messages_that_are_none_are_refused_with_the_reason(tokenizer: Tokenizer, messages: str, problem: str) -> None:
    with pytest.raises(InvalidPromptError, match=problem):
        tokenizer.encode_chat(messages)


def test_a_model_without_template_says_so(tmp_path: Path, model_dir: Path) -> None:
    with pytest.raises(InvalidPromptError, match="no chat template"):
        with_template(tmp_path, model_dir, None).encode_chat('[{"role": "user", "content": "Hi"}]')


@pytest.mark.parametrize("template", ["{{ raise_exception('only users') }}", "{{ messages[0].content + 1 }}"])
def test_a_refusing_template_is_the_callers_error(tmp_path: Path, model_dir: Path, template: str) -> None:
    with pytest.raises(InvalidPromptError, match="refuses the messages"):
        with_template(tmp_path, model_dir, template).encode_chat('[{"role": "user", "content": "Hi"}]')


LOOPS = [
    "{% for i in range(50000) %}{% for j in range(50000) %}{% endfor %}{% endfor %}",
    "{% for i in range(n) %}{% endfor %}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
]


@pytest.mark.parametrize("template", LOOPS)
def test_a_template_that_loops_is_given_up(tmp_path: Path, model_dir: Path, template: str) -> None:
    tokenizer = with_template(tmp_path, model_dir, template)
    with pytest.raises(InvalidPromptError, match="refuses the messages"):
        tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], variables={"n": 10**12})


def test_a_template_that_writes_without_end_is_cut_where_it_is_too_long_anyway(tmp_path: Path, model_dir: Path) -> None:
    template = "{% for i in range(90000) %}{{ messages[0].content }}{% endfor %}"
    tokenizer = with_template(tmp_path, model_dir, template)
    messages = [{"role": "user", "content": "x" * 10_000}]  # 900 MB in all
    text = tokenizer.apply_chat_template(messages, 100)
    assert len(text) < 100_000
    with pytest.raises(InvalidPromptError, match="maximum context length is 100 tokens"):
        tokenizer.encode_rendered(text, 100)


def test_sampling_defaults_are_those_of_the_generation_config(tmp_path: Path, model_dir: Path) -> None:
    shutil.copyfile(model_dir / "tokenizer.json", tmp_path / "tokenizer.json")
    assert Tokenizer(tmp_path).sampling_defaults == {}
    config = {"temperature": 0.6, "top_k": 20, "do_sample": True, "eos_token_id": 2}
    (tmp_path / "generation_config.json").write_text(json.dumps(config))
    assert Tokenizer(tmp_path).sampling_defaults == {"temperature": 0.6, "top_k": 20}


def test_templates_cannot_leave_the_sandbox(tmp_path: Path, model_dir: Path) -> None:
    escape = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(InvalidPromptError):
        with_template(tmp_path, model_dir, escape).encode_chat('[{"role": "user", "content": "Hi"}]')


def test_empty_text_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidPromptError, match="empty"):
        tokenizer.encode("")


def test_the_stub_process_pays_for_neither_torch_nor_transformers() -> None:
    code = "import sys, tidewright.tokenization; assert not {'torch', 'transformers'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
