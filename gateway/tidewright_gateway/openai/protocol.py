"""Request bodies of the API: OpenAI's, with extensions that other engines have as well.

Each field has an effect; a field that would have none is refused by name. Ranges are those of `SamplingParams`, which
checks them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import msgspec
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictFloat, StrictInt, StrictStr

from tidewright.schema import SamplingParams
from tidewright_gateway.openai.errors import invalid

Number = Annotated[StrictFloat, Field(allow_inf_nan=False)] | StrictInt
T = TypeVar("T")
Many = Annotated[list[T], Field(fail_fast=True)]
"""A list whose validation stops at the first invalid item, to bound the cost of errors."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class Body(_Strict):
    """Of a request; `parsing.parse` makes it."""

    model: StrictStr | None = None


class StreamOptions(_Strict):
    include_usage: StrictBool = False
    """Send token usage in a last event."""


class JsonSchema(_Strict):
    name: StrictStr = ""
    description: StrictStr | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    """The JSON schema that the answer follows."""
    strict: StrictBool | None = None


class ResponseFormat(_Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class GenerationBody(Body, ABC):
    """What both endpoints share."""

    model: StrictStr
    """Model name, as in /v1/models."""
    max_tokens: StrictInt | None = None
    """Maximum tokens of the answer. Default: 16 for completions, the rest of the context for chats."""
    temperature: Number | None = None
    """Sampling temperature; 0 is greedy. Default: 1."""
    top_p: Number | None = None
    """Sample from the most likely tokens that together have this probability."""
    n: StrictInt | None = None
    """Number of answers per prompt; with a seed, they use consecutive seeds."""
    stop: StrictStr | Many[StrictStr] | None = None
    """Stop before any of these texts."""
    seed: StrictInt | None = None
    """Makes sampling repeatable."""
    presence_penalty: Number | None = None
    """Subtracted from the logits of tokens in the answer."""
    frequency_penalty: Number | None = None
    """The same, per occurrence."""
    logit_bias: dict[StrictStr, Number] | None = None
    """Values added to the logits of token ids."""
    stream: StrictBool | None = None
    """Stream the answer as server-sent events."""
    stream_options: StreamOptions | None = None
    """Only with stream: true."""
    response_format: ResponseFormat | None = None
    """Generate JSON, or JSON that follows a schema."""
    user: StrictStr | None = None
    """The end user: has limits of its own within the key's, and shares no KV cache with other users."""

    top_k: StrictInt | None = None
    """Sample from this many most likely tokens; 0: all."""
    min_p: Number | None = None
    """Ignore tokens less likely than this share of the most likely one."""
    repetition_penalty: Number | None = None
    """Divides the logits of tokens in prompt and answer."""
    min_tokens: StrictInt | None = None
    """Minimum tokens before the answer may end."""
    stop_token_ids: Many[StrictInt] | None = None
    """Stop at any of these tokens."""
    ignore_eos: StrictBool | None = None
    """Continue after the model's end-of-sequence token."""
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
    priority: StrictInt | None = None
    """Lower runs first; added to the key's own. Negative values count as 0 unless the key is an admin's."""
    timeout: Number | None = None
    """Maximum duration in seconds; the answer is what exists by then."""
    cache_salt: StrictStr | None = None
    """Within one key and user, requests share a KV cache only with the same salt."""

    @abstractmethod
    def num_logprobs(self) -> int | None:
        """Top log-probabilities at each token; None if none are asked for."""

    names_of_ours: ClassVar[Mapping[str, str]] = {}
    """This API's names of sampling parameters that it names differently."""

    @property
    def asked_tokens(self) -> int | None:
        """Requested maximum of tokens; None if the request has none."""
        return self.max_tokens

    def sampling(self) -> SamplingParams:
        """With the defaults of completions.

        Raises:
            ApiError: a value is out of its range.
        """
        fields = {name: getattr(self, name) for name in _SAMPLING if getattr(self, name) is not None}
        if self.asked_tokens is not None:
            fields["max_tokens"] = self.asked_tokens
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


# Each of n choices is a generation of its own.
_SAMPLING = [name for name in SamplingParams.__struct_fields__ if name in GenerationBody.model_fields and name != "n"]


class TextPart(_Strict):
    type: Literal["text"]
    text: StrictStr


class _Message(_Strict):
    content: StrictStr | Many[TextPart] | None
    name: None = None

    @property
    def text(self) -> str:
        if self.content is None:
            return ""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class InputMessage(_Message):
    """A message to the model."""

    role: Literal["system", "developer", "user", "tool"]
    content: StrictStr | Many[TextPart]


class AssistantMessage(_Message):
    """An answer of the model, as history; the empty fields of this API's own answers are accepted."""

    role: Literal["assistant"]
    content: StrictStr | Many[TextPart] | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None
    """Empty: tool calls are not supported."""
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None


Message = Annotated[InputMessage | AssistantMessage, Field(discriminator="role")]


class ChatRequest(GenerationBody):
    names_of_ours = {"logprobs": "top_logprobs"}

    messages: Many[Message] = Field(min_length=1)
    """The chat so far."""
    max_completion_tokens: StrictInt | None = None
    """OpenAI's newer name of max_tokens."""
    logprobs: StrictBool | None = None
    """Return the log-probability of each token."""
    top_logprobs: StrictInt | None = None
    """Also of this many most likely tokens."""

    def num_logprobs(self) -> int | None:
        if self.top_logprobs is not None and not self.logprobs:
            raise invalid("top_logprobs needs logprobs: true", "top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def asked_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def sampling(self) -> SamplingParams:
        if self.asked_tokens is not None and self.max_tokens not in (None, self.asked_tokens):
            raise invalid("max_tokens and max_completion_tokens differ; send one", "max_tokens")
        return super().sampling()


class CompletionRequest(GenerationBody):
    prompt: StrictStr | Many[StrictStr] | Many[StrictInt] | Many[Many[StrictInt]]
    """Text or token ids, or a list of either."""
    logprobs: StrictInt | None = None
    """Return the log-probability of each token and of this many most likely ones."""
    echo: StrictBool | None = None
    """Return the prompt before the answer."""
    best_of: StrictInt | None = None
    """Only supported if equal to n."""

    def num_logprobs(self) -> int | None:
        return self.logprobs

    def sampling(self) -> SamplingParams:
        if self.best_of not in (None, self.n or 1):
            raise invalid("best_of other than n is not supported; ask for n and choose", "best_of")
        if self.echo and self.logprobs is not None:
            raise invalid("echo with logprobs is not supported; send one of them", "echo")
        return super().sampling()

    @property
    def prompts(self) -> list[str | list[int]]:
        prompt: Any = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        if prompt and isinstance(prompt[0], int):
            return [prompt]
        return list(prompt)


class TokenizeRequest(Body):
    prompt: StrictStr | None = None
    messages: Many[Message] | None = None


class DetokenizeRequest(Body):
    tokens: Many[StrictInt]
