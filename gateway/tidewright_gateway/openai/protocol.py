"""Request bodies of OpenAI's API but chats: its own fields, and extensions that other engines have as well.

Ranges are those of `SamplingParams`, which checks them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import msgspec
from pydantic import Field, StrictBool, StrictInt, StrictStr, field_validator

from tidewright.schema import SamplingParams
from tidewright_gateway.openai.errors import invalid
from tidewright_gateway.openai.fields import ApiObject, Many, Number
from tidewright_gateway.openai.tools.base import grammar_lines
from tidewright_gateway.openai.tools.definitions import ToolUse
from tidewright_gateway.openai.wording import Wording

MAX_TEMPERATURE = 2.0  # OpenAI's; beyond it, text is noise


class Body(ApiObject):
    """Of a request; `parsing.parse` makes it."""

    forms: ClassVar[Mapping[str, str]] = {}
    """What fields of several forms must be, by their names."""
    part_types: ClassVar[Sequence[str]] = ()
    """The types of all parts that its messages may have, though perhaps not at every place."""

    model: StrictStr | None = None


class StreamOptions(ApiObject):
    place = "stream_options."
    without_effect = frozenset({"include_obfuscation"})

    include_usage: StrictBool = False
    """Send token usage in a last event."""
    continuous_usage_stats: StrictBool = False
    """With include_usage: every event has the usage so far."""


class JsonSchema(ApiObject):
    name: StrictStr = ""
    description: StrictStr | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    """The JSON schema that the answer follows."""
    strict: StrictBool | None = None


class ResponseFormat(ApiObject):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(ApiObject):
    """vLLM's newer names of guided_json, guided_regex, guided_choice and guided_grammar."""

    place = "structured_outputs."

    json_: dict[str, Any] | StrictStr | None = Field(None, alias="json")
    regex: StrictStr | None = None
    choice: Many[StrictStr] | None = None
    grammar: StrictStr | None = None
    json_object: StrictBool | None = None

    def fields(self) -> dict[str, Any]:
        """By their names in `SamplingParams`."""
        found = {"json": self.json_, "regex": self.regex, "choice": self.choice, "grammar": self.grammar}
        if self.json_object and self.json_ is None:
            found["json"] = {"type": "object"}
        return {f"guided_{name}": value for name, value in found.items() if value is not None}


class SamplingFields(Body):
    """What all endpoints share that generate text in one of OpenAI's APIs."""

    model: StrictStr
    """Model name, as in /v1/models."""
    temperature: Number | None = None
    """Sampling temperature, at most 2; 0 is greedy. Default: 1."""
    top_p: Number | None = None
    """Sample from the most likely tokens that together have this probability."""
    stream: StrictBool | None = None
    """Stream the answer as server-sent events."""
    user: StrictStr | None = None
    """The end user: has limits of its own within the key's, and shares no KV cache with other users."""
    stop: StrictStr | Many[StrictStr] | None = None
    """Stop before any of these texts."""
    seed: StrictInt | None = None
    """Makes sampling repeatable. -1: none."""
    presence_penalty: Number | None = None
    """Subtracted from the logits of tokens in the answer."""
    frequency_penalty: Number | None = None
    """The same, per occurrence."""
    top_k: StrictInt | None = None
    """Sample from this many most likely tokens; 0: all."""
    min_p: Number | None = None
    """Ignore tokens less likely than this share of the most likely one."""
    repetition_penalty: Number | None = None
    """Divides the logits of tokens in prompt and answer."""
    ignore_eos: StrictBool | None = None
    """Continue after the model's end-of-sequence token."""
    priority: StrictInt | None = None
    """Lower runs first; added to the key's own. Negative values count as 0 unless the key is an admin's."""
    timeout: Number | None = None
    """Maximum duration in seconds; the answer is what exists by then."""
    ttft_target: Number | None = None
    """Seconds to the first token, instead of the server's target; a request that is expected to take more than 0.8 of
    it is refused."""
    tpot_target: Number | None = None
    """Seconds between two tokens, instead of the server's target; a stricter one is only counted."""
    cache_salt: StrictStr | None = None
    """Within one key and user, requests share a KV cache only with the same salt."""


class GenerationBody(SamplingFields, ABC):
    """What chats and completions share."""

    without_effect = frozenset(
        {
            "store",
            "metadata",
            "service_tier",
            "safety_identifier",
            "prompt_cache_key",
            "prompt_cache_retention",
            "prompt_cache_options",
            "verbosity",
            "prediction",
            "moderation",
            "spaces_between_special_tokens",
        }
    )
    refused: ClassVar[Mapping[str, str]] = {
        "logits_processors": "the server runs no code of callers",
        "use_beam_search": "send n and choose among the answers",
        "length_penalty": "it is of beam search; send n and choose among the answers",
        "chat_template": "the model's own is used; chat_template_kwargs sets its variables",
        "lora": "name the adapter in model",
        "lora_name": "name the adapter in model",
        "lora_request": "name the adapter in model",
    }

    max_tokens: StrictInt | None = None
    """Maximum tokens of the answer; it ends earlier where the model's context does. Default, and for -1: 16 for
    completions, the rest of the context for chats."""
    n: StrictInt | None = None
    """Number of answers per prompt; with a seed, they use consecutive seeds."""
    logit_bias: dict[StrictStr, Number] | None = None
    """Values added to the logits of token ids."""
    stream_options: StreamOptions | None = None
    """Only with stream: true."""
    response_format: ResponseFormat | None = None
    """Generate JSON, or JSON that follows a schema."""

    min_tokens: StrictInt | None = None
    """Minimum tokens before the answer may end."""
    stop_token_ids: Many[StrictInt] | None = None
    """Stop at any of these tokens."""
    bad_words: Many[StrictStr] | None = None
    """Texts that must not appear in the answer."""
    guided_json: dict[str, Any] | StrictStr | None = None
    """A JSON schema that the answer follows."""
    guided_regex: StrictStr | None = None
    """A regular expression that the answer matches."""
    guided_grammar: StrictStr | None = None
    """A Lark grammar that the answer follows."""
    guided_choice: Many[StrictStr] | None = None
    """The answer is one of these."""
    structured_outputs: StructuredOutputs | None = None
    """vLLM's newer names of the guided fields."""
    allowed_token_ids: Many[StrictInt] | None = None
    """Only these tokens are generated."""
    skip_special_tokens: StrictBool | None = None
    """false: special tokens are part of the text."""
    include_stop_str_in_output: StrictBool | None = None
    """The text ends with the stop text that ended it."""
    prompt_logprobs: StrictInt | None = None
    """Also the log-probabilities of the prompt's tokens, with this many most likely ones."""
    truncate_prompt_tokens: StrictInt | None = None
    """Only this many tokens of the prompt's end are used. -1: as many as the model's context takes."""
    return_token_ids: StrictBool | None = None
    """Return token_ids of the answer and prompt_token_ids."""

    @abstractmethod
    def num_logprobs(self) -> int | None:
        """Top log-probabilities at each token; None if none are asked for."""

    names_of_ours: ClassVar[Mapping[str, str]] = {}
    """This API's names of sampling parameters that it names differently."""

    @field_validator("max_tokens", "max_completion_tokens", mode="before", check_fields=False)
    @classmethod
    def _no_limit(cls, value: Any) -> Any:
        return None if value == -1 and not isinstance(value, bool) else value

    @property
    def asked_tokens(self) -> int | None:
        """Requested maximum of tokens; None if the request has none."""
        return self.max_tokens

    @property
    def tool_use(self) -> ToolUse | None:
        """The tools that the model may call."""
        return None

    @property
    def num_prompts(self) -> int:
        return 1

    @property
    def has_token_ids(self) -> bool:
        """It names tokens by their ids, or asks for those of its answer: another tokenizer has others."""
        return bool(self.logit_bias or self.stop_token_ids or self.allowed_token_ids or self.return_token_ids)

    @property
    def schema_field(self) -> str:
        """The field whose JSON schema the answer follows; empty if it is guided_json, or none."""
        return "response_format" if self._schema() is not None else ""

    def wording(self, use: ToolUse | None, grammar: str | None) -> Wording:
        """How errors of the model's side are told.

        Args:
            grammar: that the answer follows, if it was made of the schemas of tools.
        """
        own = "structured_outputs" if self.structured_outputs else ""
        names = {name: own for name in _GUIDED if own and getattr(self, name) is None}
        if field := self.schema_field:
            names["guided_json"] = field
        given = next((name for name in _GUIDED if getattr(self, name) is not None), "")
        if grammar is None or use is None:
            return Wording({**self.names_of_ours, **names}, given or field or own)
        lines = grammar_lines(grammar, use, self.place_of_schema, field or given or own or "tools")
        return Wording({**self.names_of_ours, **names, "guided_grammar": "tools"}, "tools", lines)

    @staticmethod
    def place_of_schema(number: int) -> str:
        """Of the schema of a tool."""
        return f"tools.{number}.function.parameters"

    def sampling(self, defaults: Mapping[str, Any] | None = None) -> SamplingParams:
        """With the defaults of completions, and before these those of the model.

        Raises:
            ApiError: a value is out of its range.
        """
        given = {name: getattr(self, name) for name in _SAMPLING if getattr(self, name) is not None}
        fields = {**(defaults or {}), **given}
        if self.asked_tokens is not None:
            fields["max_tokens"] = self.asked_tokens
        if self.temperature is not None and self.temperature > MAX_TEMPERATURE:
            raise invalid(f"temperature is {self.temperature:g}, more than {MAX_TEMPERATURE:g}", "temperature")
        if self.prompt_logprobs is not None and self.stream:
            raise invalid("prompt_logprobs needs stream: false", "prompt_logprobs")
        if self.stream_options and not self.stream:
            raise invalid("stream_options needs stream: true", "stream_options")
        if self.structured_outputs:
            fields |= self.structured_outputs.fields()
        if (logprobs := self.num_logprobs()) is not None:
            fields["logprobs"] = logprobs
        if (schema := self._schema()) is not None:
            if "guided_json" in fields:
                raise invalid("response_format and guided_json both say what the answer is; send one", "guided_json")
            fields["guided_json"] = schema
        try:
            return msgspec.convert(fields, SamplingParams, strict=False)
        except OverflowError:  # msgspec's, for some integers of more than 64 bits
            raise invalid("a number is too large") from None
        except msgspec.ValidationError as error:
            message, _, place = str(error).partition(" - at ")  # such as `$.stop[0]`, or `key` in `$.logit_bias`
            name = place.rpartition("`$.")[2].rstrip("`").split("[")[0]
            param = self.names_of_ours.get(name, name) or None
            if place.startswith("`key`"):
                message = f"a key is no token id: {message}"
            raise invalid(f"{param}: {message}" if param else message, param) from None

    def _schema(self) -> dict[str, Any] | None:
        asked = self.response_format
        if asked is None or asked.type == "text":
            return None
        if asked.type == "json_object":
            return {"type": "object"}
        if asked.json_schema is None:
            raise invalid("response_format of type json_schema needs json_schema", "response_format.json_schema")
        return asked.json_schema.schema_


_GUIDED = ("guided_json", "guided_regex", "guided_grammar", "guided_choice")
# Each of n choices is a generation of its own.
_SAMPLING = [name for name in SamplingParams.__struct_fields__ if name in GenerationBody.model_fields and name != "n"]


class CompletionRequest(GenerationBody):
    prompt: StrictStr | Many[StrictStr] | Many[StrictInt] | Many[Many[StrictInt]]
    """Text or token ids, or a list of either."""
    logprobs: StrictInt | None = None
    """Return the log-probability of each token and of this many most likely ones."""
    echo: StrictBool | None = None
    """Return the prompt before the answer, and with logprobs those of its tokens. Then max_tokens may be 0."""
    best_of: StrictInt | None = None
    """Only supported if equal to n."""
    suffix: Literal[""] | None = None
    """Only the empty text: nothing is inserted."""
    add_special_tokens: StrictBool | None = None
    """false: a prompt of text gets no special tokens of the tokenizer, such as BOS. Default: true."""

    def num_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def only_scores(self) -> bool:
        """The prompt's log-probabilities are asked for, and no token."""
        return self.max_tokens == 0 and bool(self.echo)

    @property
    def asked_tokens(self) -> int | None:
        return 1 if self.only_scores else self.max_tokens

    def sampling(self, defaults: Mapping[str, Any] | None = None) -> SamplingParams:
        if self.best_of not in (None, self.n or 1):
            raise invalid("best_of other than n is not supported; ask for n and choose", "best_of")
        sampling = super().sampling(defaults)
        if self.echo and sampling.prompt_logprobs is None:
            sampling = msgspec.structs.replace(sampling, prompt_logprobs=sampling.logprobs)
        return sampling

    @property
    def has_token_ids(self) -> bool:
        return super().has_token_ids or any(not isinstance(prompt, str) for prompt in self.prompts)

    @property
    def num_prompts(self) -> int:
        return len(self.prompts)

    @property
    def prompts(self) -> list[str | list[int]]:
        prompt: Any = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        if prompt and isinstance(prompt[0], int):
            return [prompt]
        return list(prompt)


class DetokenizeRequest(Body):
    tokens: Many[StrictInt]
